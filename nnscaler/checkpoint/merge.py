"""Sharded checkpoint -> one file, or a Hugging Face model directory; a tensor at a time, so that memory stays small."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from nnscaler.checkpoint.folder import ASSETS, TrainerState
from nnscaler.checkpoint.sharded import Part, load_parts, tensors_of
from nnscaler.errors import UserError
from nnscaler.runtime.shards import Box

SHARD_BYTES = 5 * 10**9  # of an exported model's safetensors files
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_WRITE_BYTES = 2**28


@dataclass(frozen=True)
class Checkpoint:
    """A complete sharded checkpoint, whose whole tensors can be read one by one."""

    folder: Path
    state: TrainerState

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Raises UserError where it is incomplete."""
        state = TrainerState.read(folder)
        missing = [name for name in _files(folder) if not (folder / name).exists()]
        if missing:
            raise UserError(f"checkpoint '{folder}' is incomplete: it has no {', '.join(sorted(missing))}")
        return Checkpoint(folder, state)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Kind and name of each tensor (`model.<name>`, `exp_avg.<name>`, ...) -> its shape. All are fp32."""
        return {name: tuple(entry.size) for name, entry in sorted(tensors_of(self.folder).items())}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor, on the CPU."""
        tensor = torch.empty(shape, dtype=torch.float32)
        load_parts(self.folder, [Part(name, shape, Box((0,) * len(shape), shape), tensor)])
        return tensor

    def dtype(self, parameter: str) -> torch.dtype:
        """The type in which training computes with a parameter."""
        return getattr(torch, self.state.parameters[parameter]["dtype"])


def _files(folder: Path) -> set[str]:
    """Names of the files that a checkpoint's index refers to."""
    import torch.distributed.checkpoint as dcp

    storage: dict[Any, Any] = dcp.FileSystemReader(folder).read_metadata().storage_data or {}
    return {entry.relative_path for entry in storage.values()}


def merge_to_file(checkpoint: Checkpoint, output: Path) -> None:
    """Writes `{"model": ..., "optimizer": {"exp_avg": ..., ...}, "trainer": ...}`, all tensors whole and in fp32.

    `torch.load` reads the file. It appears whole or not at all.
    """
    shapes = checkpoint.shapes()
    with FakeTensorMode():
        content = _nested({name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()})
    content["trainer"] = asdict(checkpoint.state)
    work = output.with_name(f".{output.name}.writing")
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, work)  # the file with room for every tensor
        with FakeTensorMode():
            placed = torch.load(work, weights_only=True)
        with open(work, "r+b") as file:
            for name, shape in _progress(shapes.items(), "merging"):
                file.seek(_find(placed, name).untyped_storage()._checkpoint_offset)
                _write(file, checkpoint.read(name, shape))
            file.flush()
            os.fsync(file.fileno())
        work.replace(output)
    finally:
        work.unlink(missing_ok=True)


def _nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    content: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, parameter = name.split(".", 1)
        place = content["model"] if kind == "model" else content["optimizer"].setdefault(kind, {})
        place[parameter] = tensor
    return content


def _find(content: dict[str, Any], name: str) -> Any:
    kind, parameter = name.split(".", 1)
    return content["model"][parameter] if kind == "model" else content["optimizer"][kind][parameter]


def _write(file: BinaryIO, tensor: Tensor) -> None:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _WRITE_BYTES):
        file.write(data[start : start + _WRITE_BYTES])


def _progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    yield from tqdm(list(items), desc=what, unit="tensor", leave=False)


def export_model(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes a directory that `transformers` loads: safetensors in the training's type, config.json and tokenizer.

    It appears whole or not at all. Raises UserError where it exists and is not empty, or the checkpoint was made from a
    model without configuration.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"output_dir is '{directory}', which is not empty")
    assets = next((p for p in (checkpoint.folder / ASSETS, checkpoint.folder.parent / ASSETS) if p.is_dir()), None)
    if assets is None:
        raise UserError(f"checkpoint '{checkpoint.folder}' has no folder '{ASSETS}' with the model's config.json")
    work = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(assets, work)
    try:
        _write_safetensors(checkpoint, work)
        if directory.exists():
            directory.rmdir()
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_safetensors(checkpoint: Checkpoint, directory: Path) -> None:
    """https://huggingface.co/docs/safetensors: header length, JSON header, data; written tensor by tensor."""
    shapes = {name.removeprefix("model."): s for name, s in checkpoint.shapes().items() if name.startswith("model.")}
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * checkpoint.dtype(name).itemsize
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    prefix = checkpoint.state.prefix
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = ["model.safetensors"] if len(shards) == 1 else files
    bar = tqdm(total=len(shapes), desc="exporting", unit="tensor", leave=False)
    for file_name, shard in zip(files, shards):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, size in shard.items():
            kind = _SAFETENSORS_TYPES[checkpoint.dtype(name)]
            exported = name.removeprefix(prefix)
            header[exported] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in shard:
                _write(file, checkpoint.read(f"model.{name}", shapes[name]).to(checkpoint.dtype(name)))
                bar.update()
            file.flush()
            os.fsync(file.fileno())
    bar.close()
    if len(shards) > 1:
        weight_map = {name.removeprefix(prefix): file for file, shard in zip(files, shards) for name in shard}
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
