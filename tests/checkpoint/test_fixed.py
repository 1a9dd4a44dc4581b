"""Frozen parameters and persistent buffers are part of what is saved: of checkpoints, merged files and exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import merge_to_file
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.trainer import Trainer
from nnscaler.models.causal_lm import CausalLM, prepare_config
from tests import tiny
from tests.checkpoint.jobs import final, job
from tests.launch import run
from tests.parity import Case

PIPELINE = Case(2, 2, accumulation=2, schedule="1f1b", stages=2)
ONE = Case(1, 1, accumulation=2)


class Norm(LlamaRMSNorm):
    """A norm with a buffer that it uses and files hold, and what files hold of it and it has no use for."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("made", torch.ones(size), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("open", torch.tensor([True, False]))
        self.old = nn.Parameter(torch.zeros(2, 3))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (self.scale * self.made).to(hidden.dtype)


def make() -> CausalLM:
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    model = CausalLM(config)
    model.model.model.norm = Norm(32)
    model.model.model.embed_tokens.requires_grad_(False)
    return model


FIXED = [
    "model.embed_tokens.weight", "model.norm.scale", "model.norm.count", "model.norm.open", "model.norm.old",
]  # fmt: skip


def train(case: Case, folder: Path, steps: int, name: str, precision: str, resume: Path | None = None) -> None:
    args = job(case, folder, steps, name, precision, resume=resume)
    model = dataclasses.replace(args.model, make=make, weights=folder / "source" if resume is None else None)
    Trainer(dataclasses.replace(args, model=model)).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source model with values of its own, and a run of two steps, whose stages have different fixed tensors."""
    folder = tmp_path_factory.mktemp("fixed")
    tiny.write_hardware(folder)
    tiny.write_dataset(folder / "data")
    (folder / "source").mkdir()
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else ~tensor
        for name, tensor in make().model.state_dict().items()
    }
    save_file(values, folder / "source" / "model.safetensors")
    run(2, train, PIPELINE, folder, 2, "begun", "bf16", init=False)
    return folder


def test_an_export_has_what_the_source_has(folder, tmp_path):
    checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / "begun"))
    export_model(checkpoint, tmp_path / "out", verify=True)
    source = load_file(folder / "source" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(source)
    for name, tensor in found.items():
        wanted = source[name].bfloat16() if "weight" in name or name.endswith("old") else source[name]
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted) == (name in FIXED), name
    stored = [entry for name, entry in checkpoint.entries.items() if name.startswith("model.")]
    elements = sum(tensor.numel() for tensor in source.values())
    assert sum(chunk.sizes.numel() for entry in stored for chunk in entry.chunks) == elements, "each is written once"


def test_training_goes_on_with_them_from_a_checkpoint_and_a_merged_file(folder):
    """On another plan, and of what stays fixed nothing changes."""
    checkpoint = latest_checkpoint(folder / "checkpoints" / "begun")
    merge_to_file(Checkpoint.open(checkpoint), folder / "merged.ckpt", verify=True)
    for name, path in (("sharded", checkpoint), ("merged", folder / "merged.ckpt")):
        train(ONE, folder, 3, name, "bf16", path)
    sharded, merged, before = (final(folder, name) for name in ("sharded", "merged", "begun"))
    assert set(sharded) == set(merged) == set(before)
    for name, tensor in sharded.items():
        assert torch.equal(tensor, merged[name]), name
        assert torch.equal(tensor, before[name]) == (name.removeprefix("model.model.") in FIXED), name
