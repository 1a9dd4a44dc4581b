"""Checkpoints on disk: what they are called, which are complete, which to keep.

    <directory>/<run>/step_00000100/    a checkpoint: shards and their index, trainer.json, model/, checksums
    <directory>/<run>/last              a link to the newest
    <directory>/<run>/best              a link to that with the lowest validation loss; where none was validated, with
                                        the lowest training loss

A checkpoint is written under a name that begins with a dot, and gets its own name when everything is on disk; it is
removed the other way round. So what bears a checkpoint's name is complete, whenever the machine stops. The links are
symbolic and relative: `cd`, `ls -l` and a copy of the run's folder understand them, and one is replaced in one step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnscaler.checkpoint.checksums import CHECKSUMS, Checksums, CorruptCheckpoint
from nnscaler.directory import sync, sync_entry
from nnscaler.errors import UserError

TRAINER = "trainer.json"
ASSETS = "model"  # folder with config.json and tokenizer
LAST, BEST = "last", "best"


@dataclass(frozen=True)
class TrainerState:
    """The state of training at a checkpoint.

    step         optimizer steps taken
    consumed     samples consumed; the order of the data continues after these
    seed         of the order of the data
    samples      in the dataset; the order of the data depends on this too
    schedule     of the learning rate: peak, kind, warm-up, total steps, ...
    loss         mean training loss of a label, as last reported; None: not reported yet, or not finite
    run, model   names, for people
    processes    how many trained
    parameters   name -> {shape, dtype} of every parameter and persistent buffer; dtype is the type of computation
    tied         another name of a parameter -> its name in `parameters`
    prefix       what stands before the Hugging Face model's names in `parameters`
    saved_at     seconds since the epoch
    updates      optimizer steps that changed the weights; None: all
    owner        a name of the run that saved it, which no other run has (`Claim.run`)
    keep         how many of its newest checkpoints the run was to keep; 0: all, so this one is never removed
    eval_loss    mean validation loss a label of these very weights; None: not evaluated, or not finite
    mixture      of a mixture of datasets, name -> rows, and samples of a block; else empty (`Mixture.described`)
    step_samples  samples of a step; 0: not known
    """

    step: int
    consumed: int
    seed: int
    samples: int
    schedule: dict[str, Any]
    loss: float | None
    run: str
    model: str
    processes: int
    parameters: dict[str, dict[str, Any]]
    tied: dict[str, str]
    prefix: str
    saved_at: float
    updates: int | None = None
    owner: str = ""
    keep: int = 0
    eval_loss: float | None = None
    mixture: dict[str, list[int]] = field(default_factory=dict)
    step_samples: int = 0

    def write(self, folder: Path) -> None:
        (folder / TRAINER).write_text(json.dumps(asdict(self), indent=1, allow_nan=False))

    @staticmethod
    def read(folder: Path) -> TrainerState:
        """The state in a folder. Raises CorruptCheckpoint where the folder is not a complete checkpoint."""
        try:
            check_complete(folder)
            return TrainerState(**json.loads((folder / TRAINER).read_text()))
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"checkpoint '{folder}' has been removed") from error
        except CorruptCheckpoint:
            raise
        except (ValueError, TypeError) as error:
            raise CorruptCheckpoint(f"checkpoint '{folder}': file '{TRAINER}' is something else") from error


def working_folder(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return run / f".step_{step:08d}.writing"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or damaged."""
    return folder.is_dir() and not folder.name.startswith(".") and any(
        (folder / name).exists() for name in (TRAINER, CHECKSUMS)
    )  # fmt: skip


def check_complete(folder: Path) -> None:
    """Raises CorruptCheckpoint as `Checksums.check` does."""
    Checksums.read(folder).check()


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint at or below a directory, the oldest first. Links are followed, to each folder once."""
    if directory.is_symlink():
        directory = directory.resolve()  # `last` and `best` are links
    return _in_order([directory, *_steps_below(directory)] if directory.is_dir() else [])


def _steps_below(directory: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, _ in os.walk(directory, followlinks=True):  # a run that goes on may remove some meanwhile
        seen.add(os.path.realpath(parent))
        yield from (Path(parent, name) for name in folders if name.startswith("step_"))
        inner = [name for name in folders if not name.startswith(("step_", ".")) and name not in (LAST, BEST)]
        folders[:] = [name for name in inner if os.path.realpath(os.path.join(parent, name)) not in seen]


def own_checkpoints(run: Path) -> list[Path]:
    """Every checkpoint in a run's folder, the oldest first; not those of a run whose folder lies within."""
    return _in_order(run.glob("step_*"))


def _in_order(candidates: Iterable[Path]) -> list[Path]:
    folders = [folder for folder in candidates if is_checkpoint(folder) and not folder.is_symlink()]
    return sorted(folders, key=lambda folder: (saved_at(folder), folder.name))


def _field(folder: Path, name: str) -> Any:
    """A field of a checkpoint's trainer.json. None where that is damaged or has no such field."""
    try:
        return json.loads((folder / TRAINER).read_text()).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def saved_at(folder: Path) -> float:
    """When a checkpoint was saved, in seconds since the epoch. For a damaged one: when its folder was last changed."""
    found = _field(folder, "saved_at")
    if isinstance(found, (int, float)):
        return float(found)
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # it has just been removed
        return 0.0


def run_name(folder: Path) -> str | None:
    """The name of the run that saved a checkpoint; its folder may have a number behind that name."""
    return _field(folder, "model")


def latest_checkpoint(directory: Path) -> Path:
    """The newest complete checkpoint at or below a directory. Raises UserError where there is none."""
    if not directory.exists():
        raise UserError(f"checkpoint directory '{directory}' does not exist")
    found = complete_checkpoints(directory)
    if not found:
        raise UserError(f"'{directory}' holds no complete checkpoint")
    return found[-1]


def publish(work: Path, state: TrainerState) -> Path:
    """Gives a checkpoint that is written its name, in one step. Points `last` to it, and `best` if it has the lowest
    loss.

    The name is that of the step, with a number behind it where the run has an earlier checkpoint of this name. Returns
    the checkpoint.
    """
    sync(work)
    run, number = work.parent, 1
    final = run / f"step_{state.step:08d}"
    while final.exists():
        number += 1
        final = run / f"step_{state.step:08d}-{number}"
    work.rename(final)
    _point(run / LAST, final)
    if _is_better(state, run / BEST):
        _point(run / BEST, final)
    sync_entry(run)
    return final


def _is_better(state: TrainerState, best: Path) -> bool:
    """Whether a checkpoint is better than the best so far. Between two of which one was evaluated, it is that one."""
    for found, so_far in ((state.eval_loss, _loss(best, "eval_loss")), (state.loss, _loss(best, "loss"))):
        if found is not None or so_far is not None:
            return found is not None and (so_far is None or found < so_far)
    return False


def _loss(folder: Path, kind: str) -> float | None:
    loss = _field(folder, kind)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def _point(link: Path, folder: Path) -> None:
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    new.replace(link)


def remove_old(run: Path, keep: int, owner: str) -> None:
    """Removes all but the newest `keep` (0: none) of the checkpoints that the run called `owner` saved in its folder.

    Those that links point to stay, and those that were saved to be kept for good.
    """
    pointed_to = {(run / link).resolve() for link in (LAST, BEST)}
    own = [folder for folder in own_checkpoints(run) if _field(folder, "owner") == owner and _field(folder, "keep")]
    for folder in own[:-keep] if keep else []:
        if folder.resolve() not in pointed_to:
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder, which first loses its name."""
    leaving = folder.with_name(f".{folder.name.lstrip('.')}.removing")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes what a run that was killed left half written or half removed."""
    for pattern in (".step_*.writing", ".step_*.removing"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
