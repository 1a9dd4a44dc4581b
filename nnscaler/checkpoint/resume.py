"""Continuing training from a checkpoint, a merged file, or a Hugging Face model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler.checkpoint.checksums import CorruptCheckpoint
from nnscaler.checkpoint.claim import find_own, saved_since
from nnscaler.checkpoint.folder import TrainerState, check_complete, complete_checkpoints, is_checkpoint
from nnscaler.checkpoint.merge import MergedFile
from nnscaler.checkpoint.randomness import new_random_states, set_random_states
from nnscaler.checkpoint.sharded import Part, load_parts, owned_state, whole
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.counting import counted
from nnscaler.errors import UserError
from nnscaler.models.adapters import is_adapter
from nnscaler.models.weights import WeightFiles
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.pipeline import TrainedModule

logger = logging.getLogger(__name__)


def where_to_begin(directory: Path, resume_path: Path | None, jobs: Collection[str]) -> tuple[list[Path], Path | None]:
    """(what to load, the best first; this run's folder, if torchrun restarted it). Nothing to load means: begin anew.

    directory    in which runs have their folders
    resume_path  as the user gave it
    jobs         names of this run's job, on each node
    Raises UserError as `find_resumable` does.
    """
    own = find_own(directory, jobs)
    if own is not None:
        folder, since = own
        checkpoints = saved_since(folder, since)
        saved = counted(len(checkpoints), "checkpoint")
        logger.info("restarted by torchrun: %s of this run in %s", saved, folder)
        if checkpoints:
            return without_damaged(checkpoints), folder
    return find_resumable(resume_path) if resume_path is not None else [], own and own[0]


def find_resumable(path: Path) -> list[Path]:
    """What a resume path means: files or folders to load, the best first.

    A file or checkpoint is itself; a folder stands for the complete checkpoints below it, the newest first. Behind a
    checkpoint come those that the same run saved before it, to fall back to if it is damaged.

    Raises UserError for a path that does not exist, or is something else.
    """
    if not path.exists():
        raise UserError(f"resume_path is '{path}', which does not exist")
    if path.is_file():
        MergedFile.open(path)
        return [path]
    if is_checkpoint(path):
        path = path.resolve()  # `last` or `best`
        older = complete_checkpoints(path.parent)
        found = [*older[: older.index(path)], path] if path in older else [path]
    else:
        found = complete_checkpoints(path)
    if not found and (path / "config.json").exists() and WeightFiles.find(path) is not None:
        return [path]
    if not found:
        raise UserError(f"'{path}' holds no complete checkpoint")
    return without_damaged(found[::-1])


def without_damaged(checkpoints: list[Path]) -> list[Path]:
    """Those checkpoints whose files are all there and unchanged. Shards are only checked for their length: the rest is
    checked when they are read.

    Raises UserError where none is left.
    """
    usable, damages = [], []
    for checkpoint in checkpoints:
        try:
            check_complete(checkpoint)
            usable.append(checkpoint)
        except CorruptCheckpoint as damage:
            damages.append(damage)
            if not usable:
                _warn(damage)
    if not usable:
        raise damages[0]
    return usable


def _warn(damage: CorruptCheckpoint) -> None:
    logger.warning("%s; falling back to the newest complete checkpoint before it", damage)


def check_fits(path: Path, model: nn.Module, name: str, prefix: str) -> None:
    """Compares a model, which is on the meta device, with what a checkpoint or merged file says that it holds.

    name    of the model, for people
    prefix  what stands before the names of the user's own files in the model's names
    Raises UserError for a parameter that is not there or has another shape, and for a tensor that the model lacks;
    CorruptCheckpoint for damage.
    """
    state = MergedFile.open(path).state if path.is_file() else TrainerState.read(path)
    _check_adapters(path, [own for own, _ in model.named_parameters()], state.parameters)
    for own, parameter in model.named_parameters():
        stored = state.parameters.get(state.tied.get(own, own))
        if stored is None or tuple(stored["shape"]) != tuple(parameter.shape):
            has = "is missing" if stored is None else f"has shape {stored['shape']}"
            raise UserError(
                f"checkpoint '{path}' does not fit model '{name}': {own.removeprefix(prefix)} {has}, and the model's "
                f"has shape {list(parameter.shape)}"
            )
    places = model.state_dict().keys()
    left = next((own for own in state.parameters if own not in places), None)
    if left is not None:
        raise UserError(
            f"checkpoint '{path}' does not fit model '{name}': it holds {left.removeprefix(prefix)}, which the model "
            "does not have"
        )


def _check_adapters(path: Path, own: Iterable[str], stored: Iterable[str]) -> None:
    """Raises UserError where one of a model and a checkpoint, whose parameters these are, has adapters."""
    wanted, found = any(map(is_adapter, own)), any(map(is_adapter, stored))
    if wanted and not found:
        raise UserError(
            f"checkpoint '{path}' was trained without adapters, which lora_rank asks for; merge it with ckpt_merger.py "
            "--output_dir, and give that folder as model_id"
        )
    if found and not wanted:
        raise UserError(f"checkpoint '{path}' is one of adapters; give the lora_rank with which they were trained")


def resume(
    paths: list[Path],
    module: TrainedModule,
    optimizer: ShardedOptimizer,
    fixed: list[Part],
    load_weights: Callable[[Path], None],
) -> tuple[Path, TrainerState | None]:
    """Loads parameters, buffers, optimizer and progress, on any mesh. Collective.

    paths         what `find_resumable` gave: the first is loaded; where it is damaged, the next
    fixed         the tensors of the model that training leaves as they are
    load_weights  loads the parameters of a Hugging Face model
    Returns what was loaded, and the state of training then; None for a Hugging Face model, which has only weights.
    Raises CorruptCheckpoint where all are damaged, and UserError where one does not fit the model.
    """
    damages = []
    for path in paths:
        try:
            return path, _load(path, module, optimizer, fixed, load_weights)
        except CorruptCheckpoint as damage:
            damages.append(damage)
            if path is not paths[-1]:
                _warn(damage)
    raise damages[0]


def _load(
    path: Path,
    module: TrainedModule,
    optimizer: ShardedOptimizer,
    fixed: list[Part],
    load_weights: Callable[[Path], None],
) -> TrainerState | None:
    device = module.axes.device
    rank = dist.get_rank() if dist.is_initialized() else 0
    random: dict[str, Tensor] = {}
    if path.is_file():
        merged = MergedFile.open(path)
        merged.load([*owned_state(optimizer), *fixed])
        state = merged.state
    elif is_checkpoint(path):
        checkpoint = Checkpoint.open(path)
        random = {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.random_states(rank).items()
        }
        load_parts(path, [*owned_state(optimizer), *fixed, *(whole(name, state) for name, state in random.items())])
        state = checkpoint.state
    else:
        load_weights(path)
        optimizer.load_masters()
        return None
    optimizer.set_steps(state.step if state.updates is None else state.updates)
    optimizer.publish_masters()
    if random:
        set_random_states({name.split(".")[1]: tensor for name, tensor in random.items()}, device)
    else:
        new_random_states(state.seed, state.step, rank)
    return state
