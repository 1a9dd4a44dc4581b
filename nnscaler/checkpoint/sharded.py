"""Saving and loading what each rank owns, through torch.distributed.checkpoint.

Each rank writes its parts once; parts are boxes of whole tensors, so that any other division into boxes can be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from nnscaler.errors import UserError
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.shards import Box


@dataclass(frozen=True)
class Part:
    """A box of the whole tensor `name` of `shape`, and this rank's memory for it."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, self.box.offsets


def owned_state(optimizer: ShardedOptimizer) -> list[Part]:
    """The fp32 master weights (`model.<name>`) and moments (`exp_avg.<name>`, ...) that this rank owns."""
    parts = []
    for bucket, master, state in zip(optimizer.buckets, optimizer.masters, optimizer.state):
        for kind, flat in (("model", master), *state.items()):
            for part in bucket.owned_parts():
                tensor = flat[part.start : part.stop].view(part.box.sizes)
                parts.append(Part(f"{kind}.{part.name}", part.spec.shape, part.box, tensor))
    return parts


def save_parts(folder: Path, parts: list[Part]) -> None:
    """Writes all ranks' parts into a folder. Collective."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    with _quiet():
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(parts), no_dist=not dist.is_initialized())


def load_parts(folder: Path, parts: list[Part]) -> None:
    """Fills all ranks' parts from a folder, whatever the division in which it was written. Collective."""
    reader = dcp.FileSystemReader(folder)
    try:
        with _quiet():
            dcp.load({}, storage_reader=reader, planner=_LoadPlanner(parts), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
        raise UserError(f"checkpoint '{folder}' cannot be read: {reasons}") from error


def tensors_of(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The whole tensors that a checkpoint holds, by name."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, which is no mistake here."""
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
        self._parts = {part.key: part for part in parts}

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
