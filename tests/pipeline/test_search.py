"""The search finds pipelines where they pay, within memory, and says in one line what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnscaler import UserError
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.schedules import Schedule
from nnscaler.pipeline.search import Wanted, balanced, candidates, even, find_pipeline
from nnscaler.plan import Plan
from nnscaler.planner import find_plan
from tests import tiny
from tests.pipeline.test_cut import llama


def hardware(folder: Path, **changes: object):
    path = Path(tiny.write_hardware(folder))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_hardware(str(path))


SLOW = {"bandwidth": 1e6, "latency": 1e-2}


def test_a_pipeline_is_found_where_devices_are_far_apart(tmp_path):
    """Two devices that take long to exchange anything: a stage on each needs the fewest exchanges."""
    far = hardware(tmp_path, intra=SLOW)
    graph, mesh = llama(), Mesh((2,))
    alone = find_plan(graph, [mesh], far, micro_batches=8)
    found = find_pipeline(graph, [mesh], far, Wanted(), micro_batches=8)
    assert isinstance(found, PipelinePlan)
    assert found.step_seconds < alone.step_seconds
    assert sum(len(stage.graph.calls("llama_decoder_layer")) for stage in found.stages) == 4
    names = [name for stage in found.stages for name in stage.parameters if name not in graph.buffers]
    assert sorted(names) == sorted(set(graph.parameters) - set(graph.buffers)), "plans are of the stages' own weights"


def test_no_pipeline_is_taken_where_it_is_slower(tmp_path):
    """Exchanges that cost nothing, and few micro-batches: nothing makes up for the bubble."""
    found = find_pipeline(llama(), [Mesh((2,))], hardware(tmp_path), Wanted(), micro_batches=2)
    assert isinstance(found, Plan)


def test_what_is_in_flight_counts(tmp_path):
    graph, mesh, machine = llama(), Mesh((1,)), hardware(tmp_path)

    def saved(plan: Plan) -> float:
        return sum(size for key, size in plan.memory.items() if key.category in ("saved", "inside"))

    one, four = (find_plan(graph, [mesh], machine, recompute_modules=(), in_flight=held) for held in (1, 4))
    assert saved(four) == pytest.approx(4 * saved(one))
    limit = one.memory_bytes + saved(one)  # enough for two in flight
    assert find_plan(graph, [mesh], machine, recompute_modules=(), in_flight=2, memory=limit)
    with pytest.raises(UserError, match="no plan fits"):
        find_plan(graph, [mesh], machine, recompute_modules=(), in_flight=3, memory=limit)


def test_cut_points_move_towards_equal_times():
    assert even(10, 4) == (3, 3, 2, 2)
    # A place takes 1 s; the last stage has 4 s besides its places.
    assert balanced((4, 4, 4, 4), (4, 4, 4, 8)) == (5, 5, 5, 1)


def test_candidates():
    assert candidates(Wanted(stages=1), 4, 8, 8) == [None]
    assert candidates(Wanted(schedule="1f1b"), 4, 8, 8) == [Schedule("1f1b", 2, 2, 8), Schedule("1f1b", 4, 4, 8)]
    assert candidates(Wanted(stages=4), 4, 4, 8)[0] == Schedule("interleaved", 2, 4, 8)
    with pytest.raises(UserError, match=r"pipeline_nstages is 16, but plan_ngpus=4 and 8 places .* allow 1, 2, 4, 8"):
        candidates(Wanted(stages=16), 4, 8, 8)
    with pytest.raises(UserError, match=r"pipeline_nstages is 4, .* allow 2 stages with 1f1b"):
        candidates(Wanted(schedule="1f1b", stages=4), 2, 8, 8)
