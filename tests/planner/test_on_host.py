"""What the host takes and costs, against numbers worked out by hand.

A block that is called three times has two operators: h = x @ w.T and silu(h), of [64, 256] in bf16; w is [256, 256].
The machine does 1e9 operations a second and moves 1e12 bytes a second in memory. Two of the calls keep on the host what
backward needs, and so does half of the optimizer's state.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nnscaler.compiler import Source
from nnscaler.hardware import Hardware, load_hardware
from nnscaler.hardware.spec import Host
from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.planner.costs import CostModel
from nnscaler.planner.on_host import PARTS
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.solve import least_memory
from nnscaler.recompute import KEEPS_ALL, ON_DEVICE, ON_HOST, RECOMPUTES_ALL, Level
from nnscaler.trace import trace
from tests import tiny

ROWS, WIDTH, CALLS, AWAY, MICRO_BATCHES = 64, 256, 3, 2, 2
OPERATIONS = 1e9  # a second
LOST = 0.25  # seconds of computing for a second of copies
TENSOR = 2 * ROWS * WIDTH  # bytes
STATE = CALLS * WIDTH * WIDTH * 12  # bytes: an fp32 master weight and two moments
GRADIENTS = CALLS * WIDTH * WIDTH * 4  # bytes
PRODUCT = 2 * ROWS * WIDTH * WIDTH / OPERATIONS  # seconds


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.linear(x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(CALLS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.fixture(scope="module")
def graph():
    inputs = {"x": torch.empty((ROWS, WIDTH), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(Layers, inputs).build()
    model.first.requires_grad_(False)
    model.layers.requires_grad_(True)
    return trace(model, inputs, buffers)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Hardware:
    return load_hardware(tiny.write_hardware(Path(tmp_path_factory.mktemp("machine")), memory_bandwidth=1e12))


def with_two_on_host(
    graph, machine: Hardware, host: Host, here: Level, state: int = PARTS // 2, gradients: int = 0
) -> Price:
    there = dict(zip(ON_DEVICE, ON_HOST))[here]
    costs = CostModel(replace(machine, host=host), Mesh((1,)))
    problem = build_problem(graph, costs, Recomputing(), MICRO_BATCHES, host=host.memory)
    chosen = [0] * len(problem.decisions)  # one device: options differ in when gradients are exchanged, with nobody
    levels = {block: {levels[0]: problem.calls[block]} for block, levels in problem.levels.items()}
    levels["layer"] = {there: AWAY, here: CALLS - AWAY}
    found = price(Program(problem), Solution(chosen, levels, state_on_host=state, gradients_on_host=gradients))
    assert found is not None
    return found


def total(values: dict, category: str, name: str = "") -> float:
    return sum(value for key, value in values.items() if key.category == category and name in ("", key.name))


@pytest.mark.parametrize("here", [KEEPS_ALL, RECOMPUTES_ALL])
def test_what_two_calls_keep(graph, machine, here):
    """One way copies are slow, so that computation waits for them; the other way they are hidden, and slow it down."""
    kept = AWAY * TENSOR * (2 if here is KEEPS_ALL else 1)  # x for the weight's gradient, h for silu's; or x
    forward, backward = AWAY * PRODUCT, AWAY * PRODUCT * (2 if here is KEEPS_ALL else 3)  # again, then for x and for w
    for sent, fetched in ((4 * forward, 0.5 * backward), (0.5 * forward, 4 * backward)):
        host = Host(1e12, kept / sent, kept / fetched, 1e30, LOST)
        found = with_two_on_host(graph, machine, host, here, state=0)
        assert total(found.copies, "copies") == pytest.approx(sent + fetched)
        for side, copies, computing in (("forward", sent, forward), ("backward", fetched, backward)):
            longer = max(LOST * copies, copies - (1 - LOST) * computing)
            assert total(found.seconds, "copies", side) == pytest.approx(longer, rel=0.01), side
    assert sum(found.host.values()) == kept
    assert total(found.memory, "saved") == kept / AWAY * (CALLS - AWAY)
    # Of two calls, one that is used and one that comes; what the call here kept is free by then. While the product runs
    # backward: its input, its result, and its weight; what came from the host is free later, what is here before.
    product, again = (2 * TENSOR + 2 * WIDTH * WIDTH, 0) if here is KEEPS_ALL else (TENSOR + 2 * WIDTH * WIDTH, TENSOR)
    assert total(found.memory, "working") == product + again + kept - kept / AWAY


def test_half_of_the_state(graph, machine):
    all_forward = (CALLS + 1) * PRODUCT
    for seconds in (3 * all_forward, 0.5 * all_forward):  # of copying it there, and back at the same time
        host = Host(1e12, 1e30, 1e30, STATE / 2 / seconds, LOST)
        found = with_two_on_host(graph, machine, host, KEEPS_ALL)
        longer = max(LOST * seconds, seconds - (1 - LOST) * all_forward) / MICRO_BATCHES
        assert total(found.seconds, "copies", "update") == pytest.approx(longer, rel=0.01), "once a step"
        without = with_two_on_host(graph, machine, host, KEEPS_ALL, state=0)
        beside = total(found.copies, "copies") - total(without.copies, "copies")
        assert beside == pytest.approx(seconds / MICRO_BATCHES), "there and back at the same time"
    assert total(found.host, "state") == pytest.approx(STATE / 2)
    assert total(found.memory, "state") == pytest.approx(-STATE / 2)
    places = total(found.memory, "buffers", "state")
    assert places == 3 * STATE, "for three buckets, of which this model fills one"
    assert not total(without.memory, "state")
    assert not total(without.memory, "buffers", "state")


@pytest.mark.parametrize("here", [KEEPS_ALL, RECOMPUTES_ALL])
def test_the_update_shares_the_link_with_what_the_next_forward_sends(graph, machine, here):
    """Both go to the host beside one forward, which hides less of the update then; what it waits for itself once."""
    forward = (CALLS + 1) * PRODUCT
    kept = AWAY * TENSOR * (2 if here is KEEPS_ALL else 1)
    for sent in (0.5 * forward, 3 * forward):
        host = Host(1e12, kept / sent, 1e30, STATE / 2 / forward, LOST)
        found = with_two_on_host(graph, machine, host, here)
        waited = max(LOST * sent, sent - (1 - LOST) * AWAY * PRODUCT)
        assert total(found.seconds, "copies", "forward") == pytest.approx(waited, rel=0.01)
        longer = forward + sent - waited - (1 - LOST) * forward
        assert total(found.seconds, "copies", "update") == pytest.approx(longer / MICRO_BATCHES, rel=0.01)


@pytest.mark.parametrize("here", [KEEPS_ALL, RECOMPUTES_ALL])
def test_half_of_the_gradients(graph, machine, here):
    """They go in each of two micro-batches, and come in the second, in which what two calls keep comes too."""
    forward, backward = (CALLS + 1) * PRODUCT, CALLS * PRODUCT * (2 if here is KEEPS_ALL else 3)
    kept = AWAY * TENSOR * (2 if here is KEEPS_ALL else 1)
    for seconds, back in ((3 * backward, 0.0), (0.5 * backward, 0.4 * backward), (0.5 * backward, 2 * backward)):
        host = Host(1e12, 1e30, kept / back if back else 1e30, GRADIENTS / 2 / seconds, LOST)
        found, without = (with_two_on_host(graph, machine, host, here, 0, parts) for parts in (PARTS // 2, 0))
        comes = max(LOST * back, back - (1 - LOST) * backward * AWAY / CALLS)
        assert total(without.seconds, "copies", "backward") == pytest.approx(comes, rel=0.01)
        first = max(LOST * seconds, seconds - (1 - LOST) * backward)
        second = max(LOST * seconds, seconds + back - comes - (1 - LOST) * backward)
        assert total(found.seconds, "copies", "gradients") == pytest.approx((first + second) / 2, rel=0.01)
        update = max(LOST * seconds, seconds - (1 - LOST) * forward) / MICRO_BATCHES
        assert total(found.seconds, "copies", "update") == pytest.approx(update, rel=0.01)
        beside = total(found.copies, "copies") - total(without.copies, "copies")
        assert beside == pytest.approx(seconds * (1 + 1 / MICRO_BATCHES)), "in each micro-batch, and for the update"
    assert total(found.host, "gradients") == pytest.approx(GRADIENTS / 2)
    assert total(found.memory, "gradients") == pytest.approx(-GRADIENTS / 2)
    assert total(found.memory, "buffers", "gradients") == GRADIENTS, "one bucket, of eight that there may be"
    assert not total(without.memory, "buffers", "gradients")


def test_gradients_that_wait_for_their_exchange_stay(graph, machine):
    """So do those of weights that other stages of a pipeline have too."""
    costs = CostModel(replace(machine, host=Host(1e12, 1e12, 1e12, 1e12)), Mesh((1,), 2))
    for layouts in (None, {path: (SHARED,) for path, meta in graph.parameters.items() if meta.requires_grad}):
        problem = build_problem(graph, costs, Recomputing(), MICRO_BATCHES, layouts, host=1e12)
        levels = {block: {levels[0]: problem.calls[block]} for block, levels in problem.levels.items()}
        for once in (False, True):
            chosen = [
                next((o for o, option in enumerate(decision.options) if option.exchanged_once == once), 0)
                for decision in problem.decisions
            ]
            found = price(Program(problem), Solution(chosen, levels, gradients_on_host=1))
            assert (found is not None) == (not once and layouts is None)


@pytest.mark.parametrize(("least", "most"), [(1, 20), (21, 100)])
def test_the_least_memory_takes_no_more_of_the_host_than_it_may(graph, machine, least, most):
    """With sixteen micro-batches in flight, three calls would keep 48 tensors there or more."""
    costs = CostModel(replace(machine, host=Host(1e12, 1e12, 1e12, 1e12)), Mesh((1,)))
    problem = build_problem(graph, costs, Recomputing(), MICRO_BATCHES, in_flight=16, host=most * TENSOR)
    program = Program(problem)
    solution = least_memory(program)
    assert solution is not None
    found = price(program, solution)
    assert found is not None
    assert least <= sum(found.host.values()) / TENSOR <= most * (1 + 1e-5)
