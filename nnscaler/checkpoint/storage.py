"""The files of torch.distributed.checkpoint, with a checksum for every piece of every tensor.

Who can write a checkpoint can also write its checksums: so these show damage, not who wrote it. But nothing that is
loaded can run code. The index, which is a pickle, may name only what an index consists of; and tensors are read by
torch's own loader for weights.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, EnumType
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint, Piece, file_crc
from nnscaler.directory import system_error
from nnscaler.shards import Box

INDEX = ".metadata"
_INDEX_TYPES: tuple[Any, ...] = (
    Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata, ChunkStorageMetadata, BytesStorageMetadata,
    TensorProperties, _MEM_FORMAT_ENCODING, _StorageInfo, torch.Size, PosixPath, PurePosixPath,
)  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class _CheckedResult(WriteResult):
    """What a rank reports of a piece that it wrote."""

    crc: int


class CheckedWriter(dcp.FileSystemWriter):
    """Writes one file for each rank into a folder. When all are written, rank 0 calls `complete` with their pieces.

    An error in `complete`, like one in any rank's writing, makes the whole save fail, on all ranks.
    """

    def __init__(self, folder: Path, complete: Callable[[list[Piece]], None]) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
        self._folder, self._complete = folder, complete

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written = super().write_data(plan, planner).wait()
        except RuntimeError as error:
            raise system_error(error) or error from error
        checked: list[WriteResult] = []
        for result in written:
            stored = result.storage_data
            crc = file_crc(self._folder / stored.relative_path, stored.offset, stored.length)  # from the page cache
            checked.append(_CheckedResult(result.index, result.size_in_bytes, stored, crc))
        future: Future[list[WriteResult]] = Future()
        future.set_result(checked)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        pieces = []
        for result in (result for of_rank in results for result in of_rank):
            assert isinstance(result, _CheckedResult)
            stored = result.storage_data
            pieces.append(Piece(result.crc, stored.offset, stored.length, stored.relative_path, _label(result.index)))
        self._complete(pieces)


class _IndexUnpickler(pickle.Unpickler):
    """Loads only the names that an index of tensors consists of. Raises UnpicklingError for any other."""

    def find_class(self, module: str, name: str) -> Any:
        known = {(kind.__module__, kind.__name__): kind for kind in _INDEX_TYPES}
        kind = known.get((module, name), _DTYPES.get(name) if module == "torch" else None)
        if (module, name) == ("torch.serialization", "_get_layout"):
            kind = _layout
        if (module, name) == ("builtins", "getattr"):
            kind = _member
        if kind is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return kind


def _member(kind: object, name: str) -> Enum:
    """A member of an enumeration by its name: Python 3.11.0 to 3.11.3, as Debian has it, writes members so."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it names {name} of {kind}, which no index does")
    return cast(Enum, kind.__members__[name])


def _layout(name: str) -> torch.layout:
    """As torch's own function of that purpose, for the only layout there is here."""
    if name != str(torch.strided):
        raise pickle.UnpicklingError(f"a tensor's layout is {name}")
    return torch.strided


def _label(index: MetadataIndex) -> str:
    return f"{index.fqn}[{', '.join(map(str, index.offset or ()))}]"


class CheckedReader(dcp.FileSystemReader):
    """Reads what CheckedWriter wrote, and checks every piece that it reads. Raises CorruptCheckpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder, self._checksums = folder, Checksums.read(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._checksums.check()
        try:
            index = _IndexUnpickler(io.BytesIO((self._folder / INDEX).read_bytes())).load()
            assert isinstance(index, Metadata)
            assert all(isinstance(stored, _StorageInfo) for stored in index.storage_data.values())
        except Exception as error:  # a pickle that was made up may raise anything
            raise CorruptCheckpoint(f"checkpoint '{self._folder}' is not loaded: file '{INDEX}': {error}") from error
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_piece: dict[MetadataIndex, list[Any]] = {}
        for item in plan.items:
            by_piece.setdefault(item.storage_index, []).append(item)
        for index, items in by_piece.items():
            piece = self.read_piece(self.storage_data[index])
            for item in items:
                wanted = Box(tuple(item.storage_offsets), tuple(item.lengths))
                target = planner.resolve_tensor(item)
                target.copy_(piece[wanted.slices])
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def read_piece(self, stored: Any) -> Tensor:
        """A piece of a tensor, from where the index says that it is."""
        try:
            with (self._folder / stored.relative_path).open("rb") as file:
                data = self._checksums.read_piece(file, stored.relative_path, stored.offset)
        except OSError as error:
            raise CorruptCheckpoint(
                f"checkpoint '{self._folder}' cannot be read: file '{stored.relative_path}': {error.strerror}"
            ) from error
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
