"""Weights that are gathered in fp8 as the planner sees them: which these are, what they take and cost, by hand.

Four layers of three products on two devices. The machine does 1e9 operations a second in bf16, 2e9 in fp8, and moves
1e11 bytes a second in memory, 1e12 between devices.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnscaler.codegen import generate
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware, load_hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED, Shard
from nnscaler.plan import Key
from nnscaler.planner import find_plan, flows
from nnscaler.planner.costs import IN_FP8, STORED, CostModel
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.solve import solve
from nnscaler.recompute import KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL, Level
from nnscaler.report.categories import bytes_by_category
from nnscaler.report.parameters import parameter_groups
from tests import tiny
from tests.planner.test_fp8 import FP8, Gated, K, M, N, stack

TWO, LAYERS, BYTE, LINK = Mesh((2,)), 4, 1e-11, 1e-12
X, WEIGHT, Y = M // 2 * K, N * K, M // 2 * N  # elements of a device
PRODUCT = 2 * M // 2 * K * N / 2e9
SHARDED, GATHERED = (Shard(0),), (SHARED,)


class Weighed(Gated):
    """Its first product's weight is used by something else too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.einsum("mk,nk->mn", x, self.gate.weight).sum(-1, keepdim=True)


@pytest.fixture
def machine(tmp_path) -> Hardware:
    return load_hardware(tiny.write_hardware(tmp_path, flops=FP8))


def stated(graph: Graph, machine: Hardware, micro_batches: int = 1) -> Problem:
    return build_problem(graph, CostModel(machine, TWO), Recomputing(), micro_batches)


def priced(
    problem: Problem, level: Level = KEEPS_ALL, again: bool = False, stored: tuple = SHARDED, master_only: bool = False
) -> Price:
    """Rows are divided, and weights are stored as they are told."""
    chosen = []
    for decision in problem.decisions:
        if decision.kind == "parameter":
            wanted = [
                (option.outputs[0], option.master_only) == (stored, master_only and decision.block == "gated")
                for option in decision.options
            ]
        elif decision.block == "gated":
            wanted = [option.outputs[0] == (Shard(0),) for option in decision.options]
        else:
            wanted = [True]
        chosen.append(wanted.index(True))
    gathered = frozenset(i for i, flow in enumerate(problem.flows) if flow.is_parameter and flow.block == "gated")
    levels = {problem.root: {KEEPS_ALL: 1}, "gated": {level: LAYERS}}
    found = price(Program(problem), Solution(chosen, levels, gathered if again else frozenset()))
    assert found is not None
    return found


def of_gate(values: dict[Key, float], category: str) -> float:
    """Of one layer."""
    names = ("gate", "gate_weight")
    keys = [key for key in values if key.category == category and key.block == "gated" and key.name in names]
    return sum(values[key] for key in keys) / LAYERS


def test_a_product_rounds_no_weight_that_comes_in_fp8(machine):
    found = priced(stated(stack(Gated), machine))
    assert of_gate(found.seconds, "forward") == pytest.approx(PRODUCT + BYTE * 6 * X / 2)  # x, for gate and up
    assert of_gate(found.seconds, "backward") == pytest.approx(2 * PRODUCT + BYTE * (6 * Y + 2 * WEIGHT))
    assert of_gate(found.seconds, "cast") == pytest.approx(BYTE * (2 + 1) * WEIGHT / 2)
    whole = priced(stated(stack(Gated), machine), stored=GATHERED)
    assert of_gate(whole.seconds, "forward") == pytest.approx(PRODUCT + BYTE * (6 * X / 2 + 3 * WEIGHT))
    assert of_gate(whole.seconds, "backward") == pytest.approx(2 * PRODUCT + BYTE * (6 * Y + 3 * WEIGHT))
    assert of_gate(whole.seconds, "cast") == 0


def test_half_the_bytes_travel_and_are_kept_and_gradients_come_back_as_before(machine):
    found = priced(stated(stack(Gated), machine))
    assert of_gate(found.beside, "reshard") == pytest.approx(LINK * WEIGHT / 2)
    assert of_gate(found.beside, "reshard backward") == pytest.approx(LINK * 4 * WEIGHT / 2)
    assert found.memory[Key("saved", "gated", "gate_weight", KEEPS_ALL.name)] == LAYERS * WEIGHT


def test_what_is_computed_again_gathers_half_the_bytes(machine, monkeypatch):
    """All three weights of a layer, as long as its backward runs."""
    problem = stated(stack(Gated), machine)
    held = of_working(priced(problem, RECOMPUTES_ALL))
    monkeypatch.setattr(flows, "_only_in_fp8", lambda *given: False)
    assert of_working(priced(stated(stack(Gated), machine), RECOMPUTES_ALL)) - held == 3 * WEIGHT


def of_working(found: Price) -> float:
    return sum(size for key, size in found.memory.items() if key.category == "working")


@pytest.mark.parametrize("level", [KEEPS_PRODUCTS, RECOMPUTES_ALL], ids=str)
def test_what_is_gathered_again_is_rounded_again(level, machine):
    once = priced(stated(stack(Gated), machine))
    found = priced(stated(stack(Gated), machine), level, again=True)
    assert Key("saved", "gated", "gate_weight", level.name) not in found.memory
    times = 2 if level is RECOMPUTES_ALL else 1  # it says so itself, and so do we
    assert of_gate(found.beside, "reshard again") == pytest.approx(times * LINK * WEIGHT / 2)
    assert of_gate(found.seconds, "cast again") == pytest.approx(times * of_gate(once.seconds, "cast"))


def test_nor_does_a_product_that_runs_again(machine):
    found = priced(stated(stack(Gated), machine), RECOMPUTES_ALL)
    assert of_gate(found.seconds, "again") == pytest.approx(of_gate(found.seconds, "forward"))
    whole = priced(stated(stack(Gated), machine), RECOMPUTES_ALL, stored=GATHERED)
    assert of_gate(whole.seconds, "again") == pytest.approx(PRODUCT + BYTE * (6 * X / 2 + 3 * WEIGHT))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_master_is_cast_and_rounded_once_a_step_and_its_shard_is_kept(micro_batches, machine):
    found = priced(stated(stack(Gated), machine, micro_batches), RECOMPUTES_ALL, again=True, master_only=True)
    once = BYTE * ((4 + 2) + (2 + 1)) * WEIGHT / 2
    assert of_gate(found.seconds, "cast") == pytest.approx(once / micro_batches)
    assert of_gate(found.seconds, "cast again") == 0
    assert found.memory[Key("parameter", "gated", "gate_weight", IN_FP8)] == LAYERS * WEIGHT / 2
    each = priced(stated(stack(Gated), machine, micro_batches), RECOMPUTES_ALL, again=True)
    assert of_gate(each.seconds, "cast") == pytest.approx(BYTE * (2 + 1) * WEIGHT / 2)
    assert Key("parameter", "gated", "gate_weight", IN_FP8) not in each.memory


@pytest.mark.parametrize("micro_batches", [1, 16])
def test_what_is_proven_holds_of_masters_that_are_rounded_once_a_step_too(micro_batches, machine):
    """They save 0.028 % of sixteen micro-batches, and were left unsearched where memory is plenty."""
    graph = stack(Gated)
    plan = find_plan(graph, [TWO], machine, micro_batches=micro_batches)
    program = Program(stated(graph, machine, micro_batches))
    fastest = price(program, solve(program, 1e18, gap=0.0).solution).total_seconds * micro_batches
    assert plan.bound <= fastest * (1 + 1e-6)
    assert plan.bound == pytest.approx(fastest, rel=1e-4)


def test_a_report_counts_the_shards_that_are_kept(machine):
    graph, costs = stack(Gated), CostModel(machine, TWO)
    plan = find_plan(graph, [TWO], machine, micro_batches=8)
    assert not plan.master_only
    shards = 3 * LAYERS * WEIGHT / 2
    for block, tensor, path in graph.parameter_uses():
        if block.name == "gated":
            plan.master_only.add(path)
            plan.memory[Key("parameter", block.name, tensor, IN_FP8)] = LAYERS * WEIGHT / 2
            plan.memory[Key("parameter", block.name, tensor, STORED)] = LAYERS * 4 * WEIGHT / 2
            plan.memory.pop(Key("parameter", block.name, tensor, "master weights"), None)
    found = bytes_by_category(plan, parameter_groups(plan, costs))
    assert found[IN_FP8] == shards
    assert sum(found.values()) == pytest.approx(plan.memory_bytes)


@pytest.mark.parametrize("layer", [Gated, Weighed])
def test_not_what_something_else_takes_too(layer, machine):
    graph = stack(layer, rows=2 * M)
    plan = find_plan(graph, [TWO], machine)
    names = {"down_weight", "up_weight"} | ({"gate_weight"} if layer is Gated else set())
    block = graph.blocks[layer.__name__.lower()]
    assert plan.gathered_in_fp8 == {(block.name, name, GATHERED) for name in names}
    assert generate(plan).count("gathers.weight_in_fp8(") == len(names)
    said = plan.to_json()
    assert said["blocks"][block.name]["gathered_in_fp8"] == sorted(names)
    narrow = {path for path, one in said["parameters"].items() if one["gathered_in_fp8"]}
    assert narrow == {f"layers.{i}.{name.replace('_', '.')}" for i in range(LAYERS) for name in names}


def test_not_in_layers_that_stay_in_bf16_nor_outside_of_layers(machine):
    plan = find_plan(stack(Gated, ("first",)), [TWO], machine)
    assert {block for block, *_ in plan.gathered_in_fp8} == {"gated"}
    code = generate(plan)
    assert code.count("gathers.weight_in_fp8(") == 3
    assert code.count("gathers.weight(") == 3 + 1, "of the layer in bf16, and of the head"


def test_frozen_weights_are_gathered_as_they_are(machine):
    class Frozen(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.gate.weight.requires_grad_(False)

    plan = find_plan(stack(Frozen, rows=2 * M), [TWO], machine)
    assert {name for _, name, _ in plan.gathered_in_fp8} == {"down_weight", "up_weight"}


def test_what_is_spared_where_some_layers_run_again_is_as_the_program_says(tmp_path):
    """Launches make it much. Memory is short; the program counts layers, and its bound is that of what is priced."""
    machine = load_hardware(tiny.write_hardware(tmp_path, flops=FP8, launch=5e-5))
    graph = stack(Gated, rows=1024)
    free = find_plan(graph, [TWO], machine)
    short = find_plan(graph, [TWO], machine, memory=0.6 * free.memory_bytes)
    assert len(short.gathered_in_fp8) == 3
    assert len(short.levels["gated"]) > 1
    assert max(plan.gap for plan in (free, short)) < 2e-3
