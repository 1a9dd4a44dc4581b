"""With dropout on, losses and weights are those of the plain single-process loop under every plan: what is dropped does
not depend on how the work is divided, computed again, or interrupted."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnscaler
from nnscaler.recompute import ON_DEVICE, ON_HOST
from tests import tiny
from tests.checkpoint.jobs import assert_equal, final, losses, train
from tests.launch import run
from tests.parity import TOLERANCE, Case, plain_loops, train_all

KEPT, AGAIN = (tuple(level.name for level in levels) for levels in (ON_DEVICE[:2], ON_DEVICE[2:]))
AWAY = tuple(level.name for level in ON_HOST[2:])
SPLIT = Case(2, 2, accumulation=2, dropout=True)

CASES = {
    2: [
        Case(1, 2, accumulation=2, dropout=True),
        *(dataclasses.replace(SPLIT, levels=levels) for levels in (KEPT, AGAIN)),
        Case(2, 2, levels=(KEPT[1], AGAIN[0]), pieces=4, dropout=True, compiled=True),
        Case(2, 2, accumulation=4, layers=4, schedule="zb-v", stages=4, recompute=("LlamaDecoderLayer",), dropout=True),
        Case(2, 2, levels=AGAIN[1:] * 2, pieces=4, heads=2, dropout=True),
    ],
    4: [
        Case(4, 4, dropout=True),
        Case(2, 4, accumulation=2, layers=4, schedule="1f1b", stages=2, recompute=("LlamaDecoderLayer",), dropout=True),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dropout")


@pytest.fixture(scope="module")
def reference(folder):
    tiny.write_hardware(folder)
    return plain_loops(tiny.write_dataset(folder / "data"))


@pytest.mark.parametrize("world", CASES)
def test_every_plan_drops_the_same(world, folder, reference):
    run(world, train_all, CASES[world], folder, init=False)
    for case in CASES[world]:
        wanted, weights, _ = reference(case)
        assert losses(folder, case.name) == pytest.approx(wanted, rel=TOLERANCE), case.name
        found = final(folder, case.name)
        for name, weight in weights.items():
            assert tiny.close(found[f"model.{name}"], weight) < TOLERANCE, (case.name, name)
        without, *_ = reference(dataclasses.replace(case, dropout=False))
        assert max(abs(a - b) for a, b in zip(wanted, without)) > 0.001, "nothing was dropped"
    if world == 2:
        code = (folder / "code" / CASES[2][-1].name / "gencode_stage0.py").read_text()
        assert "= in_pieces(llama_decoder_layer_piece_0, 2, " in code, "some heads at a time"
        kept, again = (final(folder, dataclasses.replace(SPLIT, levels=levels).name) for levels in (KEPT, AGAIN))
        assert_equal(again, kept)
        plan = json.loads((folder / "code" / CASES[2][1].name / "plan.json").read_text())
        nodes = plan["blocks"]["llama_decoder_layer"]["nodes"].values()
        split = {node["op"]: node["split"] for node in nodes}
        assert "-" not in (split["attention"], split["nnscaler.dropout.default"])


def test_a_resumed_run_drops_what_an_unbroken_one_does(folder, reference):
    run(2, train, SPLIT, folder, 6, "straight", {"interval": 3, "keep": 0}, init=False)
    saved = folder / "checkpoints" / "straight" / "step_00000003"
    for name, case in (("same", SPLIT), ("alone", Case(1, 1, accumulation=2, dropout=True))):
        resume = {"resume": Path(shutil.copytree(saved, folder / "checkpoints" / name / saved.name))}
        run(case.runtime, train, case, folder, 6, name, resume, init=False)
    wanted = final(folder, "straight")
    assert_equal(final(folder, "same"), wanted)
    for name, tensor in final(folder, "alone").items():
        assert tiny.close(tensor, wanted[name]) < TOLERANCE or not wanted[name].any(), name


class Heads(nn.Module):
    """Attention and an MLP on three tokens, which divide among heads and hidden elements alone. One layer, called
    twice; it drops within heads, whole channels, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 32)
        layer = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q", "k", "v", "out", "up", "down")})
        self.layers = nn.ModuleList([Layer(layer)] * 2)
        self.last = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout1d(F.dropout(self.first(x), 0.1), 0.2)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).square().sum()


class Layer(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts
        self.drop, self.in_place = nn.Dropout(0.3), nn.Dropout(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.parts[name](x).unflatten(-1, (4, 8)).transpose(1, 2) for name in ("q", "k", "v"))
        weights = self.drop((q @ k.mT / 8).softmax(-1))
        x = x + self.parts["out"]((weights @ v).transpose(1, 2).flatten(2))
        return x + self.parts["down"](self.in_place(F.gelu(self.parts["up"](x))))


X = torch.randn(6, 1, 3, 5, generator=torch.Generator().manual_seed(0))


def train_heads(plan: int, folder: Path) -> tuple[list[float], dict[str, Any], str]:
    torch.manual_seed(0)
    config = nnscaler.ComputeConfig(plan, 2, micro_batches=plan, hardware=str(folder / "hardware.json"))
    optimizer = nnscaler.OptimizerConfig(lr=0.01, weight_decay=0.0, eps=1e-3)
    code = folder / f"heads{plan}"
    model = nnscaler.parallelize(Heads(), (X[0],), config, optimizer, seed=5, folder=code)
    found = []
    for step in range(3):
        mine = range(2 * step + model.copy, 2 * step + 2, model.copies)
        found.append(model.step([(X[i],) for i in mine]).item())
        model.optimizer.step()
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    return found, weights, (code / "graph.txt").read_text()


def test_a_module_of_the_users_own(folder, reference):
    torch.manual_seed(0)
    net, wanted = Heads(), []
    adamw = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-3)
    for step in range(3):
        total = 0.0
        for micro_batch in range(2):
            with nnscaler.same_dropout(net, 5, step, micro_batch):
                loss = net(X[2 * step + micro_batch]) / 2
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        wanted.append(total)
    for plan in (1, 2):
        (found, weights, graph), _ = run(2, train_heads, plan, folder, init=False)
        assert found == pytest.approx(wanted, rel=TOLERANCE)
        for name, weight in net.state_dict().items():
            assert tiny.close(torch.from_numpy(weights[name]), weight) < TOLERANCE, name
        assert graph.count("nnscaler.dropout.default(") == 6, "each call has a place of its own"
    code = (folder / "heads2" / "gencode_stage0.py").read_text()
    assert {"numbers_4_by_9_s0", "numbers_32_by_1_s0"} <= set(re.findall(r"numbers_\w+", code)), "heads and elements"
