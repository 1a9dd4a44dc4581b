"""Groups of layers: a real run holds, and computes again, what the planner says."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, RECOMPUTES_ALL, RECOMPUTES_ALL_BUT_ATTENTION, Level
from nnscaler.runtime.module import ParallelModule
from nnscaler.trace import trace
from tests import tiny
from tests.parity import Case, planned

LAYERS, LENGTH, WIDTH = 9, 512, 32
LAYER = "llama_decoder_layer"
BOUNDARY = 4 * LENGTH * WIDTH  # bytes of what one layer hands to the next, in fp32


def source() -> Source:
    config = tiny.config(num_hidden_layers=LAYERS, max_position_embeddings=LENGTH)
    prepare_config(config, LENGTH, "auto")
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    return Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> str:
    return tiny.write_hardware(Path(tmp_path_factory.mktemp("machine")), name="CPU.json")


@pytest.fixture(scope="module")
def problem(machine) -> Problem:
    model, buffers = source().build()
    graph = trace(model, source().inputs, buffers)
    return build_problem(graph, CostModel(load_hardware(machine), Mesh((1,))), Recomputing(), 1)


def mostly(level: Level) -> dict[Level, int]:
    """As many layers as can have the level have it; the others keep only their inputs."""
    found = {level: LAYERS - LAYERS % level.size} if level is not RECOMPUTES_ALL else {}
    return {**found, RECOMPUTES_ALL: LAYERS - sum(found.values())}


def priced(problem: Problem, level: Level) -> Price:
    levels = {block: {KEEPS_ALL: calls} for block, calls in problem.calls.items()} | {LAYER: mostly(level)}
    found = price(Program(problem), Solution([0] * len(problem.decisions), levels))  # on one device there is one way
    assert found is not None
    return found


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.mark.parametrize(("count", "sizes"), [(2, {1, 2}), (3, {1, 2}), (4, {1, 2, 4})])
def test_groups_may_be_as_large_as_a_stack(count, sizes, machine):
    one = Source(lambda: Layers(count), {"x": torch.empty(2, 4, device="meta")}, torch.float32)
    model, buffers = one.build()
    graph = trace(model, one.inputs, buffers)
    found = build_problem(graph, CostModel(load_hardware(machine), Mesh((1,))), Recomputing(), 1, groups=True)
    (block,) = graph.blocks
    assert {level.size for level in found.levels[block]} == sizes


def test_layers_are_grouped_only_where_each_takes_what_the_one_before_gives_as_it_lies(machine):
    one = Source(lambda: Layers(4), {"x": torch.empty(2, 4, device="meta")}, torch.float32)
    model, buffers = one.build()
    graph = trace(model, one.inputs, buffers)
    problem = build_problem(graph, CostModel(load_hardware(machine), Mesh((2,))), Recomputing(), 1, groups=True)
    (stack,) = problem.stacks
    given, taken = (problem.decisions[index].options for index in (stack.given, stack.taken))
    (pairs,) = (level for level in problem.levels[stack.block] if level.size == 2 and level.of_each is KEEPS_ALL)
    priced = 0
    for level in (KEEPS_ALL, pairs):
        levels = {block: {KEEPS_ALL: calls} for block, calls in problem.calls.items()} | {stack.block: {level: 4}}
        for first, last in product(range(len(given)), range(len(taken))):
            chosen = [0] * len(problem.decisions)
            chosen[stack.given], chosen[stack.taken] = first, last
            alike = given[first].outputs[0] == taken[last].outputs[0]
            found = price(Program(problem), Solution(chosen, levels))
            assert found is None or alike or level is KEEPS_ALL
            priced += found is not None and not alike
    assert priced, "one by one they may be"


class Products(TorchDispatchMode):
    """Counts the products of matrices that run inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time, beside what was there before."""
    gc.collect()  # else what others left may be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


@pytest.fixture(scope="module")
def measured(machine, tmp_path_factory) -> Callable[[Level], tuple[int, int]]:
    """Level -> what a micro-batch really takes: bytes at its peak, and products of matrices."""
    folder = tmp_path_factory.mktemp("code")

    @functools.cache
    def of(level: Level) -> tuple[int, int]:
        names = tuple(each.name for each, calls in mostly(level).items() for _ in range(calls))
        own = folder / level.name
        with planned(Case(1, 1, levels=names)):
            compile_model(source(), ComputeConfig(hardware=machine), own)
        module = ParallelModule(own, torch.device("cpu"))
        module.load(lambda name, box: torch.full(box.sizes, 0.01))
        tokens = torch.randint(tiny.VOCABULARY, (1, LENGTH))
        with Products() as products:
            module.accumulate([{"input_ids": tokens, "labels": tokens}])
        return peak(lambda: module.accumulate([{"input_ids": tokens, "labels": tokens}])), products.count

    return of


@pytest.mark.parametrize("level", IN_GROUPS, ids=str)
def test_a_real_run_holds_what_is_said(level, problem, measured):
    said = priced(problem, level).total_memory - priced(problem, RECOMPUTES_ALL).total_memory
    held = measured(level)[0] - measured(RECOMPUTES_ALL)[0]
    if level.inner is RECOMPUTES_ALL:
        assert said == held < 0
    else:  # a layer that keeps some of its tensors, or all, does not need all of them at the same time
        assert held <= said <= held + 2 * BOUNDARY


@pytest.mark.parametrize("level", [RECOMPUTES_ALL, *IN_GROUPS], ids=str)
def test_a_real_run_computes_again_what_is_said(level, problem, measured):
    said = 0.0
    for decision in problem.decisions:
        if decision.block == LAYER and any(name.endswith("_proj") for name, _ in decision.options[0].ways):
            said += sum(calls * decision.runs_again[each] for each, calls in mostly(level).items())
    if (
        level.inner is RECOMPUTES_ALL_BUT_ATTENTION
    ):  # a region that is not compiled runs those of attention's inputs too
        said += 3 * mostly(level)[level]
    once = 3 * (7 * LAYERS + 1)  # each layer's products and that of the loss: forward, and a gradient for each factor
    assert measured(level)[1] == pytest.approx(once + said)
