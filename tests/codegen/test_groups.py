"""Groups of layers in generated code: they hold only layers that are alike and follow one another."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, Source, compile_model, planner, planning
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, RECOMPUTES_ALL, SAME_ON_HOST, Level
from nnscaler.trace import trace
from tests import tiny
from tests.codegen.plain import beside_plain

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
SIZES = {level.size: level for level in IN_GROUPS if level.inner is RECOMPUTES_ALL}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * first


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Mixed(nn.Module):
    """Chains of three and of five wide layers, with a narrow one between them, and one after."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [Wide] * 3 + [Narrow] + [Wide] * 5 + [Narrow]
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        first = x.sigmoid()
        for layer in self.layers:
            x = layer(x, first) if isinstance(layer, Wide) else layer(x)
        return x.square().sum()


class Backwards(Mixed):
    """The last layer runs first."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.sigmoid()
        for layer in reversed(self.layers):
            x = layer(x, first) if isinstance(layer, Wide) else layer(x)
        return x.square().sum()


@pytest.mark.parametrize("groups", [True, False])
def test_what_the_last_call_on_the_host_keeps_is_free_after_one_more_call(groups, tmp_path):
    def find_plan(*args, **kwargs):
        plan = planner.find_plan(*args, **kwargs)
        away = SAME_ON_HOST[SIZES[2]] if groups else SAME_ON_HOST[RECOMPUTES_ALL]
        plan.levels["wide"] = {away: 2, RECOMPUTES_ALL: 3, KEEPS_ALL: 3}
        return plan

    with patch.object(planning, "find_plan", find_plan):
        config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))
        compile_model(Source(Mixed, {"x": X}, torch.float32), config, tmp_path / "code")
    lines = (tmp_path / "code" / "gencode_stage0.py").read_text().splitlines()
    (freed,) = [place for place, line in enumerate(lines) if "free_sent" in line]
    keeping = next(place for place, line in enumerate(lines) if "host.keeping" in line)
    between = [line for line in lines[keeping + 1 : freed] if "(scope" in line or "recompute(" in line]
    assert '"recomputes all"' in between[-1]
    _, losses, gradients = beside_plain(tmp_path / "code", Mixed, X)
    assert torch.equal(*losses)
    assert all(torch.equal(mine, wanted) for _, mine, wanted in gradients)


def levels(fours: int, twos: int) -> dict[Level, int]:
    """Of eight wide layers, how many are in groups of four, and of two."""
    found = {SIZES[4]: fours, SIZES[2]: twos, KEEPS_ALL: 8 - fours - twos}
    return {level: calls for level, calls in found.items() if calls}


def test_groups_keep_to_the_chains_of_a_stack():
    """Six of the eight wide layers can be in groups of two, and four of them in one of four."""
    source = Source(Mixed, {"x": X}, torch.float32)
    model, buffers = source.build()
    graph = trace(model, source.inputs, buffers)
    problem = build_problem(graph, CostModel(load_hardware("h100"), Mesh((1,))), Recomputing(), 1)
    assert [(stack.block, stack.lengths) for stack in problem.stacks] == [("wide", (3, 5))]
    program = Program(problem)

    def possible(fours: int, twos: int) -> bool:
        of = {block: {KEEPS_ALL: calls} for block, calls in problem.calls.items()} | {"wide": levels(fours, twos)}
        return price(program, Solution([0] * len(problem.decisions), of)) is not None

    found = {(fours, twos) for fours in range(9) for twos in range(9 - fours) if possible(fours, twos)}
    assert found == {(0, 0), (0, 2), (0, 4), (0, 6), (4, 0), (4, 2)}


@pytest.mark.parametrize("make", [Mixed, Backwards])
@pytest.mark.parametrize("counts", [(4, 2), (0, 6), (4, 0)])
def test_groups_give_the_plain_gradients(make, counts, tmp_path):
    def find_plan(*args, **kwargs):
        plan = planner.find_plan(*args, **kwargs)
        plan.levels["wide"] = levels(*counts)
        return plan

    with patch.object(planning, "find_plan", find_plan):
        config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))
        compile_model(Source(make, {"x": X}, torch.float32), config, tmp_path / "code")
    _, losses, gradients = beside_plain(tmp_path / "code", make, X)
    assert torch.equal(*losses)
    for name, mine, wanted in gradients:
        assert torch.equal(mine, wanted), name
