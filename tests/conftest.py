"""One thread a process, here and in all that tests start: what they compute is tiny, and there is a process a core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it then
