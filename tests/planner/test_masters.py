"""A weight of which only the master weight is stored: what it takes and costs, against numbers worked out by hand.

Two products in bf16 on two devices: h = x @ first.T and y = h @ second.T. A device stores half of second's [512, 256].
The machine moves 1e9 bytes a second in memory, and launching an operator takes 1e-3 s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nnscaler.compiler import Source
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware, load_hardware
from nnscaler.hardware.spec import Host
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard
from nnscaler.plan import Plan
from nnscaler.planner import NothingFits, deferred, find_plan, on_host
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.solve import least_memory
from nnscaler.recompute import KEEPS_ALL
from nnscaler.trace import trace
from tests import tiny

ROWS, INNER, OUTER, MICRO_BATCHES = 64, 256, 512, 2
SHARD = INNER * OUTER // 2  # elements of second on a device
STATE = 12 * (INNER * INNER + INNER * OUTER) // 2  # bytes a device of masters and moments, as if each had a copy
MEMORY, LAUNCH = 1e9, 1e-3
TWO = Mesh((2,))


class TwoProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INNER, INNER, bias=False), nn.Linear(INNER, OUTER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).sum()


@pytest.fixture(scope="module")
def graph() -> Graph:
    inputs = {"x": torch.empty((ROWS, INNER), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(TwoProducts, inputs).build()
    return trace(model, inputs, buffers)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Hardware:
    folder = Path(tmp_path_factory.mktemp("machine"))
    hardware = load_hardware(tiny.write_hardware(folder, memory_bandwidth=MEMORY, launch=LAUNCH))
    return replace(hardware, host=Host(1e12, 1e12, 1e12, 1e12))


def stated(graph: Graph, machine: Hardware, mesh: Mesh = TWO, host: float = 0.0, sparing: bool = True) -> Problem:
    return build_problem(graph, CostModel(machine, mesh), Recomputing(), MICRO_BATCHES, host=host, sparing=sparing)


def priced(
    problem: Problem, master_only: bool, by_rows: bool = True, again: bool = False, state: int = 0
) -> Price | None:
    """With the rows of x divided, for which second is gathered; or with those of second, as it is stored."""
    rows = (Shard(0),) if by_rows else (REPLICATE,)
    first, second = ((SHARED,), (SHARED,)) if by_rows else ((REPLICATE,), (Shard(0),))
    result = (Shard(0),) if by_rows else (Shard(1),)
    wanted = {
        "first_weight": ((), ((SHARED,),), False),
        "second_weight": ((), ((Shard(0),),), master_only),
        "first": ((rows, first), (rows,), False),
        "second": ((rows if by_rows else (SHARED,), second), (result,), False),
        "sum_1": ((result,), ((PARTIAL,),), False),
    }
    chosen = []
    for decision in problem.decisions:
        options = [(option.inputs, option.outputs, option.master_only) for option in decision.options]
        chosen.append(options.index(wanted[decision.name]) if decision.kind in ("parameter", "unit") else 0)
    flows = frozenset(index for index, flow in enumerate(problem.flows) if flow.tensor == "second_weight" and again)
    levels = {block: {KEEPS_ALL: 1} for block in problem.levels}
    return price(Program(problem), Solution(chosen, levels, flows, state))


def total(values: dict, category: str) -> float:
    return sum(value for key, value in values.items() if key.category == category)


def of_second(found: Price) -> dict[str, float]:
    return {key.detail: size for key, size in found.memory.items() if key[0::2] == ("parameter", "second_weight")}


def test_bytes_and_seconds(graph, machine):
    problem = stated(graph, machine)
    copied, alone = priced(problem, False), priced(problem, True)
    assert copied is not None
    assert alone is not None
    state = {"gradients": 4 * SHARD, "moments": 8 * SHARD}
    assert of_second(copied) == {"parameters": 2 * SHARD, "master weights": 4 * SHARD, **state}
    assert of_second(alone) == {"parameters": 4 * SHARD, **state}
    assert copied.total_memory - alone.total_memory == 2 * SHARD
    # The master is read and the shard written: in forward, where it is gathered; or else once a step.
    once = (4 + 2) * SHARD / MEMORY
    assert total(copied.seconds, "cast") == 0
    assert total(alone.seconds, "cast") == pytest.approx(once + LAUNCH)
    assert total(copied.seconds, "update") - total(alone.seconds, "update") == pytest.approx(once / MICRO_BATCHES)
    assert alone.total_seconds - copied.total_seconds == pytest.approx(once + LAUNCH - once / MICRO_BATCHES)


def test_it_is_cast_for_each_gather(graph, machine):
    problem = stated(graph, machine)
    kept, again = priced(problem, True), priced(problem, True, again=True)
    each = 6 * SHARD / MEMORY + LAUNCH
    assert total(kept.seconds, "cast again") == 0
    assert total(again.seconds, "cast") == total(again.seconds, "cast again") == pytest.approx(each)
    assert total(priced(problem, False, again=True).seconds, "cast again") == 0


def test_what_is_used_as_it_is_stored_needs_the_copy(graph, machine):
    problem = stated(graph, machine)
    assert priced(problem, False, by_rows=False) is not None
    assert priced(problem, True, by_rows=False) is None


def test_its_master_stays_on_the_device(graph, machine):
    """Of the state, all but its master may lie on the host."""
    problem = stated(graph, machine, host=1e12)
    part = STATE / on_host.PARTS
    most = int((STATE - 4 * SHARD) / part)
    assert total(priced(problem, True, state=most).host, "state") == pytest.approx(most * part)
    assert priced(problem, True, state=most + 1) is None
    assert priced(problem, False, state=on_host.PARTS) is not None


@pytest.mark.parametrize("mesh", [TWO, Mesh((2,), 2), Mesh((1,), 1), Mesh((1,), 2)], ids=str)
def test_only_where_one_rank_owns_the_whole_shard(graph, machine, mesh):
    """Where there are copies of the model, each has the master of a part of its shard."""
    options = [option for decision in stated(graph, machine, mesh).decisions for option in decision.options]
    assert any(option.master_only for option in options) == (mesh == TWO)


def test_fp32_weights_are_their_masters_already(machine):
    inputs = {"x": torch.empty((ROWS, INNER), device="meta")}
    model, buffers = Source(TwoProducts, inputs, torch.float32).build()
    problem = stated(trace(model, inputs, buffers), machine)
    assert not any(option.master_only for decision in problem.decisions for option in decision.options)


def test_the_planner_takes_it_where_memory_is_short(graph, machine, monkeypatch):
    """Where it is not, casting in each micro-batch costs more than it saves in the update."""
    monkeypatch.setattr(stating, "PREFETCH_BYTES", 2**10)  # as small beside the model as beside a large one
    monkeypatch.setattr(deferred, "GRADIENT_BYTES", 0.01)  # likewise, of gradients that wait
    least = [
        price(program, least_memory(program)).total_memory
        for program in (Program(stated(graph, machine, sparing=sparing)) for sparing in (False, True))
    ]
    assert least[1] < 0.98 * least[0]

    def plan(memory: float, sparing: bool) -> Plan:
        return find_plan(graph, [TWO], machine, memory=memory, micro_batches=MICRO_BATCHES, sparing=sparing)

    assert not plan(2 * least[0], sparing=True).master_only
    assert plan(least[1] * 1.001, sparing=True).master_only == {"first.weight", "second.weight"}
    with pytest.raises(NothingFits):
        plan(least[1] * 1.001, sparing=False)
