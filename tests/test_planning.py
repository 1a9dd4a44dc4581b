"""What a configuration asks of the search for a plan, and which changes are tried where none fits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler import planning
from nnscaler.compiler import ComputeConfig, Source
from nnscaler.errors import UserError
from nnscaler.graph import Block, Graph
from nnscaler.hardware import load_hardware
from nnscaler.hardware.spec import Host
from nnscaler.mesh import meshes
from nnscaler.pipeline.search import Wanted
from nnscaler.plan import GIB
from nnscaler.planner import NothingFits
from nnscaler.sums import GradientSum

GRAPH, TIMES = Graph(Block("model", "Model"), {}, {}, {}), SimpleNamespace()
CONFIG = ComputeConfig(
    4, 8, gpu_mem_constraint=3.0, host_mem_constraint=2.0, recompute_modules=("Layer",), micro_batches=6,
    search_seconds=7.0, grad_reduce_dtype="bf16", trace_strategy="meta",
)  # fmt: skip
H100 = replace(load_hardware("h100"), memory=80 * GIB)
ALONE = replace(H100, host=None)


def test_all_of_a_configuration_reaches_the_search(monkeypatch):
    asked = []
    for name in ("find_plan", "find_pipeline"):
        monkeypatch.setattr(planning, name, lambda *given, name=name, **named: asked.append((name, given, named)))
    named = {
        "memory": 3 * GIB, "recompute_modules": ("Layer",), "micro_batches": 6, "fused": True, "times": TIMES,
        "seconds": 7.0, "host": 2 * GIB, "below": math.inf, "sums": GradientSum("all_to_all", "bfloat16"),
    }  # fmt: skip
    planning.plan_for(GRAPH, CONFIG, H100, TIMES)
    assert asked.pop() == ("find_plan", (GRAPH, meshes(4, 2, 8), H100), {**named, "decided": True})
    pipelines = replace(
        CONFIG, explore_pipeline=True, pipeline_pivots=("Layer",), pipeline_schedule="1f1b", pipeline_nstages=2
    )
    planning.plan_for(GRAPH, pipelines, H100, TIMES)
    wanted = Wanted(("Layer",), "1f1b", 2)
    assert asked.pop() == ("find_pipeline", (GRAPH, meshes(4, 2, 8), H100, wanted), named)
    planning.plan_for(GRAPH, replace(CONFIG, gpu_mem_constraint=None), replace(H100, name="CPU"), None)
    _, _, found = asked.pop()
    assert (found["memory"], found["fused"], found["times"]) == (None, False, None)
    planning.plan_for(GRAPH, CONFIG, replace(H100, devices_per_node=4), TIMES)
    assert asked.pop()[2]["sums"] == GradientSum("reduce_scatter", "bfloat16"), "across nodes"


def tried(
    monkeypatch, fits, config: ComputeConfig = CONFIG, needed: float | None = 79 * GIB, hardware=ALONE,
    may_fit=lambda config, graph, mesh: True, at_any_length: bool = False,
) -> tuple[str, list[str]]:  # fmt: skip
    """(what is said, the changes that were planned). `fits`: whether a plan of this many devices and tokens does;
    `may_fit`: whether it would on a mesh, were choices made in parts"""
    told = []

    def bound_for(graph, config, hardware, times, mesh):
        assert times is None
        assert not config.explore_pipeline, "this bounds plans without a pipeline"
        if not may_fit(config, graph, mesh):
            raise NothingFits("too large")

    def plan_for(graph, config, hardware, times, meshes=None, *, decided):
        assert times is None
        assert meshes is None if config.explore_pipeline else may_fit(config, graph, meshes[0])
        assert not decided
        assert config.search_seconds <= planning.EACH_SECONDS
        what = (config.plan_ngpus, config.runtime_ngpus, config.gpu_mem_constraint, config.explore_pipeline, graph)
        told.append(what)
        if not fits(config, graph):
            raise NothingFits("too large")
        return SimpleNamespace(step_seconds=1.5, memory_bytes=2.5 * GIB)

    def trace(model, inputs, buffers, strategy, seed):
        assert (strategy, seed) == ("meta", 5)
        return type(model).__name__, inputs["ids"].shape[1]

    tokens = torch.zeros((2, 12), dtype=torch.int64)
    source = Source(
        lambda: nn.Linear(2, 2), {"ids": tokens}, seed=5, tokens=24, length=12,
        instead={"--less": lambda: nn.Identity()},
    )  # fmt: skip
    monkeypatch.setattr(planning, "plan_for", plan_for)
    monkeypatch.setattr(planning, "bound_for", bound_for)
    monkeypatch.setattr(planning, "trace", trace)
    refusal = NothingFits("too large")
    refusal.needed, refusal.at_any_length = needed, at_any_length
    return planning.what_fits(source, "own", config, hardware, refusal), told


def test_the_nearest_change_of_each_kind_that_fits_is_told(monkeypatch):
    """Twelve tokens can be halved twice."""

    def fits(config, graph):
        return graph in (("Identity", 12), ("Linear", 3)) or config.plan_ngpus >= 16 or config.gpu_mem_constraint == 79

    text, told = tried(monkeypatch, fits)
    each = "(1.5 s a step, 2.5 GiB a device)"
    assert text == (
        f"what would fit: --less {each}; --gpu_mem_constraint 79 {each}; --plan_ngpus 16 --runtime_ngpus 16 {each}; "
        f"sequences of 3 tokens {each}"
    )
    assert told == [
        (4, 8, 3.0, False, ("Identity", 12)), (4, 8, 79.0, False, "own"), (8, 8, 3.0, False, "own"),
        (16, 16, 3.0, False, "own"), (4, 8, 3.0, False, ("Linear", 6)), (4, 8, 3.0, False, ("Linear", 3)),
        (4, 8, 3.0, True, "own"),
    ]  # fmt: skip


def test_what_would_not_fit_though_choices_were_made_in_parts_is_not_planned(monkeypatch):
    """The first of the changes that may fit does not, and the second does."""
    text, told = tried(
        monkeypatch, lambda config, graph: config.plan_ngpus == 32,
        may_fit=lambda config, graph, mesh: config.plan_ngpus in (16, 32),
    )  # fmt: skip
    assert text == "what would fit: --plan_ngpus 32 --runtime_ngpus 32 (1.5 s a step, 2.5 GiB a device)"
    assert [plan for plan, *_ in told] == [16, 32, 4], "and of a pipeline, nothing is known before"


def test_what_may_fit_on_two_axes_alone_is_planned_on_those(monkeypatch):
    text, told = tried(
        monkeypatch, lambda config, graph: True,
        may_fit=lambda config, graph, mesh: config.plan_ngpus == 32 and mesh.sizes == (8, 4),
    )  # fmt: skip
    assert "--plan_ngpus 32 --runtime_ngpus 32 (1.5 s a step, 2.5 GiB a device)" in text
    assert [plan for plan, *_ in told] == [32, 4], "and a pipeline"


def test_no_length_is_tried_where_weights_alone_are_too_large(monkeypatch):
    """To know it of each, the model would be traced with it."""
    _, told = tried(monkeypatch, lambda config, graph: False, at_any_length=True)
    assert {graph for *_, graph in told} == {("Identity", 12), "own"}
    _, told = tried(monkeypatch, lambda config, graph: False)
    assert {graph for *_, graph in told} == {("Identity", 12), "own", ("Linear", 6), ("Linear", 3)}


def test_more_than_the_device_has_is_not_advised(monkeypatch):
    """80 GiB, of which a plan takes 72 unless it is told otherwise."""
    for needed, fits in ((79.2, True), (80.2, False)):
        text, told = tried(monkeypatch, lambda config, graph: True, needed=needed * GIB)
        assert ("--gpu_mem_constraint 80 " in text, "--gpu_mem_constraint" in text) == (fits, fits)
        assert any(limit > 3 for _, _, limit, *_ in told) == fits


def test_the_host_is_tried_together_with_what_is_not_enough_alone(monkeypatch):
    """And only with that."""
    hardware = replace(H100, host=Host(100 * GIB, 1.0, 1.0, 1.0))
    off = replace(CONFIG, offload="off")
    each = "(1.5 s a step, 2.5 GiB a device)"
    text, _ = tried(monkeypatch, lambda c, g: g == ("Identity", 12) and c.offload == "auto", off, hardware=hardware)
    assert text == f"what would fit: --less --offload auto {each}"
    text, told = tried(monkeypatch, lambda c, g: g == ("Identity", 12), off, hardware=hardware)
    assert text == f"what would fit: --less {each}"
    assert [graph for *_, graph in told].count(("Identity", 12)) == 1
    text, told = tried(monkeypatch, lambda c, g: c.offload == "auto" and g == "own", off, hardware=hardware)
    assert text == f"what would fit: --offload auto {each}"
    assert [graph for *_, graph in told].count(("Identity", 12)) == 1


def test_what_is_not_known_or_cannot_be_is_not_tried(monkeypatch):
    text, told = tried(monkeypatch, lambda *given: False, replace(CONFIG, micro_batches=1), needed=None)
    assert text == "no change that was tried fits"
    assert [(plan, run) for plan, run, *_, graph in told if graph == "own"] == [(8, 8), (16, 16), (32, 32), (64, 64)]
    assert not any(pipeline for *_, pipeline, _ in told), "of one micro-batch"
    text, told = tried(monkeypatch, lambda *given: False, replace(CONFIG, plan_ngpus=1, runtime_ngpus=6))
    assert {(plan, run) for plan, run, *_ in told} == {(1, 6), (2, 6), (8, 8), (16, 16)}, "6 devices are no copies of 4"
    assert not any(pipeline for *_, pipeline, _ in told), "of one device"
    text, _ = tried(monkeypatch, lambda config, graph: config.gpu_mem_constraint == 7.0, needed=6.2 * GIB)
    assert text == "what would fit: --gpu_mem_constraint 7 (1.5 s a step, 2.5 GiB a device)", "what the device has"
    monkeypatch.setattr(planning, "TRYING_SECONDS", -1.0)
    assert tried(monkeypatch, lambda *given: True) == ("no change that was tried fits", [])


@pytest.mark.parametrize(("given", "change"), [
    ({"offload": "off"}, "--offload auto"), ({}, "--host_mem_constraint 80"),
    ({"host_mem_constraint": None}, "--host_mem_constraint 160, where the host of H100 has 100"),
    ({"host_mem_constraint": 90.0}, "--host_mem_constraint 180, where the host of H100 has 100"),
    ({"host_mem_constraint": 45.0, "offload": "off"}, "--offload auto"),
])  # fmt: skip
def test_more_of_the_host_is_tried_too(monkeypatch, given, change):
    """Of 100 GiB, a plan may use 80 unless it is told otherwise."""
    hardware = replace(H100, host=Host(100 * GIB, 1.0, 1.0, 1.0))
    config = replace(CONFIG, **given)

    def fits(changed, graph):
        return changed.host_bytes(hardware) > config.host_bytes(hardware)

    text, _ = tried(monkeypatch, fits, config, hardware=hardware)
    assert text == f"what would fit: {change} (1.5 s a step, 2.5 GiB a device)"


def test_what_a_policy_pins_is_pinned_before(monkeypatch):
    monkeypatch.setattr(planning, "find_plan", lambda graph, *given, **named: graph.stored)
    assert planning.plan_for(GRAPH, replace(CONFIG, pas_policy=lambda graph: graph.store), H100, None) == {}
    with pytest.raises(UserError, match="the model uses no parameter 'w'"):
        planning.plan_for(GRAPH, replace(CONFIG, pas_policy=lambda graph: graph.store("w", 0)), H100, None)


def test_meshes_and_limits_that_are_given_reach_the_search_and_a_bound_is_asked_for_alike(monkeypatch):
    asked = []
    for name in ("find_plan", "find_pipeline", "least_step"):
        monkeypatch.setattr(planning, name, lambda *given, name=name, **named: asked.append((name, given, named)))
    every = meshes(4, 2, 8)
    planning.plan_for(GRAPH, CONFIG, H100, TIMES, every[1:], False, 1.5)
    _, (_, found, _), named = asked.pop()
    assert (found, named["below"]) == (every[1:], 1.5)
    planning.plan_for(GRAPH, replace(CONFIG, explore_pipeline=True), H100, TIMES, every[1:], False, 1.5)
    _, (_, found, _, wanted), named = asked.pop()
    assert (found, wanted.alone, named["below"]) == (every[1:], False, 1.5)
    planning.bound_for(GRAPH, CONFIG, H100, TIMES)
    for limit in ("seconds", "below"):
        del named[limit]
    assert asked.pop() == ("least_step", (GRAPH, every[0], H100), named)
    planning.bound_for(GRAPH, CONFIG, H100, TIMES, every[1])
    assert asked.pop() == ("least_step", (GRAPH, every[1], H100), named)
    with pytest.raises(UserError, match="the model uses no parameter 'w'"):
        planning.bound_for(GRAPH, replace(CONFIG, pas_policy=lambda graph: graph.store("w", 0)), H100, None)
