"""The search finds pipelines where they pay, within memory, and says in one line what it cannot do."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from itertools import pairwise, product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnscaler import UserError
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.pipeline import search
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.pipeline.search import Wanted, balanced, candidates, estimated, even, find_pipeline, planned, quiet
from nnscaler.pipeline.stages import Candidate, Estimate, StagePlanner
from nnscaler.placement import REPLICATE, Shard
from nnscaler.plan import Key, Plan
from nnscaler.planner import NothingFits, find_plan
from nnscaler.planner.solve import Needs
from nnscaler.recompute import KEEPS_ALL
from nnscaler.report.pipeline import pipeline_report
from nnscaler.schedules import Schedule
from tests import tiny
from tests.pipeline.test_cut import llama


def hardware(folder: Path, **changes: object):
    path = Path(tiny.write_hardware(folder))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_hardware(str(path))


AGAIN = ("again", "reshard again", "reshard backward")
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


def test_a_stage_computes_again_what_it_cannot_hold_for_all_in_flight(tmp_path):
    """Of two stages alike under 1F1B the first holds two micro-batches, the last one: only the first must recompute."""
    graph, far, wanted = llama(), hardware(tmp_path, intra=SLOW), Wanted(schedule="1f1b")

    def found(memory: float) -> PipelinePlan:
        plan = find_pipeline(graph, [Mesh((2,))], far, wanted, memory=memory, micro_batches=4)
        assert isinstance(plan, PipelinePlan)
        assert plan.memory_bytes <= memory
        return plan

    free = found(1e12)
    assert free.in_flight == [2, 1]
    assert [stage.levels["llama_decoder_layer"] for stage in free.stages] == [{KEEPS_ALL: 2}] * 2
    first, last = found(0.9 * free.memory_bytes).stages
    assert first.levels["llama_decoder_layer"] != {KEEPS_ALL: 2}
    assert last.levels["llama_decoder_layer"] == {KEEPS_ALL: 2}


def test_another_schedule_where_the_best_holds_too_much(tmp_path):
    """Zero-bubble V is fastest, but holds more than 1F1B or interleaving; nothing may be computed again."""
    machine = hardware(tmp_path, intra={"bandwidth": 1e9, "latency": 3e-4})

    def found(memory: float, wanted: Wanted) -> Plan | PipelinePlan:
        return find_pipeline(
            llama(), [Mesh((2,))], machine, wanted, memory=memory, recompute_modules=(), micro_batches=4
        )

    free = found(1e12, Wanted())
    assert isinstance(free, PipelinePlan)
    assert free.schedule.kind == "zb-v"
    limit = 0.8 * free.memory_bytes
    small = found(limit, Wanted())
    assert isinstance(small, PipelinePlan)
    assert small.schedule.kind != "zb-v"
    assert small.memory_bytes <= limit
    with pytest.raises(UserError, match="no pipeline fits; the last that was tried, zb-v, 4 stages"):
        found(limit, Wanted(schedule="zb-v"))
    with pytest.raises(
        NothingFits, match=r"^no plan fits: needs .*; no pipeline fits; the last that was tr"
    ) as refusal:
        found(1e3, Wanted())
    assert refusal.value.needed is not None, "so that advice can begin with what is needed"
    assert refusal.value.needed > 1e3


def test_estimates_are_no_higher_than_plans(tmp_path):
    """What a stage takes in whole choices is no less than what it takes where choices may be made in parts."""
    graph, machine = llama(), hardware(tmp_path, intra=SLOW)

    def compare(memory: float) -> tuple[float, float]:
        """(seconds of the plan over those of the estimate, bytes of the plan)"""
        planner = StagePlanner(graph, machine, memory, None, False, None, pivots(graph))
        estimate = estimated(planner, Schedule("1f1b", 2, 2, 4), PipelineMesh.of([(1,)] * 2, 1))
        plan = planner.plan(estimate)
        assert plan is not None
        seconds = [sum(stage.seconds.values()) for stage in plan.stages]
        assert all(need.seconds <= each * (1 + 1e-6) for need, each in zip(estimate.needs, seconds))
        return sum(seconds) / sum(need.seconds for need in estimate.needs), plan.memory_bytes

    ratio, used = compare(1e12)
    assert ratio == pytest.approx(1, abs=1e-6), "nothing is scarce"
    ratios = [compare(share * used)[0] for share in (0.85, 0.8)]
    assert all(ratio < 1.05 for ratio in ratios)
    assert max(ratios) > 1 + 1e-6, "memory is so wide that nothing is chosen in parts: the comparison says little"


@pytest.mark.parametrize(("kind", "stages"), [("1f1b", 2), ("interleaved", 4), ("zb-v", 4)])
def test_what_crosses_by_hand(kind, stages, tmp_path):
    """Two ranks of two devices a copy, four micro-batches; from stage to stage goes [1, 32, 32] in fp32, whole. On
    nodes of three devices, one of the two pairs lies on one node; they wait for the other."""
    links = {"intra": {"bandwidth": 1e6, "latency": 1e-3}, "inter": {"bandwidth": 1e5, "latency": 1e-2}}
    graph, schedule = llama(), Schedule(kind, 2, stages, 4)
    shape = graph.root.tensors[graph.calls("llama_decoder_layer")[0].outputs[0]].shape
    size = 4 * prod(shape)
    near, far = (1e6, 1e-3), (1e5, 1e-2)
    cases = [(8, 2, near), (4, 2, far), (4, 1, near), *((per_node, 1, far) for per_node in (3, 2, 1))]
    for per_node, copies, (bandwidth, latency) in cases:
        machine = hardware(tmp_path, devices_per_node=per_node, **links)
        planner = StagePlanner(graph, machine, 1e12, None, False, None, pivots(graph))
        mesh = PipelineMesh.of([(2,)] * 2, copies)
        candidate = Candidate(schedule, even(4, stages), (REPLICATE,), mesh, splits=copies > 1)
        way = latency + size / bandwidth
        ranks = [schedule.rank_of(stage) for stage in range(stages)]
        expected = [way if one != other else 0.0 for one, other in pairwise(ranks)]
        assert planner._transfers(candidate) == pytest.approx(expected)
    plan = planner.plan(planner.estimate(candidate))
    assert plan is not None
    assert [list(names) for names in plan.crossing] == [[f"layers_{4 * i // stages - 1}"] for i in range(1, stages)]
    for index, stage in enumerate(plan.stages):
        neighbours = (index > 0) + (index < stages - 1)
        received = stage.memory[Key("buffers", "", "received")]
        assert received == 4 * neighbours * size, "torch has a buffer for each micro-batch, there and back"
    updates = [
        sum(plan.stages[stage].seconds[key] for stage in schedule.stages_of(rank) for key in plan.stages[stage].seconds
            if key.category == "update")
        for rank in range(2)
    ]  # fmt: skip
    assert plan.step_seconds - plan.timeline.seconds == pytest.approx(4 * max(updates)), "of the whole step"
    for span in plan.timeline.spans:
        if span.work.kind in "IW":
            assert (span.end > span.start) == (span.work.kind == "I" or candidate.splits)


def test_stages_compute_in_pieces_what_does_not_fit_otherwise(tmp_path):
    graph, machine, wanted = llama(4, length=1024), hardware(tmp_path, intra=SLOW), Wanted(schedule="1f1b")
    free = find_pipeline(graph, [Mesh((2,))], machine, wanted, micro_batches=4)
    assert isinstance(free, PipelinePlan)
    assert not any(stage.pieces for stage in free.stages)
    limit = 0.4 * free.memory_bytes
    found = find_pipeline(graph, [Mesh((2,))], machine, wanted, micro_batches=4, memory=limit)
    assert isinstance(found, PipelinePlan)
    assert found.memory_bytes <= limit
    assert all(stage.pieces for stage in found.stages)


def test_stages_share_the_host(tmp_path):
    """Where the devices' memory holds a pipeline back, its stages use the host's, together no more than there is."""
    link = {"memory": 1e9, "to_host": 1e9, "to_device": 1e9, "both_ways": 8e8, "interference": 0.0}
    graph, machine = llama(8), hardware(tmp_path, intra=SLOW, host=link)

    def found(memory: float, host: float) -> PipelinePlan:
        wanted = Wanted(schedule="interleaved", stages=4)
        plan = find_pipeline(graph, [Mesh((2,))], machine, wanted, memory=memory, micro_batches=4, host=host)
        assert isinstance(plan, PipelinePlan)
        assert plan.memory_bytes <= memory * (1 + 1e-5)
        return plan

    free = found(1e12, 1e9)
    assert free.host_bytes == 0
    small = 0.68 * free.memory_bytes
    alone, away = found(small, 0.0), found(small, 1e9)
    assert away.host_bytes > 0
    assert free.step_seconds <= away.step_seconds < 0.995 * alone.step_seconds
    half = found(small, away.host_bytes / 2)
    assert 0 < half.host_bytes <= away.host_bytes / 2 * (1 + 1e-5)
    assert half.host_limit == away.host_bytes / 2
    assert away.step_seconds <= half.step_seconds <= alone.step_seconds
    predicted, pipeline = (pipeline_report(half)[what] for what in ("predicted", "pipeline"))
    stages = [sum(stage.host.values()) for stage in half.stages]
    assert [stage["host_bytes"] for stage in pipeline["stages"]] == pytest.approx(stages, rel=1e-5)
    most = max(stages[0] + stages[2], stages[1] + stages[3])  # of each of two ranks
    there = [predicted["host_bytes"], predicted["host_limit_bytes"]]
    assert there == pytest.approx([most, away.host_bytes / 2], rel=1e-5)
    assert "host_bytes" not in pipeline_report(free)["predicted"]
    parts = [forward_seconds(stage) + update_seconds(stage) for stage in away.stages]
    backward = [
        sum(seconds for key, seconds in stage.seconds.items() if "backward" in key or key.category in AGAIN)
        for stage in away.stages
    ]
    whole = [sum(stage.seconds.values()) for stage in away.stages]
    assert [a + b for a, b in zip(parts, backward)] == pytest.approx(whole), "a copy counts where it is in the way"


def test_cut_points_move_towards_equal_times():
    assert even(10, 4) == (3, 3, 2, 2)
    # A place takes 1 s; the last stage has 4 s besides its places.
    assert balanced((4, 4, 4, 4), (4, 4, 4, 8)) == (5, 5, 5, 1)
    # A place takes 2 s, as in the middle; the last stage has 3 s besides, and the first one nothing less.
    assert balanced((3, 3, 3), (3, 6, 9)) == (4, 3, 2)
    # Of two stages the last has 4 s besides.
    assert balanced((4, 4), (4, 8)) == (6, 2)
    draw = random.Random(0)
    for _ in range(100):
        counts = [draw.randint(1, 4) for _ in range(draw.randint(2, 4))]
        seconds = [draw.choice((0.01, 1, 10)) * draw.randint(1, 9) for _ in counts]
        inner = slice(1, -1) if len(counts) > 2 else slice(None)
        rate = min(total / count for total, count in list(zip(seconds, counts))[inner])

        def slowest(found, was=counts, took=seconds, rate=rate):
            return max(max(t + rate * (n - m), rate * n) for t, m, n in zip(took, was, found))

        places = sum(counts)
        ways = [way for way in product(range(1, places), repeat=len(counts)) if sum(way) == places]
        assert slowest(balanced(counts, seconds)) <= min(map(slowest, ways)) * (1 + 1e-9)


ON_FOUR = PipelineMesh.of([(1,)] * 4, 1)


class Planner(SimpleNamespace):
    """Stands for a `StagePlanner` of twelve places, which take 1 s each; the last of four stages has 4 s besides."""

    def __init__(self, refuses: tuple[int, ...] = (), plans: tuple[object, ...] = ()) -> None:
        super().__init__(begins=list(range(12)), layouts={ON_FOUR: (REPLICATE,)})
        self.refuses, self.plans, self.asked = refuses, list(plans), []

    def estimate(self, candidate: Candidate) -> Estimate:
        if candidate.counts == self.refuses:
            raise NothingFits("it is too large")
        seconds = [count + more for count, more in zip(candidate.counts, (0, 0, 0, 4))]
        return Estimate(candidate, tuple(Needs(each, 0.0, 0.0) for each in seconds), float(max(seconds)))

    def plan(self, estimate: Estimate, below: float) -> object:
        self.asked.append((estimate.candidate.counts, below))
        return self.plans.pop(0)


FOUR = Schedule("1f1b", 4, 4, 8)


def test_the_cut_points_of_an_estimate_move_while_that_makes_it_faster():
    found = estimated(Planner(), FOUR, ON_FOUR)
    assert (found.candidate.counts, found.step_seconds) == ((4, 4, 3, 1), 5.0)
    found = estimated(Planner(refuses=(4, 4, 3, 1)), FOUR, ON_FOUR)
    assert (found.candidate.counts, found.step_seconds) == ((3, 3, 3, 3), 7.0)
    slower = Planner()
    slower.estimate = lambda candidate: replace(Planner().estimate(candidate), step_seconds=sum(candidate.counts[:2]))
    assert estimated(slower, FOUR, ON_FOUR).candidate.counts == (3, 3, 3, 3), "what is even is not always faster"


def planned_stages(step_seconds: float, *seconds: float) -> SimpleNamespace:
    return SimpleNamespace(
        step_seconds=step_seconds, stages=[SimpleNamespace(seconds={"a": one - 1, "b": 1.0}) for one in seconds]
    )


def test_the_cut_points_of_a_plan_move_while_that_makes_it_faster():
    first, second, third = (planned_stages(*each) for each in ((9, 3, 3, 3, 7), (8, 4, 4, 3, 5), (7, 4, 4, 3, 5)))
    estimate = Planner().estimate(Candidate(FOUR, (3, 3, 3, 3), (REPLICATE,), ON_FOUR))
    assert planned(planner := Planner(), estimate, 7.0) is None
    assert planner.asked == [], "no plan is faster than its estimate"
    assert planned(planner := Planner(plans=(None,)), estimate, 7.5) is None
    assert planned(planner := Planner(plans=(first, None)), estimate, 20.0) is first
    assert planner.asked == [((3, 3, 3, 3), 20.0), ((4, 4, 3, 1), 9)]
    assert planned(planner := Planner(plans=(first, second, third)), estimate, 20.0) is second
    assert len(planner.asked) == 2, "where the stages are even, nothing moves"
    assert planned(Planner(refuses=(4, 4, 3, 1), plans=(first,)), estimate, 20.0) is first


def test_what_crosses_lies_as_is_fastest():
    graph, sequences = llama(), Shard(1)
    planner, mesh = StagePlanner(graph, None, 1.0, None, False, None, pivots(graph)), PipelineMesh.of([(2,)] * 4, 1)
    seconds, asked = {(REPLICATE,): 3.0, (sequences,): 1.0, (Shard(2),): 2.0}, []

    def estimate(candidate: Candidate) -> Estimate:
        asked.append(candidate.layout)
        if candidate.layout not in seconds:
            raise NothingFits("it is too large")
        return Estimate(candidate, (), seconds[candidate.layout])

    planner.estimate = estimate
    assert search._best_layout(planner, FOUR, (1, 1, 1, 1), mesh) == (sequences,)
    assert set(asked) == set(seconds), "of one sequence of 32 tokens, and 32 features"
    del seconds[sequences,]
    assert search._best_layout(planner, FOUR, (1, 1, 1, 1), mesh) == (Shard(2),)
    seconds.clear()
    with pytest.raises(NothingFits, match="it is too large"):
        search._best_layout(planner, FOUR, (1, 1, 1, 1), mesh)
    mesh = PipelineMesh.of([(1,)] * 4, 2)
    assert search._best_layout(planner, FOUR, (1, 1, 1, 1), mesh) == (REPLICATE,)


def test_candidates():
    assert candidates(Wanted(stages=1), 4, 8, 8) == [None]
    assert None not in candidates(Wanted(alone=False), 4, 8, 8)
    assert candidates(Wanted(schedule="1f1b"), 4, 8, 8) == [Schedule("1f1b", ranks, ranks, 8) for ranks in (2, 3, 4)]
    assert candidates(Wanted(schedule="interleaved"), 3, 9, 6) == [Schedule("interleaved", 3, 6, 6)]
    assert candidates(Wanted(stages=4), 4, 4, 8)[0] == Schedule("interleaved", 2, 4, 8)
    assert candidates(Wanted(), 6, 4, 8) == [
        None, Schedule("1f1b", 2, 2, 8), Schedule("interleaved", 2, 4, 8), Schedule("zb-v", 2, 4, 8),
        Schedule("dualpipe-v", 2, 4, 8), Schedule("1f1b", 3, 3, 8), Schedule("1f1b", 4, 4, 8),
    ], "on 1 or 2 devices each"  # fmt: skip
    assert candidates(Wanted(), 2, 2, 1) == [None], "one micro-batch is too few for any pipeline"
    with pytest.raises(UserError, match="1f1b with 2 stages on 2 ranks needs at least 2 micro-batches"):
        candidates(Wanted(schedule="1f1b"), 4, 8, 1)
    with pytest.raises(UserError, match=r"pipeline_schedule is 'zb-v', .* and 3 places .* allow no number of stages$"):
        candidates(Wanted(schedule="zb-v"), 4, 3, 8)
    with pytest.raises(UserError, match=r"pipeline_nstages is 1, .* allow 2 stages with 1f1b"):
        candidates(Wanted(schedule="1f1b", stages=1), 2, 8, 8)
    with pytest.raises(
        UserError, match=r"pipeline_nstages is 16, but plan_ngpus=4 and 8 places .* allow 1, 2, 3, 4, 8"
    ):
        candidates(Wanted(stages=16), 4, 8, 8)
    with pytest.raises(UserError, match=r"pipeline_nstages is 4, .* allow 2 stages with 1f1b"):
        candidates(Wanted(schedule="1f1b", stages=4), 2, 8, 8)


def test_what_is_tried_is_quiet_and_the_rest_as_before():
    """A level that was not set is not set afterwards, so that it goes on to follow that of the whole package."""
    package, room, other = (logging.getLogger(name) for name in ("nnscaler", "nnscaler.planner", "nnscaler.report"))
    before = package.level
    try:
        for level in (logging.INFO, logging.DEBUG):
            package.setLevel(level)
            with quiet("planner"):
                assert not room.isEnabledFor(logging.INFO)
                assert room.isEnabledFor(logging.WARNING)
                assert other.isEnabledFor(level)
            assert room.isEnabledFor(level)
    finally:
        package.setLevel(before)
