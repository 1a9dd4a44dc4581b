"""Continuing from a checkpoint, a merged file, or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnscaler.checkpoint.folder import TrainerState, check_complete, is_checkpoint, latest_checkpoint
from nnscaler.checkpoint.sharded import Part, load_parts, owned_state
from nnscaler.errors import UserError
from nnscaler.runtime.module import ParallelModule
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.weights import SafetensorsReader


def find_resumable(path: Path) -> Path:
    """What a resume path means: itself, or the newest complete checkpoint below a folder.

    Raises UserError for what does not exist, is incomplete, or is something else.
    """
    if not path.exists():
        raise UserError(f"resume_path is '{path}', which does not exist")
    if path.is_file():
        _open_merged(path)
    elif not SafetensorsReader.available(path):
        path = path if is_checkpoint(path) else latest_checkpoint(path)
        check_complete(path)
    return path


def resume(path: Path, module: ParallelModule, optimizer: ShardedOptimizer, prefix: str) -> TrainerState | None:
    """Loads parameters, optimizer and progress on any mesh. Collective.

    path    what `find_resumable` gave
    prefix  what stands before a Hugging Face model's names in the module's own
    Returns where training stood; None for a Hugging Face model, which has weights only.
    """
    if path.is_file():
        state = _load_merged(path, owned_state(optimizer))
    elif is_checkpoint(path):
        state = TrainerState.read(path)
        load_parts(path, owned_state(optimizer))
    else:
        load_safetensors(path, module, prefix)
        optimizer.load_masters()
        return None
    optimizer.set_steps(state.step)
    optimizer.publish_masters()
    return state


def _load_merged(path: Path, parts: list[Part]) -> TrainerState:
    """Each rank reads its own parts of a merged file."""
    tensors, state = _open_merged(path)
    _fill(parts, tensors, path)
    return state


def _open_merged(path: Path) -> tuple[dict[str, Tensor], TrainerState]:
    """The tensors of a merged file, memory-mapped, by kind and name (`model.<name>`, ...)."""
    try:
        content: dict[str, Any] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        tensors = {f"model.{name}": tensor for name, tensor in content["model"].items()}
        for kind, values in content["optimizer"].items():
            tensors.update({f"{kind}.{name}": tensor for name, tensor in values.items()})
        return tensors, TrainerState(**content["trainer"])
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        raise UserError(f"resume_path is '{path}', which is not a merged checkpoint") from error


def _fill(parts: list[Part], tensors: Mapping[str, Tensor], path: Path) -> None:
    for part in parts:
        tensor = tensors.get(part.name)
        if tensor is None or tuple(tensor.shape) != part.shape:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise UserError(f"'{path}' does not fit the model: {part.name} {found}, the model's is {list(part.shape)}")
        part.tensor.copy_(tensor[part.box.slices])


def load_safetensors(directory: Path, module: ParallelModule, prefix: str) -> None:
    """Each rank reads its own slices of a Hugging Face model. Raises UserError for names or shapes that differ."""
    reader = SafetensorsReader(directory)
    specs = module.parameters_to_load()
    names = {name: _stored_name(name, prefix, module.tied, reader) for name in specs}
    missing = reader.missing(names.values())
    if missing:
        raise UserError(f"'{directory}' lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    for name, spec in specs.items():
        if reader.shape(names[name]) != spec.shape:
            shape = list(reader.shape(names[name]))
            raise UserError(f"'{directory}' has {names[name]} of shape {shape}, the model's is {list(spec.shape)}")
    module.load(lambda name, box: reader.read(names[name], box))


def _stored_name(name: str, prefix: str, tied: Mapping[str, str], reader: SafetensorsReader) -> str:
    """The name of a parameter in the file: its own, or that of one tied to it."""
    names = [name, *(other for other, target in tied.items() if target == name)]
    stored = [candidate.removeprefix(prefix) for candidate in names]
    return next((candidate for candidate in stored if not reader.missing([candidate])), stored[0])
