"""Checkpoints on disk: what they are called, which are complete, which to keep.

    <directory>/<run>/step_00000100/    a checkpoint: shards, their index, trainer.json
    <directory>/<run>/last              a link to the newest

A checkpoint is written under a name that begins with a dot, and gets its own name when everything is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnscaler.errors import UserError

TRAINER = "trainer.json"
INDEX = ".metadata"  # written by torch.distributed.checkpoint
ASSETS = "model"  # folder with config.json and tokenizer


@dataclass(frozen=True)
class TrainerState:
    """Where training stands.

    step         optimizer steps taken
    consumed     samples consumed, from which the data's order goes on
    seed         of the data's order
    run, model   names, for people
    parameters   name -> {shape, dtype} of every trained parameter; dtype is the type of computation
    tied         other names of tied parameters
    prefix       what stands before the Hugging Face model's names in `parameters`
    saved_at     seconds since the epoch
    """

    step: int
    consumed: int
    seed: int
    run: str
    model: str
    parameters: dict[str, dict[str, Any]]
    tied: dict[str, str]
    prefix: str
    saved_at: float

    def write(self, folder: Path) -> None:
        (folder / TRAINER).write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(folder: Path) -> TrainerState:
        """Raises UserError where the folder is not a complete checkpoint."""
        check_complete(folder)
        return TrainerState(**json.loads((folder / TRAINER).read_text()))


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def working_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(f".{final.name}.writing")


def is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".") and (folder / TRAINER).exists()


def check_complete(folder: Path) -> None:
    """Raises UserError naming the first file that a checkpoint lacks."""
    for name in (TRAINER, INDEX):
        if not (folder / name).exists():
            raise UserError(f"checkpoint '{folder}' is incomplete: it has no {name}")


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint at or below a directory, the oldest first."""
    candidates = [directory, *directory.rglob("step_*")] if directory.is_dir() else []
    folders = [folder for folder in candidates if is_checkpoint(folder) and not folder.is_symlink()]
    return sorted(folders, key=lambda folder: (json.loads((folder / TRAINER).read_text())["saved_at"], folder.name))


def latest_checkpoint(directory: Path) -> Path:
    """The newest complete checkpoint at or below a directory. Raises UserError where there is none."""
    if not directory.exists():
        raise UserError(f"checkpoint directory '{directory}' does not exist")
    found = complete_checkpoints(directory)
    if not found:
        raise UserError(f"'{directory}' holds no complete checkpoint")
    return found[-1]


def publish(work: Path, final: Path) -> None:
    """Gives a written checkpoint its name, in one step, and points `last` to it."""
    _sync(work)
    if final.exists():
        shutil.rmtree(final)
    work.rename(final)
    link = final.parent / ".last.new"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(final.parent / "last")
    _sync(final.parent)


def _sync(folder: Path) -> None:
    """Asks the system to put a folder's files and entries on disk."""
    paths = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    for path in [*paths, folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_old(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of a run (0: none is removed)."""
    if keep:
        for folder in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)


def new_run_folder(directory: Path, name: str) -> Path:
    """A folder for a run's checkpoints that holds no other run's: `name`, or `name-2`, ..."""
    candidate, count = directory / name, 1
    while complete_checkpoints(candidate):
        count += 1
        candidate = directory / f"{name}-{count}"
    return candidate


def now() -> float:
    return time.time()
