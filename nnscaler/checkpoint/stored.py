"""A checkpoint as seen from outside training: what it holds, and its whole tensors, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint
from nnscaler.checkpoint.folder import BEST, LAST, TrainerState, complete_checkpoints
from nnscaler.checkpoint.randomness import RANDOM
from nnscaler.checkpoint.storage import CheckedReader
from nnscaler.counting import counted
from nnscaler.shards import Box


@dataclass(frozen=True)
class Checkpoint:
    """A complete sharded checkpoint.

    entries  name of a tensor -> its shape, type and pieces. Trained parameters are `model.<name>`, `exp_avg.<name>`,
             ..., in fp32; frozen ones and persistent buffers are `model.<name>`, in the type that training has them in;
             states of random number generators are `random.<generator>.<rank>`
    """

    folder: Path
    state: TrainerState
    entries: dict[str, TensorStorageMetadata]
    _reader: CheckedReader
    _places: dict[MetadataIndex, Any]

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Raises CorruptCheckpoint where it is incomplete or damaged; shards are only checked when they are read."""
        state = TrainerState.read(folder)
        reader = CheckedReader(folder)
        metadata = reader.read_metadata()
        found = sorted(metadata.state_dict_metadata.items())
        entries = {name: entry for name, entry in found if isinstance(entry, TensorStorageMetadata)}
        assert metadata.storage_data is not None
        return Checkpoint(folder, state, entries, reader, metadata.storage_data)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of a tensor with its kind (`model.<name>`, `exp_avg.<name>`, ...) -> its shape."""
        return {name: tuple(e.size) for name, e in self.entries.items() if not name.startswith(RANDOM)}

    def random_states(self, rank: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of each tensor that holds a state of a rank's random number generators."""
        mine = (name for name in self.entries if name.startswith(RANDOM) and name.endswith(f".{rank}"))
        return {name: (self.entries[name].size, self.entries[name].properties.dtype) for name in mine}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor of `shapes()`, on the CPU. Memory: the tensor, and twice `sharded.PIECE_ELEMENTS`."""
        entry = self.entries[name]
        tensor = torch.empty(shape, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            tensor[box.slices] = self._reader.read_piece(self._places[MetadataIndex(name, chunk.offsets)])
        return tensor

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which the checkpoint has a tensor of `shapes()`."""
        return self.entries[name].properties.dtype

    def dtype(self, parameter: str) -> torch.dtype:
        """The type in which training computes with a parameter or buffer."""
        dtype = getattr(torch, self.state.parameters[parameter]["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise CorruptCheckpoint(f"checkpoint '{self.folder}' has no type of '{parameter}'")
        return dtype


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines for people: where training stood, and every tensor with its type, shape, pieces and bytes."""
    state = checkpoint.state
    saved = datetime.fromtimestamp(state.saved_at).astimezone().isoformat(" ", "seconds")
    yield f"checkpoint  {checkpoint.folder}"
    yield f"run         {state.run}: {counted(state.processes, 'process', 'processes')}, saved {saved}"
    consumed = counted(state.consumed, "sample")
    yield f"position    step {state.step}, {consumed} of a dataset of {state.samples}, seed {state.seed}"
    yield f"loss        {'not reported' if state.loss is None else f'{state.loss:.6f}'}"
    if state.eval_loss is not None:
        yield f"validation  {state.eval_loss:.6f}"
    yield f"schedule    {', '.join(f'{name} {value}' for name, value in state.schedule.items())}"
    sizes = Checksums.read(checkpoint.folder).sizes()
    yield f"files       {len(sizes)}, {sum(sizes.values()):,} bytes"
    yield f"{'tensor':<72} {'type':<9} {'shape':<18} {'pieces':>6} {'bytes':>16}"
    for name, entry in checkpoint.entries.items():
        kind = entry.properties.dtype
        size = entry.size.numel() * kind.itemsize
        shape = " x ".join(map(str, entry.size)) or "scalar"
        yield f"{name:<72} {str(kind).removeprefix('torch.'):<9} {shape:<18} {len(entry.chunks):>6} {size:>16,}"


def describe_all(directory: Path) -> Iterator[str]:
    """A line for each checkpoint at or below a directory, the oldest first, with what is wrong with it, if anything."""
    for folder in complete_checkpoints(directory):
        links = [link for link in (LAST, BEST) if (folder.parent / link).resolve() == folder.resolve()]
        try:
            state = TrainerState.read(folder)
            text = f"step {state.step}, loss {'-' if state.loss is None else f'{state.loss:.6f}'}"
            text += "" if state.eval_loss is None else f", validation loss {state.eval_loss:.6f}"
        except CorruptCheckpoint as damage:
            text = str(damage)
        yield f"{folder}  {text}" + (f"  <- {', '.join(links)}" if links else "")
