"""A tiny Llama, data for it, and hardware on which splitting pays whatever the size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import LlamaConfig

from nnscaler.hardware import Hardware, load_hardware

VOCABULARY = 96
LENGTH = 32


def config(**changes: object) -> LlamaConfig:
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, architectures=["LlamaForCausalLM"])


def write_model(folder: Path, **changes: object) -> Path:
    """A model directory with only config.json: its weights come from the seed."""
    config(**changes).save_pretrained(folder)
    return folder


def write_dataset(
    folder: Path,
    rows: int = 80,
    length: int = LENGTH,
    vocabulary: int = VOCABULARY,
    starts: list[list[int]] | None = None,
) -> np.ndarray:
    """Packed sequences with some structure to learn; returns them as [rows, length]. `starts`: of documents in each."""
    generator = np.random.default_rng(0)
    steps = generator.integers(1, 4, size=(rows, 1)) * np.arange(length)
    tokens = ((generator.integers(vocabulary, size=(rows, 1)) + steps) % vocabulary).astype(np.int32)
    columns = {"input_ids": tokens} | ({"document_starts": starts} if starts else {})
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return tokens


def write_hardware(folder: Path, name: str = "hardware.json", memory: float = 1e12, **changes: object) -> str:
    """A machine without latencies and with slow arithmetic, so that even tiny operators are worth splitting."""
    link = {"bandwidth": 1e12, "latency": 0.0}
    fields = {
        "name": "Test", "memory": memory, "memory_bandwidth": 1e11, "flops": {"float32": 1e9, "bfloat16": 1e9},
        "efficiency": {"default": 1.0}, "launch": 0.0, "devices_per_node": 8, "intra": link, "inter": link,
        "source": "made up for tests",
    }  # fmt: skip
    path = folder / name
    path.write_text(json.dumps({**fields, **changes}))
    return str(path)


def hardware(name: str) -> Hardware:
    """A bundled machine, whose libraries take no memory for themselves: they take more than a tiny model does."""
    return replace(load_hardware(name), workspaces=0.0)


def close(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative difference in norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
