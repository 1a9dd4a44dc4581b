"""One thread a process, here and in all that tests start: what they compute is tiny, and there is a process a core. And
a folder for what they trace, see `tests.traced`."""

import os
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it then

if "FOLDER_OF_TRACES" not in os.environ:  # else what started this process has one
    of_traces = TemporaryDirectory()  # until this process ends
    os.environ["FOLDER_OF_TRACES"] = of_traces.name
