"""Pipelines whose ranks have unequal numbers of devices: what crosses by hand, what is found, and what reports say."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, estimated, find_pipeline
from nnscaler.pipeline.stages import Candidate, StagePlanner
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.report import explain
from nnscaler.report.about import headed
from nnscaler.report.page import plan_page
from nnscaler.report.pipeline import pipeline_report
from nnscaler.schedules import Schedule
from tests.pipeline.test_cut import llama
from tests.pipeline.test_search import hardware

SIZE = 4 * 32 * 32  # bytes of what crosses, [1, 32, 32] in fp32


@pytest.mark.parametrize(
    ("sizes", "layout", "moved"),
    [
        ((2, 1), Shard(1), 1.0),  # two halves to one device, and back
        ((1, 2), Shard(1), 1.0),
        ((2, 1), REPLICATE, 2.0),  # from one to one; back to both
        ((4, 2), Shard(1), 0.5),
        ((2, 4), REPLICATE, 2.0),  # each of two sends to two
        ((2, 2), REPLICATE, 1.0),
        ((2, 2), Shard(2), 0.5),
    ],
)
def test_a_transfer_takes_as_long_as_the_device_that_sends_or_receives_most(sizes, layout, moved, tmp_path):
    links = {"intra": {"bandwidth": 1e6, "latency": 1e-3}, "inter": {"bandwidth": 1e5, "latency": 1e-2}}
    graph, schedule = llama(), Schedule("1f1b", 2, 2, 4)
    for copies in (1, 2):
        candidate = Candidate(schedule, (2, 2), (layout,), PipelineMesh.of([(size,) for size in sizes], copies))
        for per_node, way in ((64, 1e-3 + moved * SIZE / 1e6), (1, 1e-2 + moved * SIZE / 1e5)):
            machine = hardware(tmp_path, devices_per_node=per_node, **links)
            planner = StagePlanner(graph, machine, 1e12, None, False, None, pivots(graph))
            assert planner._transfers(candidate) == [pytest.approx(way)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> PipelinePlan:
    """The best of two stages on three devices, which takes as much as the best of both ways to divide these."""
    machine, graph = hardware(tmp_path_factory.mktemp("uneven")), llama()
    found = find_pipeline(graph, [Mesh((3,))], machine, Wanted(schedule="1f1b", stages=2), micro_batches=4)
    assert isinstance(found, PipelinePlan)
    planner = StagePlanner(graph, machine, 1e12, None, False, None, pivots(graph))
    seconds = [
        estimated(planner, Schedule("1f1b", 2, 2, 4), PipelineMesh.of(sizes, 1)).step_seconds
        for sizes in ([(2,), (1,)], [(1,), (2,)])
    ]
    assert min(seconds) == pytest.approx(found.step_seconds, rel=0.02)
    return found


def test_three_devices_make_two_stages(found):
    assert sorted(mesh.plan_ngpus for mesh in found.mesh.ranks) == [1, 2]
    layers = {stage.mesh.plan_ngpus: len(stage.graph.calls("llama_decoder_layer")) for stage in found.stages}
    assert layers[2] > layers[1], "more devices have more of the model"
    assert found.mesh.plan_ngpus == 3


def test_reports_say_how_many_devices_each_rank_has(found):
    values = headed(pipeline_report(found), {})
    text = " + ".join(str(mesh.plan_ngpus) for mesh in found.mesh.ranks)
    assert f"1 copy x 2 pipeline ranks x {text} devices" in explain(values)
    assert f"2 pipeline ranks x {text} devices" in plan_page(values)
    (sent,) = values["pipeline"]["crossing"][0]
    assert (sent["whole"], sent["name"]) == (
        [1, 32, 32],
        f"layers_{len(found.stages[0].graph.calls('llama_decoder_layer')) - 1}",
    )


def test_a_frozen_parameter_of_several_stages_is_whole_on_the_devices_of_each():
    """So that every device has the same of it, whichever stage saves it."""
    graph, tied = llama(tied=True), "model.model.embed_tokens.weight"
    graph.parameters[tied] = replace(graph.parameters[tied], requires_grad=False)
    planner = StagePlanner(graph, SimpleNamespace(devices_per_node=8), 1.0, None, False, None, pivots(graph))
    mesh = PipelineMesh.of([(2,), (1,)], 1)
    found = planner._stages(Candidate(Schedule("1f1b", 2, 2, 4), (2, 2), (Shard(1),), mesh))
    assert [stage.layouts[tied] for stage in found] == [(REPLICATE,), (REPLICATE,)]
    graph.parameters[tied] = replace(graph.parameters[tied], requires_grad=True)
    other = StagePlanner(graph, SimpleNamespace(devices_per_node=8), 1.0, None, False, None, pivots(graph))
    found = other._stages(Candidate(Schedule("1f1b", 2, 2, 4), (2, 2), (Shard(1),), mesh))
    assert [stage.layouts[tied] for stage in found] == [(SHARED,), (SHARED,)]
