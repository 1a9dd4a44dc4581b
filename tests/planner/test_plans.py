"""Plans of whole models: as good as those that experts write by hand, within memory, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.compiler import Source
from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh, meshes
from nnscaler.models import load_config
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.placement import SHARED, Shard
from nnscaler.plan import Plan
from nnscaler.planner import find_plan
from nnscaler.planner.costs import CostModel
from nnscaler.planner.options import Option
from nnscaler.planner.price import price
from nnscaler.planner.problem import Decision, Problem, Recomputing, build_problem
from nnscaler.planner.program import Program
from nnscaler.planner.solve import stated
from nnscaler.trace import trace
from tests import tiny

GIB = 2.0**30
SPLIT_OF = Mapping[
    str, str
]  # last part of a module's path, or an operator's name -> the annotated name it is split along


@cache
def graph(model: str, length: int, chunk_loss: bool = True) -> Graph:
    config = load_config(f"meta-llama/{model}")
    prepare_config(config, length, "auto")
    tokens = torch.empty((1, length), dtype=torch.int64, device="meta")
    loss = chunk_linear_cross_entropy if chunk_loss else None
    source = Source(lambda: CausalLM(config, loss), {"input_ids": tokens, "labels": tokens})
    built, buffers = source.build()
    return trace(built, source.inputs, buffers)


@cache
def problem(hardware: str, devices: int) -> Problem:
    costs = CostModel(load_hardware(hardware), Mesh((devices,)), fused=True)
    return build_problem(graph("Meta-Llama-3-8B", 131072), costs, Recomputing(), 4)


ROWS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "*1")
MEGATRON = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "n"),
    **dict.fromkeys(("o_proj", "down_proj"), "k"),
}

# How each device computes, and how weights are stored, of the plans that experts write.
BY_HAND = {
    "sequence, all-to-all around heads, weights whole": ({**ROWS, "attention": "k"}, SHARED),
    "context parallel, weights whole": ({**ROWS, "attention": "l"}, SHARED),
    "ZeRO-3": ({**ROWS, "attention": "k"}, Shard(0)),
    "tensor and sequence parallel": ({**MEGATRON, "attention": "k"}, None),
}


def seconds(problem: Problem, memory: float, allowed: Callable[[Decision, Option], bool]) -> float | None:
    """Seconds of the best plan whose decisions all are allowed; None where none fits."""
    program = Program(problem)
    milp = stated(program, memory)
    for decision, xs in zip(problem.decisions, program.x):
        open_ = [(x, 1.0) for x, option in zip(xs, decision.options) if allowed(decision, option)]
        assert open_, f"{decision.block}.{decision.name} cannot be laid out so"
        milp.row(open_, 1.0, 1.0)
    answer = milp.solve(1e-3)
    if answer is None:
        return None
    evaluation = price(program, program.solution(answer.values))
    assert evaluation is not None
    return evaluation.total_seconds


def by_hand(splits: SPLIT_OF, stored: object) -> Callable[[Decision, Option], bool]:
    def allowed(decision: Decision, option: Option) -> bool:
        if decision.kind == "parameter" and decision.block == "llama_decoder_layer":
            return stored is None or option.outputs[0] == (stored,)
        wanted = [(way, splits[name]) for name, way in option.ways if name in splits]
        return all(way.split == split for way, split in wanted)

    return allowed


@pytest.mark.parametrize(("hardware", "devices"), [("h100", 8), ("h200", 4)])
def test_the_plan_found_is_as_good_as_those_written_by_hand(hardware, devices):
    stated = problem(hardware, devices)
    limit = 0.9 * load_hardware(hardware).memory
    found = seconds(stated, limit, lambda decision, option: True)
    for name, (splits, stored) in BY_HAND.items():
        known = {node for decision in stated.decisions for option in decision.options for node, _ in option.ways}
        assert set(splits) <= known, "the names of the nodes are those that the plans name"
        best = seconds(stated, limit, by_hand(splits, stored))
        assert best is None or found <= best * 1.001, name
        unlimited = seconds(stated, 1e18, by_hand(splits, stored))
        assert unlimited is not None, f"{name} is in the search space"


def test_the_documents_largest_setting_fits():
    model = graph("Meta-Llama-3-70B", 8192)
    hardware = load_hardware("mi300x")
    plan = find_plan(model, meshes(8, 2, 8)[:1], hardware, memory=153 * GIB, micro_batches=64, fused=True)
    assert plan.memory_bytes <= 153 * GIB
    assert sum(plan.levels["llama_decoder_layer"].values()) == 80


def test_what_cannot_fit_is_refused_with_the_reason():
    model = graph("Meta-Llama-3-8B", 131072, chunk_loss=False)
    with pytest.raises(
        UserError,
        match=r"needs \d+\.\d GiB a device, constraint 16\.0 GiB: .*moments .*; the largest items are .*lm_head",
    ):
        find_plan(model, [Mesh((8,))], load_hardware("h100"), memory=16 * GIB, micro_batches=4, fused=True)


@pytest.mark.parametrize(("hardware", "layers"), [("cpu", 1), ("h100", 3)])
def test_a_plan_stays_within_its_limit(hardware, layers):
    config = tiny.config(num_hidden_layers=layers)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.empty((1, tiny.LENGTH), dtype=torch.int64, device="meta")
    source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)
    built, buffers = source.build()
    model = trace(built, source.inputs, buffers)
    refused = 0
    for devices in (1, 2, 4):
        mesh = [Mesh((devices,))]
        # Whatever the time, what is found fits: that it is the best, others say.
        free = find_plan(model, mesh, tiny.hardware(hardware), fused=True, seconds=1.0).memory_bytes
        for fraction in (0.97, 0.9, 0.8):
            try:
                memory = fraction * free
                plan = find_plan(model, mesh, tiny.hardware(hardware), memory=memory, fused=True, seconds=1.0)
            except UserError:
                refused += 1
                continue
            assert plan.memory_bytes <= fraction * free * (1 + 1e-5), (devices, fraction)
    assert refused < 9, "some limits can be kept"


@cache
def planned_within(seconds: float) -> Plan:
    arguments = {"micro_batches": 4, "fused": True, "seconds": seconds}
    return find_plan(graph("Meta-Llama-3-8B", 131072), meshes(8, 1, 8), tiny.hardware("h100"), **arguments)


@pytest.mark.parametrize("seconds", [1e-3, 0.3, 40.0])
def test_when_time_is_out_the_best_so_far_is_a_plan(seconds):
    """However short the time: it fits, and says how near to the best it is proven to be."""
    plan = planned_within(seconds)
    assert plan.memory_bytes <= plan.memory_limit * (1 + 1e-5)
    assert sum(plan.levels["llama_decoder_layer"].values()) == 32
    assert 0 <= plan.gap <= 1
    bound = planned_within(40.0).bound
    assert plan.step_seconds * (1 - plan.gap) <= bound * 1.003, "no more is proven than is true"
    if seconds == 40.0:
        assert plan.gap <= 0.0021
