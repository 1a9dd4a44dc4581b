"""From a sharded checkpoint to one file, from which training can continue. Memory holds one tensor at a time.

The file is made by `torch.save`: {"model": {name: tensor}, "optimizer": {"exp_avg": {name: tensor}, ...}, "trainer":
..., "checksums": int64 [tensors + 1]}. The tensors of the model and the optimizer are whole, and in fp32; frozen
parameters and buffers have the type that they have in training. The checksums are the CRC-32 of each tensor's bytes, in
the order of the names (`model.<name>`, `exp_avg.<name>`, ...), and then that of all other bytes of the file except the
checksums.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from nnscaler.checkpoint.checksums import CorruptCheckpoint, file_crc
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.sharded import Part
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.directory import writing
from nnscaler.errors import UserError

_CHECKSUMS = "checksums"
_STEP = 2**24  # elements converted and written at once


def merge_to_file(checkpoint: Checkpoint, output: Path, verify: bool = False) -> None:
    """Writes the file, which appears whole or not at all. It replaces another merged checkpoint, and nothing else.

    verify  read it again from the disk before it gets its name, and compare
    Raises CorruptCheckpoint where the checkpoint is damaged, or what is read again differs; UserError where the file
    cannot be written, or is there and is something else.
    """
    _check_replaceable(output)
    shapes = checkpoint.shapes()
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=checkpoint.stored_dtype(name)) for name, shape in shapes.items()}
        content = _nested(tensors)
        content[_CHECKSUMS] = torch.empty(len(shapes) + 1, dtype=torch.int64)
    content["trainer"] = asdict(checkpoint.state)
    work = output.with_name(f".{output.name}.writing")
    try:
        with writing(output):
            work.parent.mkdir(parents=True, exist_ok=True)
            # Through a file of Python's, whose errors say what the system says.
            with torch.serialization.skip_data(materialize_fake_tensors=True), open(work, "wb") as file:
                torch.save(content, file)  # the file with room for every tensor
            places = _Layout.read(work).places
            with open(work, "r+b") as file, progress(sum(t.nbytes for t in tensors.values()), "merging") as bar:
                crcs = []
                for name, shape in shapes.items():
                    file.seek(places[name].begin)
                    crcs.append(write_tensor(file, checkpoint.read(name, shape), tensors[name].dtype, bar))
                file.flush()
                crcs.append(_crc_without(work, list(places.values())))
                file.seek(places[_CHECKSUMS].begin)
                file.write(torch.tensor(crcs, dtype=torch.int64).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            if verify:
                forget_cached(work)
                MergedFile.open(work).check(list(shapes))
            work.replace(output)
    finally:
        work.unlink(missing_ok=True)


def _check_replaceable(output: Path) -> None:
    if not output.exists() or output.stat().st_size == 0:
        return
    try:
        MergedFile.open(output)
    except CorruptCheckpoint:
        pass  # it was one
    except UserError:
        raise UserError(
            f"'{output}' already exists and is not a merged checkpoint: remove it or choose another path"
        ) from None


def _nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    content: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, parameter = name.split(".", 1)
        place = content["model"] if kind == "model" else content["optimizer"].setdefault(kind, {})
        place[parameter] = tensor
    return content


def _flat(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by kind and name, in the order of the names."""
    tensors = {f"model.{name}": tensor for name, tensor in content["model"].items()}
    for kind, values in content["optimizer"].items():
        tensors.update({f"{kind}.{name}": tensor for name, tensor in values.items()})
    return dict(sorted(tensors.items()))


def progress(total: int, what: str) -> Any:
    """A bar that counts bytes."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False)


def write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype, bar: Any) -> int:
    """Writes a tensor's elements in `dtype`, converting a few at a time; returns the CRC-32 of the bytes."""
    crc = 0
    for elements in tensor.view(-1).split(_STEP):
        data = elements.to(dtype).view(torch.uint8).numpy().data
        crc = zlib.crc32(data, crc)
        file.write(data)
        bar.update(len(data))
    return crc


def forget_cached(path: Path) -> None:
    """Lets the next reading of a file, whose content is on disk, come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class _Place:
    begin: int
    length: int


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of a merged file are, in bytes; and the state of training that it holds."""

    places: dict[str, _Place]
    trainer: dict[str, Any]

    @staticmethod
    def read(path: Path) -> _Layout:
        with FakeTensorMode():
            content = torch.load(path, weights_only=True)
            tensors = {**_flat(content), _CHECKSUMS: content[_CHECKSUMS]}
            places = {
                name: _Place(tensor.untyped_storage()._checkpoint_offset, tensor.nbytes)
                for name, tensor in tensors.items()
            }
        return _Layout(places, content["trainer"])


def _crc_without(path: Path, places: list[_Place]) -> int:
    """CRC-32 of the bytes of a file outside of all places."""
    crc, at = 0, 0
    end = _Place(path.stat().st_size, 0)
    with path.open("rb") as file:
        for place in [*sorted(places, key=lambda place: place.begin), end]:
            file.seek(at)
            crc = zlib.crc32(file.read(max(0, place.begin - at)), crc)
            at = place.begin + place.length
    return crc


@dataclass(frozen=True)
class MergedFile:
    """What `merge_to_file` wrote."""

    path: Path
    state: TrainerState
    _places: dict[str, _Place]
    _crcs: dict[str, int]

    @staticmethod
    def open(path: Path) -> MergedFile:
        """Raises UserError for another file or one that is cut short, CorruptCheckpoint for a damaged index."""
        try:
            layout = _Layout.read(path)
            state = TrainerState(**layout.trainer)
        except Exception as error:  # torch.load raises whatever a damaged file makes it raise
            raise UserError(f"'{path}' is not a merged checkpoint, or is cut short or damaged") from error
        names = [name for name in layout.places if name != _CHECKSUMS]
        with path.open("rb") as file:
            file.seek(layout.places[_CHECKSUMS].begin)
            data = file.read(layout.places[_CHECKSUMS].length)
        crcs = torch.frombuffer(bytearray(data), dtype=torch.int64).tolist()
        if len(crcs) != len(names) + 1 or crcs[-1] != _crc_without(path, list(layout.places.values())):
            raise CorruptCheckpoint(f"merged checkpoint '{path}' is damaged: its index or its checksums have changed")
        return MergedFile(path, state, layout.places, dict(zip(names, crcs)))

    def check(self, names: list[str]) -> None:
        """Raises CorruptCheckpoint naming the first of some tensors that has changed."""
        for name in names:
            place = self._places[name]
            if file_crc(self.path, place.begin, place.length) != self._crcs[name]:
                raise CorruptCheckpoint(f"merged checkpoint '{self.path}' is damaged: tensor '{name}' has changed")

    def load(self, parts: list[Part]) -> None:
        """Fills all ranks' parts, each rank reading its own. Collective: the ranks check the tensors together.

        Raises, on every rank, CorruptCheckpoint where a tensor is damaged, UserError where one does not fit.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        damages: list[CorruptCheckpoint | None] = [None] * world
        try:
            self.check(list(self._crcs)[rank::world])
        except CorruptCheckpoint as damage:
            damages[rank] = damage
        if world > 1:
            dist.all_gather_object(damages, damages[rank])
        for found in filter(None, damages):
            raise found
        tensors = _flat(torch.load(self.path, mmap=True, weights_only=True, map_location="cpu"))
        for part in parts:
            tensor = tensors.get(part.name)
            if tensor is None or tuple(tensor.shape) != part.shape:
                stored = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                wanted = list(part.shape)
                raise UserError(f"'{self.path}' does not fit the model: {part.name} {stored}, the model's is {wanted}")
            part.tensor.copy_(tensor[part.box.slices])
