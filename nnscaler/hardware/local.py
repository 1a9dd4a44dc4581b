"""What was measured on this machine, as files in ~/.cache/nnscaler, or in the folder that NNSCALER_CACHE names.

communication/<device name>.json    written by `nnscaler.profiler.benchmark_comm`
operators/<device name>.json        written by `nnscaler.profiler.operators` while a plan is made
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path

from nnscaler.errors import UserError
from nnscaler.hardware.communication import NO_TIMES, CommunicationTimes

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of measurements; it need not exist."""
    return Path(os.environ.get("NNSCALER_CACHE") or Path.home() / ".cache" / "nnscaler")


def communication_path(device: str) -> Path:
    """The file of communication times of a device. `device`: the name that it gives itself"""
    return cache_folder() / "communication" / f"{_file_name(device)}.json"


def operators_path(device: str) -> Path:
    """The file of operator times of a device."""
    return cache_folder() / "operators" / f"{_file_name(device)}.json"


def measured_on(device: str) -> CommunicationTimes:
    """What was measured here on devices of this name. Without tables where nothing was, or the file is bad."""
    return _read(communication_path(device))


def is_kind(kind: str, device: str) -> bool:
    """Whether a device's name says that it is of a kind.

    "NVIDIA H100 80GB HBM3" is "h100". "NVIDIA RTX A1000" is not "a100", and "NVIDIA GH200" is not "h200".
    """
    return re.search(rf"(?<![a-z0-9]){re.escape(kind.lower())}(?![0-9])", device.lower()) is not None


def measured_on_kind(kind: str) -> CommunicationTimes:
    """What was measured last on a device of this kind (see `is_kind`)."""
    files = [path for path in communication_path("").parent.glob("*.json") if is_kind(kind, path.stem)]
    return _read(max(files, key=lambda path: (path.stat().st_mtime, path))) if files else NO_TIMES


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all. Raises UserError where it cannot be written."""
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        with open(handle, "w") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; NNSCALER_CACHE names another folder"
        ) from error


def _read(path: Path) -> CommunicationTimes:
    try:
        return CommunicationTimes.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return NO_TIMES
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s holds no communication times (%r): ignored; measure again or remove it", path, error)
        return NO_TIMES


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
