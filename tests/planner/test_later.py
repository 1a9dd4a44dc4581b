"""What products hold for gradients of weights that are computed later, by hand; the layers are those of
`test_layers_by_hand`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnscaler import ComputeConfig, Source, compile_model, planning
from nnscaler.hardware.spec import Host
from nnscaler.later import factors, weight_seconds
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.planner import find_plan
from nnscaler.planner.costs import CostModel
from nnscaler.planner.later import WAITING
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program
from nnscaler.planner.solve import least_bytes, relaxed
from nnscaler.planner.statement import Account
from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.planner.test_by_hand import machine, total
from tests.planner.test_layers_by_hand import LAYERS, LEVELS, ONE, PRODUCT, TWO, H, X, graph, priced

__all__ = ["graph", "machine"]

HELD = LAYERS * (X + H + H + X)  # of each layer x, m, and the gradients of h and of y


@pytest.mark.parametrize(
    ("level", "inside"),
    [(KEEPS_ALL, H), (RECOMPUTES_ALL, 0)],  # inside of each layer: what exp gives
    ids=str,
)
def test_what_waits_takes_the_place_of_what_was_kept(graph, machine, level, inside):
    """Of four micro-batches for which something is kept, fewer do at moments when more products wait."""
    kept = LAYERS * (LEVELS[level][0] + inside) + H  # p, once
    for moments, wanted in (
        ((), 0.0),
        (((4, 1),), HELD),
        (((3, 2),), 2 * HELD - kept),
        (((1, 4), (3, 2)), max(4 * HELD - 3 * kept, 2 * HELD - kept)),
        (((0, 1),), max(HELD - 4 * kept, 0.0)),
    ):
        found = priced(graph, machine, {level: LAYERS}, in_flight=4, waiting=moments)
        assert found.memory.get(WAITING, 0.0) == pytest.approx(wanted), moments
        assert total(found.memory, "saved") + total(found.memory, "inside") == pytest.approx(4 * kept + wanted)


def test_each_device_holds_its_part(graph, machine):
    found = priced(graph, machine, {KEEPS_ALL: LAYERS}, TWO, in_flight=4, waiting=[(4, 1)])
    assert found.memory[WAITING] == pytest.approx(HELD / 2)


def test_products_in_fp8_hold_nothing(graph, machine):
    """Their weights' gradients are computed at once."""
    layer = graph.blocks["layer"]
    first, last = (node.name for node in layer.nodes if factors(node, layer))
    for in_fp8, wanted in (((first,), H + X), ((last,), X + H), ((first, last), 0.0)):
        found = priced(graph, machine, {KEEPS_ALL: LAYERS}, in_flight=4, waiting=[(4, 1)], in_fp8=in_fp8)
        assert found.memory.get(WAITING, 0.0) == pytest.approx(LAYERS * wanted)


def test_half_of_a_products_backward_is_for_its_weight(graph, machine):
    """All of it where what it multiplies has no gradient, as in the first layer."""
    plan = find_plan(graph, [ONE], machine, memory=1e12)
    assert weight_seconds(plan) == 0.0, "nothing waits"
    plan.splits = True
    assert weight_seconds(plan) == pytest.approx(2 * LAYERS * PRODUCT, rel=0.01)


@pytest.mark.parametrize("level", [KEEPS_ALL, RECOMPUTES_ALL], ids=str)
def test_a_stage_holds_what_is_planned(level, tmp_path, monkeypatch):
    """Of a Llama, in fp32: what several products multiply is held once."""

    def find(*given, **named):
        plan = find_plan(*given, **named, waiting=[(1, 1)])
        plan.splits = True
        plan.levels["llama_decoder_layer"] = {level: 2}
        planned.append(plan.memory[WAITING])
        return plan

    planned: list[float] = []
    monkeypatch.setattr(planning, "find_plan", find)
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    inputs = dict.fromkeys(("input_ids", "labels"), torch.zeros(1, tiny.LENGTH, dtype=torch.long))
    compile_model(
        Source(lambda: CausalLM(config), inputs, torch.float32),
        ComputeConfig(hardware=tiny.write_hardware(tmp_path)),
        tmp_path / "code",
    )
    module = ParallelModule(tmp_path / "code", torch.device("cpu"))
    module.load(lambda name, box: torch.full(box.sizes, 0.01))
    later = module.axes.later
    later.waits = True
    module(**inputs).backward()
    held = {one.data_ptr(): one.nbytes() for _, *both in later._left for one in (t.untyped_storage() for t in both)}
    assert len(later._left) == 2 * 7 + 1
    assert [sum(held.values())] == planned


def test_a_program_is_turned_into_that_of_a_stage_that_holds_more(graph, machine):
    """What is stated for four micro-batches in flight, of which some wait, is what the program of one becomes."""
    costs = CostModel(replace(machine, host=Host(1e12, 1e9, 1e9, 1e9)), TWO)
    moments = (3, 2), (1, 4)
    one, four = (build_problem(graph, costs, Recomputing(), 3, in_flight=count, host=1e9) for count in (1, 4))
    program = Program(one)
    before, waits = program.statement.scaled(1.0, ()), replace(four, waiting=moments)
    for found, wanted in ((program.holding(4), Program(four)), (program.holding(4, moments), Program(waits))):
        assert (found.problem.in_flight, found.problem.waiting) == (4, wanted.problem.waiting)
        assert len(found.statement.rows) == len(wanted.statement.rows)
        for account in Account:
            charges = [
                sorted((one.key, one.amount) for one in each.statement.accounts[account]) for each in (found, wanted)
            ]
            assert [key for key, _ in charges[0]] == [key for key, _ in charges[1]]
            assert [amount for _, amount in charges[0]] == pytest.approx([amount for _, amount in charges[1]])
        most = least_bytes(wanted)
        for memory in (1.05 * most, 2 * most):
            ours, theirs = (relaxed([each], memory) for each in (found, wanted))
            assert ours[0].seconds == pytest.approx(theirs[0].seconds, rel=1e-6)
    assert program.statement == before, "the program of one is as it was"
    assert program.holding(1) is program
