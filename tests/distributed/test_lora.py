"""Adapters of peft, trained by a loop of the user's own on two processes, are those that plain peft trains."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nnscaler import ComputeConfig, OptimizerConfig, parallelize
from tests import tiny
from tests.launch import run
from tests.models.architectures import batch, config_of
from tests.test_parallel import update_plainly

SETTINGS = OptimizerConfig(lr=0.05, eps=1e-6)
STEPS = 4
TOLERANCE = 1e-5


class NextToken(nn.Module):
    """A language model with adapters, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = config_of("llama")
        config._attn_implementation, config.use_cache = "eager", False
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train(folder: str, plan: int) -> list[float]:
    """On each rank; rank 0 writes the adapters as peft does."""
    os.chdir(folder)
    module = NextToken()
    tokens, labels = batch(24)
    config = ComputeConfig(plan, 2, hardware=str(Path(folder, "hardware.json")))
    copies = 2 // plan
    example = tuple(x[: len(x) // copies] for x in (tokens, labels))
    model = parallelize(module, example, config, SETTINGS, folder=f"code{plan}")
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    before = {name: module.get_parameter(name).clone() for name in frozen}
    losses = []
    for _ in range(STEPS):
        parts = [x.chunk(copies)[model.copy] for x in (tokens, labels)]
        losses.append(model.step([tuple(parts)]).item())
        model.optimizer.step()
    weights = model.state_dict()
    if weights:
        module.load_state_dict(weights)
        assert all(torch.equal(module.get_parameter(name), before[name]) for name in frozen)
        module.model.save_pretrained(f"adapters{plan}")
    return losses


def plainly(folder: Path) -> list[float]:
    module = NextToken()
    trained = nn.ParameterList(parameter for parameter in module.parameters() if parameter.requires_grad)
    _, update = update_plainly(trained, SETTINGS)
    losses = []
    for _ in range(STEPS):
        loss = module(*batch(24))
        loss.backward()
        update()
        losses.append(loss.item())
    module.model.save_pretrained(folder)
    return losses


@pytest.mark.parametrize("plan", [1, 2])
def test_adapters_are_those_of_plain_peft(plan, tmp_path):
    tiny.write_hardware(tmp_path)
    losses = plainly(tmp_path / "plain")
    assert losses[-1] < losses[0] - 0.01
    for found in run(2, train, str(tmp_path), plan):
        assert found == pytest.approx(losses, rel=TOLERANCE)
    blocks = json.loads((tmp_path / f"code{plan}" / "plan.json").read_text())["blocks"].values()
    splits = {node["split"] for block in blocks for node in block["nodes"].values() if "linear" in node["op"]}
    assert (splits != {"-"}) == (plan > 1), "products are split over the devices of a copy"
    file = "adapter_model.safetensors"
    found, wanted = (load_file(tmp_path / folder / file) for folder in (f"adapters{plan}", "plain"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tiny.close(found[name], tensor) < TOLERANCE, name
    base = NextToken().model.unload()
    PeftModel.from_pretrained(base, tmp_path / f"adapters{plan}")  # which finds all that it needs
