"""What the tests of small training runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a module's own, with what `tests.checkpoint.jobs` train on: hardware and data."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_hardware(folder)
    tiny.write_dataset(folder / "data")
    return folder
