"""One thread a process, here and in all that tests start: what they compute is tiny, and there is a process a core.
A folder for what they trace, see `tests.traced`. And what is drawn at random is the same each time; but for examples
where FUZZ is set, as for `tests.test_fuzz`. One may take however long it takes."""

import os
import random
import sys
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it then

if "FOLDER_OF_TRACES" not in os.environ:  # else what started this process has one
    of_traces = TemporaryDirectory()  # until this process ends
    os.environ["FOLDER_OF_TRACES"] = of_traces.name

settings.register_profile(
    "here", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="FUZZ" not in os.environ
)
settings.load_profile("here")


def pytest_runtest_setup() -> None:
    """A test draws the same numbers whichever ran before it in this process."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
