"""Saving and loading what each rank has, with torch.distributed.checkpoint.

A part is a box of a whole tensor. Each box is written once, and can be read in any other division into boxes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nnscaler.checkpoint.checksums import Piece
from nnscaler.checkpoint.storage import CheckedReader, CheckedWriter
from nnscaler.errors import UserError
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.shards import Box, flat_range_boxes

if TYPE_CHECKING:
    from nnscaler.runtime.pipeline import TrainedModule

PIECE_ELEMENTS = 2**24  # at most in a piece of a tensor that is written and read at once: 64 MiB


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor, with this rank's memory for it.

    name, shape  of the whole tensor
    box          the part of it
    tensor       this rank's memory for that part
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, self.box.offsets

    def pieces(self) -> Iterator[Part]:
        """The part in pieces of at most PIECE_ELEMENTS."""
        flat = self.tensor.view(-1)
        for start in range(0, len(flat), PIECE_ELEMENTS):
            for at, box in flat_range_boxes(self.box.sizes, start, min(start + PIECE_ELEMENTS, len(flat))):
                tensor = flat[at : at + torch.Size(box.sizes).numel()].view(box.sizes)
                yield Part(self.name, self.shape, box.shifted(self.box.offsets), tensor)


def whole(name: str, tensor: Tensor) -> Part:
    """A tensor that one rank has to itself, as a part."""
    shape = tuple(tensor.shape)
    return Part(name, shape, Box((0,) * len(shape), shape), tensor)


def owned_state(optimizer: ShardedOptimizer, copies: bool = True) -> list[Part]:
    """The fp32 master weights (`model.<name>`) and moments (`exp_avg.<name>`, ...) that this rank owns.

    copies  whether those too that another stage of a pipeline has, whose owners may own other boxes
    """
    parts = []
    for bucket, master, state in zip(optimizer.buckets, optimizer.masters, optimizer.state):
        if bucket.is_copy and not copies:
            continue
        for kind, flat in (("model", master), *state.items()):
            for part in bucket.owned_parts():
                tensor = flat[part.start : part.stop].view(part.box.sizes)
                parts.append(Part(f"{kind}.{part.name}", part.spec.shape, part.box, tensor))
    return parts


def fixed_state(module: TrainedModule, names: Iterable[str]) -> list[Part]:
    """Those tensors of the model that training leaves as they are (`model.<name>`), as far as this rank has them.

    Buffers are whole on each rank, frozen parameters may be sharded. What several ranks want to save, one writes.
    """
    return [
        Part(f"model.{name}", module.specs[name].shape, module.box(name), tensor)
        for name in names
        for tensor in module.tensors_called(name)
    ]


def save_parts(
    folder: Path, parts: list[Part], complete: Callable[[list[Piece]], None], group: dist.ProcessGroup | None = None
) -> None:
    """Writes all ranks' parts into a folder. Then rank 0 calls `complete` with the pieces that were written.
    Collective.

    group  in which the ranks agree, with CPU tensors; None: the default one
    Raises, on every rank, the first error of any rank; OSError where the folder cannot be written.
    """
    with _first_error(), _quiet():
        pieces = [piece for part in parts for piece in part.pieces()]
        dcp.save(
            {}, storage_writer=CheckedWriter(folder, complete), planner=_SavePlanner(pieces),
            process_group=group, no_dist=not dist.is_initialized(),
        )  # fmt: skip


def load_parts(folder: Path, parts: list[Part]) -> None:
    """Fills all ranks' parts from a folder, in whatever division it was written. Collective.

    Raises, on every rank, CorruptCheckpoint where any rank finds damage, and UserError where a tensor does not fit.
    """
    with _first_error(), _quiet():
        reader = CheckedReader(folder)
        planner = _LoadPlanner(parts)
        dcp.load({}, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    planner.fill_copies()


@contextmanager
def _first_error() -> Iterator[None]:
    """Inside, raises the error of the lowest rank where torch.distributed.checkpoint collects errors of all ranks."""
    try:
        yield
    except dcp.CheckpointException as failure:
        reason, _ = min(failure.failures.items())[1]
        raise reason from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, there is no warning that only one process runs, which is no mistake here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes a list of parts."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {part.key: part for part in parts}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(part) for part in self._parts.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        index = write_item.index
        return self._parts[index.fqn, tuple(index.offset or ())].tensor.detach()


def _write_item(part: Part) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(part.box.offsets), torch.Size(part.box.sizes))
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(part.tensor), torch.Size(part.shape))
    return WriteItem(MetadataIndex(part.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads into a list of parts."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__()
        self._all = list(parts)
        self._parts = {part.key: part for part in self._all}

    def fill_copies(self) -> None:
        """Parts of the same box, such as tied weights of two pipeline stages on a rank, are read once and copied."""
        for part in self._all:
            once = self._parts[part.key]
            if part is not once:
                part.tensor.copy_(once.tensor)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        by_name: dict[str, list[Part]] = {}
        for part in self._parts.values():
            by_name.setdefault(part.name, []).append(part)
        items: list[ReadItem] = []
        for name, parts in by_name.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"the checkpoint has no tensor '{name}'")
            if tuple(stored.size) != parts[0].shape:
                raise UserError(
                    f"the checkpoint's '{name}' has shape {list(stored.size)}, the model's {list(parts[0].shape)}"
                )
            chunks = [ChunkStorageMetadata(torch.Size(p.box.offsets), torch.Size(p.box.sizes)) for p in parts]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn, tuple(index.offset or ())].tensor.detach()
