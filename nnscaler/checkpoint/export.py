"""From a sharded checkpoint to a directory that transformers loads. Memory holds one tensor at a time."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nnscaler.checkpoint.checksums import CorruptCheckpoint, file_crc
from nnscaler.checkpoint.folder import ASSETS
from nnscaler.checkpoint.merge import forget_cached, progress, write_tensor
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.directory import sync, writing
from nnscaler.errors import UserError
from nnscaler.models import load_config
from nnscaler.models.adapters import CONFIG, FILE, PREFIX, is_adapter, name_in_file
from nnscaler.models.causal_lm import build
from nnscaler.models.conversion import to_files
from nnscaler.models.unread import Unread
from nnscaler.shards import Box
from nnscaler.trace import build_on_meta

SHARD_BYTES = 5 * 10**9  # of a safetensors file, at most, unless one tensor is larger
_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
_INDEX = "model.safetensors.index.json"

Shard = dict[str, Unread]


def export_model(checkpoint: Checkpoint, directory: Path, verify: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes safetensors in the training's type with their index, config.json and tokenizer. They hold all that the
    model's own files do, frozen parameters and buffers too. Of a model with adapters, these alone are written, as peft
    has them.

    verify  read everything again from the disk before the directory gets its name, and compare
    The directory appears whole or not at all. Raises UserError where it is not empty or cannot be written, or the
    checkpoint was made from a model without configuration; CorruptCheckpoint where the checkpoint is damaged, or what
    is read again differs.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"output_dir is '{directory}', which is not empty")
    assets = checkpoint.folder / ASSETS
    if not assets.is_dir():
        raise UserError(f"checkpoint '{checkpoint.folder}' has no folder '{ASSETS}' with the model's config.json")
    work = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with writing(directory):
            shutil.copytree(assets, work)
            if (assets / CONFIG).exists():
                shards = {FILE: _adapters(checkpoint)}
                for name in ("config.json", "generation_config.json"):  # which are the model's, not its adapters'
                    (work / name).unlink(missing_ok=True)
            else:
                shards = _shards(_tensors(checkpoint), shard_bytes)
            crcs = _write(work, shards)
            sync(work)
            if verify:
                _check(work, crcs)
            if directory.exists():
                directory.rmdir()
            work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _adapters(checkpoint: Checkpoint) -> Shard:
    """The adapters' tensors, with their names in peft's files."""
    stored = _stored(checkpoint, f"model.{checkpoint.state.prefix}".removesuffix(PREFIX))
    return {name_in_file(name): tensor for name, tensor in stored.items() if is_adapter(name)}


def _tensors(checkpoint: Checkpoint) -> Shard:
    """The model's tensors as its published files have them, with their names."""
    found = _stored(checkpoint, f"model.{checkpoint.state.prefix}")
    assets = checkpoint.folder / ASSETS
    if "model_type" not in json.loads((assets / "config.json").read_text(encoding="utf-8")):
        return found  # no model of transformers, which would have other names in its files
    model: Any = build_on_meta(lambda: build(load_config(str(assets))))[0]
    return to_files(found, model)


def _stored(checkpoint: Checkpoint, prefix: str) -> Shard:
    """The model's tensors, with their names after a prefix. Types are those of training."""
    last: dict[str, Tensor] = {}  # what was read last, whole, of which several tensors may be made

    def read(name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = checkpoint.read(name, shape)
        return last[name][box.slices]

    return {
        name.removeprefix(prefix): Unread(
            shape, checkpoint.dtype(name.removeprefix("model.")), partial(read, name, shape)
        )
        for name, shape in checkpoint.shapes().items()
        if name.startswith("model.")
    }


def _shards(tensors: Mapping[str, Unread], shard_bytes: int) -> dict[str, Shard]:
    """File -> its tensors."""
    shards: list[Shard] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(tensor) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _bytes(tensor: Unread) -> int:
    return tensor.shape.numel() * int(tensor.dtype.itemsize)


def _write(directory: Path, shards: Mapping[str, Shard]) -> dict[str, dict[str, int]]:
    """File -> tensor -> CRC-32 of its bytes."""
    written: dict[str, dict[str, int]] = {}
    total = sum(_bytes(tensor) for shard in shards.values() for tensor in shard.values())
    with progress(total, "exporting") as bar:
        for file_name, shard in shards.items():
            with open(directory / file_name, "wb") as file:
                file.write(_header(shard))
                written[file_name] = {
                    name: write_tensor(file, tensor.whole().contiguous(), tensor.dtype, bar)
                    for name, tensor in shard.items()
                }
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, crcs in written.items() for name in crcs}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=1))
    return written


def _header(shard: Shard) -> bytes:
    """https://huggingface.co/docs/safetensors: length of the JSON header, JSON header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shard.items():
        end = at + _bytes(tensor)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _check(directory: Path, written: dict[str, dict[str, int]]) -> None:
    """Raises CorruptCheckpoint for the first tensor that is not what was written."""
    for file_name, crcs in written.items():
        path = directory / file_name
        forget_cached(path)
        with safe_open(path, "pt") as opened:  # that the library can read it
            names = set(opened.keys())
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        for name, crc in crcs.items():
            begin, end = header[name]["data_offsets"] if name in names else (0, 0)
            if file_crc(path, 8 + length + begin, end - begin) != crc:
                raise CorruptCheckpoint(f"file '{file_name}' is damaged: tensor '{name}' is not what was written")
