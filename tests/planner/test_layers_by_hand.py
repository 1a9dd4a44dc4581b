"""What three equal layers cost at each recompute level, in bf16, against numbers worked out by hand.

A layer computes h = x @ a.T, s = silu(h), e = exp(s), m = e * p, y = m @ b.T; x is [64, 256], a [512, 256] and b
[256, 512]. All layers share p, which needs no gradient. Pointwise operators are not fused. The machine does 1e9
operations a second, and moves 1e9 bytes a second in memory and 1e6 between devices.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnscaler.compiler import Source
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.hardware.spec import Host
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Placement, Shard
from nnscaler.plan import Key
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Decision, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.solve import UNLIMITED, stated
from nnscaler.planner.statement import Account, Quantity
from nnscaler.recompute import (
    IN_GROUPS,
    KEEPS_ALL,
    KEEPS_PRODUCTS,
    RECOMPUTES_ALL,
    RECOMPUTES_ALL_BUT_ATTENTION,
    SAME_ON_HOST,
    Level,
)
from nnscaler.trace import trace
from tests.planner.test_by_hand import LINK, MEMORY, OPERATIONS, machine, total

__all__ = ["machine"]

ROWS, OUTER, INNER, LAYERS = 64, 256, 512, 3
X, H, W = 2 * ROWS * OUTER, 2 * ROWS * INNER, INNER * OUTER  # bytes of x or y; of h, s, e, p or m; elements of a or b
PRODUCT, BETWEEN = 2 * ROWS * OUTER * INNER / OPERATIONS, (2 + 2 + 3) * H / MEMORY


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, INNER, bias=False), nn.Linear(INNER, OUTER, bias=False)

    def forward(self, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.silu(self.a(x)).exp() * p)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, p)
        return x.sum()


@pytest.fixture(scope="module")
def graph() -> Graph:
    sizes = {"x": (ROWS, OUTER), "p": (ROWS, INNER)}
    inputs = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    model, buffers = Source(Layers, inputs).build()
    return trace(model, inputs, buffers)


ONE, TWO = Mesh((1,)), Mesh((2,))


def priced(
    graph: Graph, machine: Hardware, levels: dict[Level, int], mesh: Mesh = ONE, micro_batches: int = 2,
    once: bool = False, stored: Placement = SHARED, gathers_again: bool = False, alone: bool = False,
    state: int = 0, result: Placement | None = None, **given: object,
) -> Price:  # fmt: skip
    """With weights whole, and all that has rows divided by them where there are several devices.

    once           whether gradients are exchanged once a step
    stored         how weights are stored, which are used whole
    gathers_again  whether backward gathers them again
    alone          whether only master weights are stored
    state          parts of the optimizer's state on the host
    result         how a layer's result lies, where that is not as it is computed
    """
    found = priced_if_possible(graph, machine, levels, mesh, micro_batches, once, stored, gathers_again, alone, state,
                               result, **given)  # fmt: skip
    assert found is not None
    return found


def priced_if_possible(
    graph: Graph, machine: Hardware, levels: dict[Level, int], mesh: Mesh, micro_batches: int, once: bool,
    stored: Placement, gathers_again: bool, alone: bool, state: int, result: Placement | None, **given: object,
) -> Price | None:  # fmt: skip
    waiting, in_fp8 = given.pop("waiting", ()), given.pop("in_fp8", ())
    problem = build_problem(graph, CostModel(machine, mesh), Recomputing(), micro_batches, **{"groups": False, **given})
    problem.waiting = waiting
    problem.decisions = [_in_fp8(one) if one.name in in_fp8 else one for one in problem.decisions]
    rows = (Shard(0) if mesh.plan_ngpus > 1 else REPLICATE,)
    chosen = []
    for decision in problem.decisions:
        fitting = [
            index
            for index, option in enumerate(decision.options)
            if (decision.kind == "unit" and option.inputs[0] == rows and all(one in (rows, (REPLICATE,), (SHARED,))
                for one in option.inputs))
            or (decision.kind == "parameter" and option.outputs == ((stored,),) and option.exchanged_once == once
                and option.master_only == alone)
            or (decision.kind in ("input", "output") and option.outputs[0] in (rows, (REPLICATE,)))
        ]  # fmt: skip
        lies = (result,) if result is not None and decision.kind == "output" else rows
        prefers = [index for index in fitting if decision.options[index].outputs[0] == lies]
        chosen.append((prefers if decision.kind in ("input", "output") and prefers else fitting)[0])
    (block,) = graph.blocks
    again = frozenset(i for i, flow in enumerate(problem.flows) if flow.is_parameter and gathers_again)
    return price(Program(problem), Solution(chosen, {graph.root.name: {KEEPS_ALL: 1}, block: levels}, again, state))


def _in_fp8(decision: Decision) -> Decision:
    ways = [tuple((name, replace(way, in_fp8=True)) for name, way in option.ways) for option in decision.options]
    return replace(decision, options=tuple(replace(option, ways=own) for option, own in zip(decision.options, ways)))


# Level -> bytes that a layer keeps beside p, seconds of what it does again.
LEVELS = {
    KEEPS_ALL: (X + H + H, 0.0),
    KEEPS_PRODUCTS: (X + H, BETWEEN),
    RECOMPUTES_ALL_BUT_ATTENTION: (X, PRODUCT + BETWEEN),
    RECOMPUTES_ALL: (X, PRODUCT + BETWEEN),
}


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_each_level_by_hand(graph, machine, level):
    """Of two layers; a third one keeps everything. What is shared is kept once."""
    kept, again = LEVELS[level]
    everything, _ = LEVELS[KEEPS_ALL]
    found = priced(graph, machine, {level: 2, KEEPS_ALL: 1} if level is not KEEPS_ALL else {level: 3})
    assert total(found.memory, "saved") == pytest.approx(2 * kept + everything + H)
    assert total(found.seconds, "again") == pytest.approx(2 * again)
    assert total(found.seconds, "forward") == pytest.approx(3 * (2 * PRODUCT + BETWEEN) + (X + 2) / MEMORY)
    # Products: for both factors. What others move in forward, and a gradient that they write.
    backward = 3 * (4 * PRODUCT + (3 + 3 + 4) * H / MEMORY) + (X + 2) / MEMORY
    assert total(found.seconds, "backward") == pytest.approx(backward, rel=1e-3)
    in_flight = priced(graph, machine, {level: 3}, in_flight=4)
    assert total(in_flight.memory, "saved") == pytest.approx(4 * (3 * kept + H))
    inside = 1 if level is KEEPS_ALL else 0  # what exp gives, which it reads itself, is no flow
    assert total(found.memory, "inside") == (2 * inside + 1) * H
    assert total(in_flight.memory, "inside") == 4 * 3 * inside * H


def test_parameters_of_all_layers_count(graph, machine):
    found = priced(graph, machine, {KEEPS_ALL: 3})
    for what, size in (("parameters", 2), ("gradients", 4), ("master weights", 4), ("moments", 8)):
        assert total(found.memory, "parameter", what) == 3 * 2 * W * size, what
    one, two = (total(priced(graph, machine, {KEEPS_ALL: 3}, micro_batches=n).seconds, "update") for n in (2, 4))
    # Of 46 bytes an element once a step; and of those that copy and add up each micro-batch's gradient.
    assert one == pytest.approx(6 * W * (46 / 2 + 6 + 4 / 2) / MEMORY)
    assert two == pytest.approx(6 * W * (46 / 4 + 6 + 4 * 3 / 4) / MEMORY)


@pytest.mark.parametrize("once", [False, True])
def test_gradients_of_all_layers_are_exchanged(graph, machine, once):
    """Six weights in fp32 between two devices; once a step is half as often as in each of two micro-batches."""
    found = priced(graph, machine, {KEEPS_ALL: 3}, TWO, once=once)
    each, part = 6 * 4 * W / 2 / LINK, 1 / 2 if once else 1
    assert total(found.beside, "exchange") == pytest.approx(each * part, rel=1e-3)
    assert total(found.memory, "saved") == pytest.approx((3 * (X + 2 * H) + H) / 2)
    assert total(found.memory, "parameter", "gradients") == 6 * W * 4 / (1 if once else 2)
    # Computation that loses a half of the time of what runs beside it hides no more than half of its own.
    computing = total(found.seconds, "backward")
    longer = priced(graph, replace(machine, interference=0.5), {KEEPS_ALL: 3}, TWO, once=once)
    wanted = max(each / 2, each - computing / 2) * part
    assert longer.seconds[Key("exchange", "", "backward")] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("level", "gathers_again", "times"), [
    (KEEPS_ALL, False, 0), (KEEPS_ALL, True, 1), (RECOMPUTES_ALL_BUT_ATTENTION, True, 1), (RECOMPUTES_ALL, False, 1),
])  # fmt: skip
def test_gathered_weights_by_hand(graph, machine, level, gathers_again, times):
    """Six weights of which each of two devices has a half: gathered in bf16, beside what is computed; gradients come
    back in fp32. What backward needs of them is kept whole, or gathered again."""
    found = priced(graph, machine, {level: 3}, TWO, stored=Shard(0), gathers_again=gathers_again)
    sent = 6 * W / 2 / LINK
    for category, seconds in (
        ("reshard", 2 * sent),
        ("reshard backward", 4 * sent),
        ("reshard again", times * 2 * sent),
    ):
        assert total(found.beside, category) == pytest.approx(seconds, rel=1e-6, abs=1e-12), category
        assert not any(key.category == category and key.name in "ab" for key in found.seconds)
    assert total(found.beside, "exchange") == 0, "each device owns its half"
    kept, _ = LEVELS[level]
    assert total(found.memory, "saved") == pytest.approx((3 * kept + H) / 2 + (0 if times else 6 * 2 * W))
    assert found.memory[Key("buffers", "", "gathered early")] == 6 * 2 * W
    for what, size in (("parameters", 2), ("gradients", 4), ("master weights", 4), ("moments", 8)):
        assert total(found.memory, "parameter", what) == 6 * W * size / 2, what
    forward, backward = (total(found.seconds, side) for side in ("forward", "backward"))
    again = total(found.seconds, "again")
    assert found.seconds[Key("exchange", "", "forward")] == pytest.approx(2 * sent - forward)
    assert found.seconds[Key("exchange", "", "backward")] == pytest.approx((4 + 2 * times) * sent - backward)
    assert again == pytest.approx(3 * LEVELS[level][1] / 2)


def test_what_nobody_uses_gathered_is_not_gathered_again(graph, machine):
    """However much a solver would like it: what is gathered again counts as not kept."""
    program = Program(build_problem(graph, CostModel(machine, TWO), Recomputing(), 1))
    milp, gathered = stated(program, UNLIMITED), program.flows.gathered
    for index, _, target in gathered:
        uses = [program.flows.layouts(use, "inputs") for use in program.problem.flows[index].consumers]
        milp.row([term for layouts in uses for term in layouts[target]], upper=0.0)
    milp.minimise([(g, -1.0) for g in gathered.values()], Quantity.NUMBER)
    answer = milp.solve(0.0)
    assert gathered
    assert [round(answer.values[g]) for g in gathered.values()] == [0] * len(gathered)


@pytest.mark.parametrize(("level", "gathers_again", "times"), [
    (KEEPS_ALL, False, 0), (KEEPS_ALL, True, 1), (RECOMPUTES_ALL_BUT_ATTENTION, True, 1), (RECOMPUTES_ALL, False, 1),
])  # fmt: skip
def test_masters_of_all_layers_are_cast_for_each_gather(graph, machine, level, gathers_again, times):
    """Six halves of weights: read in fp32, written in bf16."""
    found = priced(graph, machine, {level: 3}, TWO, stored=Shard(0), gathers_again=gathers_again, alone=True)
    each = 6 * W / 2 * (4 + 2) / MEMORY
    assert total(found.seconds, "cast") == pytest.approx(each)
    assert total(found.seconds, "cast again") == pytest.approx(times * each)
    for what, size in (("parameters", 4), ("gradients", 4), ("master weights", 0), ("moments", 8)):
        assert total(found.memory, "parameter", what) == 6 * W * size / 2, what


def test_of_the_state_all_but_the_masters_of_all_layers_may_lie_on_the_host(graph, machine):
    """Eight of twelve bytes an element: 42 of 64 parts, where the masters are the weights themselves."""
    host = replace(machine, host=Host(memory=1e12, to_host=1e9, to_device=1e9, both_ways=1e9))
    for alone, most in ((True, 42), (False, 64)):
        possible = [
            priced_if_possible(
                graph, host, {KEEPS_ALL: 3}, TWO, 2, False, Shard(0), False, alone, state, None, host=1e12
            )
            for state in (most, most + 1)
        ]
        assert [found is not None for found in possible] == [True, False], alone


def test_what_lies_on_the_host_by_hand(graph, machine):
    """Two layers keep there, one on the device, and what all share too. Copies are at each way's rate."""
    host = Host(memory=1e12, to_host=1e8, to_device=5e7, both_ways=1e7)
    level = SAME_ON_HOST[KEEPS_ALL]
    kept, _ = LEVELS[KEEPS_ALL]
    found = priced(graph, replace(machine, host=host), {level: 2, KEEPS_ALL: 1}, host=1e12)
    assert (total(found.host, "saved"), total(found.host, "inside")) == (2 * kept, 2 * H)
    assert total(found.memory, "saved") == pytest.approx(kept + H)
    assert total(found.memory, "inside") == H
    working = Key("working", "", "")
    alone = priced(graph, machine, {KEEPS_ALL: 3}).memory[working]
    kept += H  # with what a region keeps inside
    # What two calls keep is on its way; what the third kept is free.
    assert found.memory[working] == alone + 2 * kept - kept
    assert sum(found.copies.values()) == pytest.approx(2 * kept * (1 / 1e8 + 1 / 5e7))
    # Beside what these two calls compute: the first forward and the second backward hide what they can.
    forward, backward = 2 * (2 * PRODUCT + BETWEEN), 2 * (4 * PRODUCT + 10 * H / MEMORY)
    slow = replace(host, to_host=1e6, to_device=5e5)
    found = priced(graph, replace(machine, host=slow), {level: 2, KEEPS_ALL: 1}, host=1e12)
    assert found.seconds[Key("copies", "", "forward")] == pytest.approx(2 * kept / 1e6 - forward)
    assert found.seconds[Key("copies", "", "backward")] == pytest.approx(2 * kept / 5e5 - backward)


def test_what_is_computed_again_is_not_sent(graph, machine):
    """Two layers keep their inputs alone there. What exp gives inside a layer is made again."""
    host = Host(memory=1e12, to_host=1e8, to_device=5e7, both_ways=1e7)
    levels = {SAME_ON_HOST[RECOMPUTES_ALL]: 2, KEEPS_ALL: 1}
    found = priced(graph, replace(machine, host=host), levels, host=1e12)
    assert (total(found.host, "saved"), total(found.host, "inside")) == (2 * X, 0)
    assert sum(found.copies.values()) == pytest.approx(2 * X * (1 / 1e8 + 1 / 5e7))


@pytest.mark.parametrize("result", [None, REPLICATE], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_calls_of_a_group_take_what_the_one_before_makes_as_it_lies(graph, machine, result, size):
    """In halves of rows. Gathered, each half would come to the next layer by a slice, which no group does."""
    (level,) = (one for one in (RECOMPUTES_ALL, *IN_GROUPS) if one.of_each is RECOMPUTES_ALL and one.size == size)
    levels = {level: 2, KEEPS_ALL: 1}
    found = priced_if_possible(graph, machine, levels, TWO, 2, False, SHARED, False, False, 0, result, groups=True)
    assert (found is None) == (size == 2 and result is not None)


def test_workspaces_are_there_all_the_time(graph, machine):
    with_some = priced(graph, replace(machine, workspaces=12345.0), {KEEPS_ALL: 3})
    assert with_some.memory[Key("working", "", "workspaces")] == 12345.0
    assert with_some.total_memory == priced(graph, machine, {KEEPS_ALL: 3}).total_memory + 12345.0


def test_what_all_weights_take_together(graph, machine):
    """Six weights on two copies of two devices, in one bucket: their state, gradients, and what comes from the host."""
    costs = CostModel(machine, Mesh((2,), 2))
    problem = build_problem(graph, costs, Recomputing(), 3, in_flight=2, host=5.0)
    assert problem.optimizer_state == 6 * W * (4 + 8) / 4
    assert problem.staging == 3 * 6 * W * (4 + 8) / 2
    assert problem.gradients == 6 * W * 4 / 4
    assert problem.slots == 6 * W * 4 / 2
    assert problem.exchange_buffers == 6 * W * 4 * (1 + 1 / 4)
    assert problem.gathered_early == 6 * W * 2
    assert (problem.micro_batches, problem.in_flight, problem.host) == (3, 2, 5.0)
    assert sorted(problem.calls.values()) == [1, LAYERS]


def test_all_that_is_charged_is_minimised_or_limited(graph, machine):
    """Whatever the values of the variables are: time by the objective, memory by the last two rows."""
    host = Host(memory=1e12, to_host=1e9, to_device=1e9, both_ways=1e9)
    program = Program(build_problem(graph, CostModel(replace(machine, host=host), TWO), Recomputing(), 3, host=1e12))
    milp, generator = stated(program, 1e9), random.Random(0)
    values = [generator.random() for _ in milp.bound]
    scaled = [value / unit for value, unit in zip(values, milp.units)]

    def last(row: int) -> float:
        begin, end = milp.starts[row - 1], milp.starts[row]
        pairs = zip(milp.columns[begin:end], milp.factors[begin:end])
        return milp.scale[Quantity.BYTES] * sum(scaled[column] * factor for column, factor in pairs)

    time = milp.scale[Quantity.SECONDS] * sum(cost * value for cost, value in zip(milp.cost, scaled))
    found = {Account.TIME: time, Account.DEVICE: last(-2), Account.HOST: last(-1)}
    for account, total_found in found.items():
        priced = program.statement.prices(values, {account: 1.0})
        assert total_found == pytest.approx(sum(priced.values())), account
    kinds = {charge.key.category for charge in program.statement.accounts[Account.DEVICE]}
    assert kinds >= {"parameter", "saved", "inside", "working", "buffers", "state", "gradients"}
