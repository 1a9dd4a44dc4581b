"""Which runs of operators can be computed in pieces follows from the annotations. What that costs, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnscaler import register_op
from nnscaler.compiler import Source
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.pieces import Stretch, stretches
from nnscaler.plan import Key
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL_BUT_ATTENTION
from nnscaler.trace import trace
from tests import tiny


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Summed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1).sum()


@register_op("b l^ d^ -> b l^ d^", name="test_mixes_rows")
def mixes_rows(x: Tensor) -> Tensor:
    return x.flip(1)


class Mixing(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(mixes_rows(super().forward(x)))


def stretches_of(model: type[nn.Module]) -> list[Stretch]:
    inputs = {"x": torch.empty((2, 64, 16), device="meta", requires_grad=True)}
    built, buffers = Source(model, inputs, torch.float32).build()
    return stretches(trace(built, inputs, buffers).root)


def test_rows_of_an_mlp_are_divided_and_its_weights_are_not():
    (run,) = stretches_of(Gated)
    assert run.ends_block
    assert {run.dims[name] for name in ("x", *run.outputs)} == {1}, "of sequences and rows, there are more rows"
    assert set(run.inputs) - set(run.dims) == {name for name in run.inputs if "weight" in name or "bias" in name}


def test_what_must_not_be_divided_is_not():
    assert not stretches_of(Summed), "each element of a cumulative sum hangs on all before, and a sum is of all pieces"


def test_registered_operators_are_between_runs():
    first, second = stretches_of(Mixing)
    assert not first.ends_block
    assert second.ends_block
    assert not set(first.units) & set(second.units)


ROWS, NARROW, WIDE = 2 * 64, 16, 48
MEMORY, ARITHMETIC, LAUNCH = 1e9, 1e9, 1e-5  # bytes and operations a second; seconds of an operator


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, WIDE, bias=False), nn.Linear(WIDE, NARROW, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NARROW, NARROW, bias=False)
        self.layers = nn.ModuleList(Plain() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.mark.parametrize("count", [4, 16])
def test_pieces_by_hand(count, tmp_path):
    inputs = {"x": torch.empty((2, 64, NARROW), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(Two, inputs).build()
    graph = trace(model, inputs, buffers)
    hardware = load_hardware(tiny.write_hardware(tmp_path, memory_bandwidth=MEMORY, launch=LAUNCH))
    problem = build_problem(graph, CostModel(hardware, Mesh((1,))), Recomputing(), 1)
    (stretch,) = problem.divisible
    levels = {graph.root.name: {KEEPS_ALL: 1}, stretch.block: {RECOMPUTES_ALL_BUT_ATTENTION: 2}}
    chosen = [0] * len(problem.decisions)  # on one device there is one way
    found = price(Program(problem), Solution(chosen, levels, pieces={(stretch.block, stretch.name): count}))
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE  # bytes, in bf16
    # Of few pieces, one of silu holds most: the gradients of what it reads and of what it writes. Of many, one of a
    # product does: its weight's is whole. Around them lie the gradients of the layer's input and output, and of each
    # weight a piece's in bf16 and the sum in fp32.
    own = 2 * wide / count if count == 4 else weight + (narrow + wide) / count
    around = 2 * narrow + 2 * (weight + 2 * weight)
    # Backward makes again what is on the way, a piece at a time; the input is kept.
    assert found.memory[Key("working")] == pytest.approx(own + around + 2 * wide / count)
    # The last product and the sum, whose results nobody needs, are computed again too, to have their gradients.
    product, added = 2 * ROWS * NARROW * WIDE / ARITHMETIC, 3 * narrow / MEMORY
    again = product + added + 2 * LAUNCH
    # Results are put together, and the input's gradient: a copy each. A weight's sum is written in fp32, read and
    # written by each piece after the first, and rounded to bf16.
    moved = 2 * narrow + 2 * narrow + 2 * weight * (1 + 2 * (2 * count - 1))
    launching = 3 * (count - 1) * 4 * LAUNCH  # of four operators, in forward, again, and backward
    seconds = 2 * (again + moved / MEMORY + launching)
    assert found.seconds[Key("again", stretch.block, stretch.name, "in pieces")] == pytest.approx(seconds)
