"""Reports say which weights are stored as master weights alone: their bytes, and what casting them costs; and where
gradients lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nnscaler.compiler import Source
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.plan import Key, Plan
from nnscaler.planner import deferred, find_plan
from nnscaler.planner import problem as stating
from nnscaler.report.comparison import compare
from nnscaler.report.page import plan_page
from nnscaler.report.text import explain
from nnscaler.report.values import plan_report
from nnscaler.trace import trace
from tests import tiny

WIDTH, LAYERS, ROWS, MICRO_BATCHES = 64, 8, 16, 3
MEMORY = 1e9  # bytes a second


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> tuple[Plan, Plan]:
    """With all the memory that it wants, and with little."""
    inputs = {"x": torch.empty((ROWS, WIDTH), dtype=torch.bfloat16, device="meta", requires_grad=True)}
    model, buffers = Source(Layers, inputs).build()
    graph = trace(model, inputs, buffers)
    machine = load_hardware(tiny.write_hardware(tmp_path_factory.mktemp("machine"), memory_bandwidth=MEMORY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stating, "PREFETCH_BYTES", 2**10)  # as small beside the model as beside a large one
        patch.setattr(deferred, "GRADIENT_BYTES", 0.01)  # likewise, of gradients that wait
        free = find_plan(graph, [Mesh((2,))], machine, micro_batches=MICRO_BATCHES)
        limit = 0.95 * free.memory_bytes
        return free, find_plan(graph, [Mesh((2,))], machine, memory=limit, micro_batches=MICRO_BATCHES)


def test_bytes_seconds_and_words(plans):
    free, tight = (plan_report(plan) for plan in plans)
    shards = LAYERS * WIDTH * WIDTH // 2  # elements
    for values, stored, master in ((free, 2, 4), (tight, 4, 0)):
        kinds = values["predicted"]["bytes_by_category"]
        assert kinds["parameters"] == stored * shards
        assert kinds["master weights"] == master * shards
        assert kinds["moments"] == 2 * kinds["gradients"] == 8 * shards
        assert sum(kinds.values()) == pytest.approx(values["predicted"]["memory_bytes"])
        seconds = values["predicted"]["seconds_by_category"]
        assert sum(seconds.values()) == pytest.approx(values["predicted"]["step_seconds"], rel=1e-5)
    casts = tight["predicted"]["seconds_by_category"]["casts of master weights"]
    assert casts == pytest.approx(MICRO_BATCHES * 2 * 6 * shards / MEMORY), "for forward, and for backward"
    assert "casts of master weights" not in free["predicted"]["seconds_by_category"]
    assert "; 1 of 1 weights stored in fp32 alone" in explain(tight)
    assert f"{casts * 1e6:.0f} µs of casting master weights" in explain(tight)
    assert "fp32" not in explain(free)
    said = "fp32: only the master weight is stored, and cast when it is gathered."
    assert [said in plan_page(values) for values in (free, tight)] == [False, True]
    assert "parameter layer.linear_weight: S(0)  |  S(0), fp32" in compare(free, tight)


def test_gradients_on_the_host_are_not_counted_on_the_device(plans):
    before, away = plan_report(plans[0])["predicted"]["bytes_by_category"], 1e4
    memory = {**plans[0].memory, Key("gradients", "", "on the host"): -away}
    plan = replace(plans[0], host={Key("gradients"): away}, memory=memory, host_limit=1e9)
    values = plan_report(plan)
    predicted = values["predicted"]
    assert predicted["bytes_by_category"]["gradients"] == pytest.approx(before["gradients"] - away, rel=1e-5)
    assert sum(predicted["bytes_by_category"].values()) == pytest.approx(plan.memory_bytes, rel=1e-5)
    assert predicted["host_bytes_by_category"] == {"gradients": away}
    assert values["gradients_on_host"] == away
    assert "Tables of parameters below count gradients" in plan_page(values)
