"""Adapters of a mixture: of its linear layers, and of the weights of all its experts, as plain peft has them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from nnscaler.models.adapters import PREFIX, adapted_parts, name_in_model
from nnscaler.models.experts import divide_gates
from tests import tiny
from tests.cli.test_adapters import ROWS, _export, call, plainly
from tests.launch import run
from tests.models.architectures import config_of
from tests.models.test_parts import Experts

MODEL = {"decoder_sparse_step": 1, "mlp_only_layers": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all of a mixture was adapted, split over two devices."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config_of("qwen3_moe", **MODEL)).save_pretrained(folder / "model")
    tiny.write_dataset(folder / "data", rows=ROWS)
    tiny.write_hardware(folder)
    run(2, call, str(folder), "--name", "whole", "--plan_ngpus", "2", "--grad_accumulation_steps", "8", init=False)
    return folder


def test_experts_are_adapted_as_plain_peft_adapts_them(folder, tmp_path, monkeypatch):
    found, wanted = _export(folder, tmp_path, monkeypatch, "whole"), plainly(folder, None)
    assert any("experts" in name for name in wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tiny.close(found[name], tensor) < 1e-4, name
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    read = dict(PeftModel.from_pretrained(base, tmp_path / "whole").named_parameters())
    assert sum(".lora_" in name for name in read) == len(found), "nothing is left out"


def test_gates_of_adapted_experts_stay_as_they_are() -> None:
    plain, inner = Experts(), Experts()
    around = nn.ModuleDict({"base_layer": nn.ModuleDict({"base_layer": inner})})
    model = nn.ModuleList([plain, around])
    assert inner in adapted_parts(model)
    divide_gates(model)
    assert (plain.gate_up_proj.dim(), inner.gate_up_proj.dim()) == (4, 3)


def test_names_of_what_two_adapters_stand_around() -> None:
    name = functools.partial(name_in_model, prefix="model." + PREFIX)
    assert name(f"model.{PREFIX}mlp.experts.base_layer.base_layer.down_proj") == "mlp.experts.down_proj"
    assert name(f"model.{PREFIX}q_proj.base_layer.weight") == "q_proj.weight"
