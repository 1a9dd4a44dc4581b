"""Which schedules are tried on which meshes, in which order, with what, and how long; by figures, without plans."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nnscaler import UserError
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.pipeline import search
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.search import Wanted, find_pipeline
from nnscaler.pipeline.stages import StagePlanner
from nnscaler.planner import NotFaster, NothingFits
from nnscaler.schedules import Schedule
from nnscaler.searched import Searched
from tests.pipeline.test_cut import llama
from tests.pipeline.test_search import hardware


def test_what_promises_most_is_tried_first_and_the_fastest_is_taken(monkeypatch):
    on = [
        search._On(Schedule("1f1b", ranks, ranks, 8), PipelineMesh.of([(16 // ranks,)] * ranks, 1))
        for ranks in (2, 4, 8)
    ]
    promised, takes, asked = {2: 3.0, 4: 1.0, 8: 2.0}, {2: 6.0, 4: 9.0, 8: None}, []

    def estimate(planner, schedule, mesh, splits):
        assert planner == "the planner"
        candidate = SimpleNamespace(schedule=schedule, mesh=mesh)
        return SimpleNamespace(step_seconds=promised[schedule.ranks], candidate=candidate)

    def plan(planner, estimate, below):
        ranks = estimate.candidate.schedule.ranks
        asked.append((ranks, below))
        return None if takes[ranks] is None else SimpleNamespace(step_seconds=takes[ranks])

    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(search, "planned", plan)
    one = search._Search(SimpleNamespace(step_seconds=10.0), "")
    one.among(on, "the planner")
    assert asked == [(4, 10.0), (8, 9.0), (2, 9.0)]
    assert one.best.step_seconds == 6.0
    promised[2] = 6.0 * 0.9951  # at least a 200th has to be saved
    assert one.gaining(on[:1], "the planner") == []
    promised[2] = 6.0 * 0.9949
    assert one.gaining(on[:1], "the planner") == on[:1]
    one.best.step_seconds, promised = 10.0, promised | {2: 9.0}
    ranked = sorted(on, key=lambda each: promised[each.schedule.ranks])
    assert one.gaining(on, "the planner") == ranked != on, "what promises most comes first"
    assert search._Search(None, "").gaining(on, "the planner") == on


def test_what_could_gain_is_told_by_a_backward_in_two_parts_where_there_is_one(monkeypatch):
    asked = []

    def estimate(planner, schedule, mesh, splits):
        asked.append((schedule.kind, splits))
        return SimpleNamespace(step_seconds=9.0 if splits else 10.0)

    monkeypatch.setattr(search, "estimated", estimate)
    mesh = PipelineMesh.of([(1,), (1,)], 1)
    on = [search._On(Schedule(kind, 2, stages, 8), mesh) for kind, stages in (("zb-v", 4), ("1f1b", 2))]
    one = search._Search(SimpleNamespace(step_seconds=10.0), "")
    assert one.gaining(on, "the planner") == on[:1]
    assert asked == [("zb-v", True), ("1f1b", False)]


def test_what_is_refused_when_it_is_estimated_or_planned_keeps_no_other_from_being_tried(monkeypatch):
    on = [
        search._On(Schedule("1f1b", ranks, ranks, 8), PipelineMesh.of([(4, 16 // ranks)] * ranks, 1))
        for ranks in (2, 4, 8)
    ]

    def estimate(planner, schedule, mesh, splits):
        if schedule.ranks == 8:
            raise NothingFits("it is too large")
        return SimpleNamespace(
            step_seconds=1.0 * schedule.ranks, candidate=SimpleNamespace(schedule=schedule, mesh=mesh)
        )

    def plan(planner, estimate, below):
        if estimate.candidate.schedule.ranks == 2:
            raise NothingFits("it is larger")
        return SimpleNamespace(step_seconds=6.0)

    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(search, "planned", plan)
    one = search._Search(None, "")
    one.among(on[2:], None)
    assert one.refused == f"{on[2].schedule}, 4 outer x 2 inner: it is too large"
    one.among(on, None)
    assert (one.best.step_seconds, one.refused) == (6.0, f"{on[0].schedule}, 4 outer x 8 inner: it is larger")
    over = search._Search(None, "", until=-1.0, below=9.0, hurries=True)
    over.among(on, None)
    assert over.best is None
    assert over.gaining(on, None) == []


def test_when_time_is_out_one_estimate_is_planned_and_others_only_where_there_is_no_plan(monkeypatch):
    on = [
        search._On(Schedule("1f1b", ranks, ranks, 8), PipelineMesh.of([(16 // ranks,)] * ranks, 1))
        for ranks in (2, 4, 8)
    ]
    clock, planned = SimpleNamespace(now=0.0), []

    def estimate(planner, schedule, mesh, splits):
        return SimpleNamespace(
            step_seconds=1.0 * schedule.ranks, candidate=SimpleNamespace(schedule=schedule, mesh=mesh)
        )

    def plan(planner, estimate, below):
        clock.now = 5.0
        planned.append(estimate.candidate.schedule.ranks)
        if planned[-1] == 2:
            raise NothingFits("it is too large")
        return SimpleNamespace(step_seconds=9.0)

    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(search, "planned", plan)
    monkeypatch.setattr(search, "time", SimpleNamespace(process_time=lambda: clock.now))
    one = search._Search(None, "", until=5.0)
    one.among(on, None)
    assert planned == [2, 4], "the first does not fit; the second does, and time is out"
    assert one.findings.found == [(5.0, 9.0)]
    one.among(on, None)
    assert planned == [2, 4], "there is a plan, and no time"


def test_what_is_needed_without_a_pipeline_is_known_where_none_fits():
    alone = NothingFits("it needs 7 B")
    alone.needed = 7.0
    found = search._nothing_fits(alone, "the last: no")
    assert found.needed == 7.0
    assert str(found) == "it needs 7 B; no pipeline fits; the last that was tried, the last: no"
    assert search._nothing_fits(UserError("not so"), "").needed is None
    assert str(search._nothing_fits(None, "this: no")) == "no pipeline fits; the last that was tried, this: no"


def test_where_nothing_takes_less_than_is_asked_for_that_is_said(monkeypatch, tmp_path):
    """Only what could take a 200th less is tried."""
    graph, machine, tried = llama(), hardware(tmp_path), []

    def without(*given, **named):
        raise NotFaster(9.0)

    def estimate(planner, schedule, mesh, splits):
        seconds = 6.96 if schedule.kind == "zb-v" else 6.97
        return SimpleNamespace(step_seconds=seconds, candidate=SimpleNamespace(schedule=schedule, mesh=mesh))

    monkeypatch.setattr(search, "find_plan", without)
    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(search, "planned", lambda planner, estimate, below: tried.append((estimate, below)))
    with pytest.raises(NotFaster) as refusal:
        find_pipeline(graph, [Mesh((2,))], machine, Wanted(), micro_batches=4, below=7.0)
    assert refusal.value.bound == 7.0
    assert {(estimate.candidate.schedule.kind, below) for estimate, below in tried} == {("zb-v", 7.0)}
    found = SimpleNamespace(step_seconds=6.0, gap=0.0)
    monkeypatch.setattr(search, "planned", lambda *given: found)
    assert find_pipeline(graph, [Mesh((2,))], machine, Wanted(), micro_batches=4, below=7.0) is found
    with pytest.raises(UserError, match="pipeline_pivots has 'Nothing'"):
        find_pipeline(graph, [Mesh((2,))], machine, Wanted(("Nothing",)), micro_batches=4)


def test_each_search_gets_all_that_it_may_use(monkeypatch, tmp_path):
    """Without a pipeline, with one, and with one that saves memory at a price."""
    graph, machine, times = llama(8), hardware(tmp_path), object()
    alone, tried = [], []

    def without(graph, meshes, hardware, **given):
        assert not logging.getLogger("nnscaler.planner").isEnabledFor(logging.INFO)
        alone.append((graph, meshes, hardware, given))
        return SimpleNamespace(step_seconds=10.0, gap=0.0, searched=Searched(1.0, False))

    def estimate(planner, schedule, mesh, splits):
        if len(mesh.ranks[0].sizes) > 1:
            return SimpleNamespace(step_seconds=9.96)
        tried.append((schedule.ranks, planner))
        assert mesh == PipelineMesh.of([(4 // schedule.ranks,)] * schedule.ranks, 3)
        if not planner.sparing and planner.memory < math.inf:
            raise UserError("it is too large")
        seconds = {2: 9.96, 4: 9.94}[schedule.ranks]
        return SimpleNamespace(step_seconds=seconds, candidate=SimpleNamespace(schedule=schedule, mesh=mesh))

    def moved(planner, schedule, mesh):
        return SimpleNamespace(step_seconds=9.96, candidate=SimpleNamespace(schedule=schedule, mesh=mesh))

    monkeypatch.setattr(search, "with_devices_moved", moved)

    monkeypatch.setattr(search, "find_plan", without)
    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(search, "planned", lambda *given: None)
    given = {"recompute_modules": ("LlamaMLP",), "micro_batches": 4, "fused": True, "times": times, "sums": "sums"}
    meshes = [Mesh((4,), 3)]
    found = find_pipeline(graph, meshes, machine, Wanted(), **given, memory=7.0, seconds=1e6, host=5.0)
    assert (found.searched.limit, found.searched.stopped) == (1e6, False)
    assert [step for _, step in found.searched.found] == [10.0]
    assert {planner.sums for _, planner in tried} == {"sums"}
    assert alone == [(graph, meshes, machine, {**given, "memory": 7.0, "seconds": 5e5, "host": 5.0, "below": math.inf})]
    kinds = {(planner.memory, planner.host, planner.sparing, planner.groups) for _, planner in tried}
    assert kinds == {(7.0, 0.0, False, False), (math.inf, 0.0, False, False), (7.0, 5.0, True, True)}
    for _, planner in tried:
        assert (planner.graph, planner.hardware, planner.times) == (graph, machine, times)
        assert (planner.recompute_modules, planner.fused) == (("LlamaMLP",), True)
        assert 0 < planner.until - 1e6 < time.process_time()
        assert planner.begins == pivots(graph)
    assert {ranks for ranks, _ in tried} == {2, 4}
    assert {ranks for ranks, planner in tried if planner.sparing} == {4}, "two could save less than a 200th"
    by_memory = {memory: {id(one.estimated) for _, one in tried if one.memory == memory} for memory in (7.0, math.inf)}
    assert not by_memory[7.0] & by_memory[math.inf], "what was found for less memory is another estimate"
    tried.clear()
    find_pipeline(graph, meshes, machine, Wanted(), micro_batches=4)
    assert {planner.memory for _, planner in tried} <= {0.9 * machine.memory, math.inf}
    tried.clear()
    assert find_pipeline(graph, meshes, machine, Wanted(), micro_batches=4, seconds=0.0).searched.stopped
    assert tried == [], "time is out, and there is a plan"
    alone.clear()
    monkeypatch.setattr(search, "estimated", lambda planner, *given: estimate(replace(planner, sparing=False), *given))
    with pytest.raises(NothingFits, match=r"no pipeline fits; the last that was tried, 1f1b, 4 stages .*: it is too l"):
        find_pipeline(graph, meshes, machine, Wanted(schedule="1f1b"), micro_batches=4, seconds=0.0)
    assert alone == [], "a schedule that is asked for is a pipeline"
    with pytest.raises(UserError, match="recompute_modules names 'Nothing'"):
        find_pipeline(graph, meshes, machine, Wanted(schedule="1f1b"), recompute_modules=("Nothing",), micro_batches=4)


def not_moved(planner, schedule, mesh):
    """Stands for `with_devices_moved`, where devices stay in equal numbers."""
    return SimpleNamespace(candidate=SimpleNamespace(schedule=schedule, mesh=PipelineMesh.of([(2,)] * 2, 1)))


def test_devices_of_a_stage_are_two_axes_where_that_could_be_faster_and_time_is_left(monkeypatch, tmp_path):
    """Of eight devices, two ranks have four each. Two axes may take 9.9 s of a step, where one axis takes 10."""
    machine, wanted, tried = hardware(tmp_path), Wanted(schedule="1f1b", stages=2), []
    one, two = (PipelineMesh.of([sizes] * 2, 1) for sizes in ((4,), (2, 2)))
    takes = {one: 10.0, two: 9.9}

    def estimate(planner, schedule, mesh, splits):
        assert schedule == Schedule("1f1b", 2, 2, 4)
        tried.append((mesh, planner.memory == math.inf, planner.sparing))
        if mesh == one and takes[one] == math.inf:
            raise NothingFits("it is too large")
        candidate = SimpleNamespace(schedule=schedule, mesh=mesh)
        return SimpleNamespace(step_seconds=takes[mesh], candidate=candidate, mesh=mesh, gap=0.0)

    monkeypatch.setattr(search, "with_devices_moved", not_moved)
    monkeypatch.setattr(search, "estimated", estimate)
    monkeypatch.setattr(
        search, "planned",
        lambda planner, estimate, below: estimate if takes[estimate.mesh] < below else None,
    )  # fmt: skip

    def found(seconds: float = 1e6) -> PipelineMesh:
        tried.clear()
        return find_pipeline(llama(), [Mesh((8,))], machine, wanted, micro_batches=4, seconds=seconds).mesh

    assert found() == two
    alone = [(one, False, False), (one, True, False)]
    assert tried == [*alone, (two, True, False), (two, False, False), (two, True, False)]
    takes[two] = 9.96
    assert found() == one
    assert tried == [*alone, (two, True, False)], "less than a 200th is not worth it"
    takes[two] = 9.9
    assert found(seconds=0.0) == one
    assert tried == alone[:1], "time is out"
    wanted = replace(wanted, plain=True)
    assert found() == one
    assert tried == alone, "others are not wanted"
    wanted = replace(wanted, plain=False)
    assert found() == two
    assert {mesh for mesh, *_ in tried} == {two}
    wanted = replace(wanted, plain=None)
    takes[one] = math.inf
    assert found(seconds=0.0) == two, "nothing fits on one axis"


def test_layouts_of_what_crosses_are_compared_as_long_as_there_is_time():
    graph = llama()
    planner = StagePlanner(graph, None, 1.0, None, False, None, pivots(graph), until=0.0)
    mesh = PipelineMesh.of([(2, 2)] * 2, 1)
    asked = []

    def estimate(candidate):
        asked.append(candidate.layout)
        if len(asked) == 1:
            raise NothingFits("it is too large")
        return SimpleNamespace(step_seconds=1.0)

    planner.estimate = estimate
    assert search._best_layout(planner, Schedule("1f1b", 2, 2, 4), (2, 2), mesh) == asked[1]
    assert len(asked) == 2, "until there is one"


def uneven(*sizes: int, copies: int = 1) -> PipelineMesh:
    return PipelineMesh.of([(size,) for size in sizes], copies)


def test_devices_are_halved_at_first_until_each_rank_has_some():
    assert search.halved(3, 2) == (2, 1)
    assert search.halved(6, 2) == (3, 3)
    assert search.halved(8, 3) == (2, 2, 4)
    assert search.halved(5, 4) == (1, 1, 1, 2)


def test_a_device_moves_from_the_fastest_to_the_slowest_first():
    """Or ranks exchange their devices."""
    assert search.moves(uneven(2, 1, copies=3), [1.0, 2.0]) == [uneven(1, 2, copies=3)]
    assert search.moves(uneven(2, 1, 4), [1.0, 3.0, 2.0]) == [
        uneven(1, 2, 4), uneven(2, 2, 3), uneven(2, 4, 1), uneven(1, 1, 5), uneven(3, 1, 3), uneven(4, 1, 2)
    ]  # fmt: skip
    assert len(search.moves(uneven(*[2] * 9), [1.0] * 9)) == search._MOST_MOVES
    assert search.moves(uneven(1, 1), [1.0, 2.0]) == []


def test_devices_move_while_that_makes_the_step_faster(monkeypatch):
    """Four ranks' seconds are such that the last is slow, until it has three devices."""
    takes = {(2, 1, 1, 2): 9.0, (1, 1, 1, 3): 7.0, (2, 1, 1, 3): None}
    asked = []

    def estimate(planner, schedule, mesh):
        sizes = tuple(one.plan_ngpus for one in mesh.ranks)
        asked.append(sizes)
        if takes.get(sizes, 10.0) is None:
            raise NothingFits("it is too large")
        needs = [SimpleNamespace(seconds=seconds) for seconds in (1.0, 2.0, 3.0, 4.0)]
        candidate = SimpleNamespace(schedule=schedule, mesh=mesh)
        return SimpleNamespace(step_seconds=takes.get(sizes, 10.0), needs=needs, candidate=candidate)

    monkeypatch.setattr(search, "estimated", estimate)
    planner, schedule = SimpleNamespace(until=math.inf), Schedule("1f1b", 4, 4, 8)
    found = search.with_devices_moved(planner, schedule, uneven(2, 1, 1, 2))
    assert found.candidate.mesh == uneven(1, 1, 1, 3)
    assert asked[:2] == [(2, 1, 1, 2), (1, 1, 1, 3)]
    assert len(asked) == len(set(asked)), "none is tried twice"
    assert (1, 1, 2, 2) in asked, "from the best, another"
    asked.clear()
    planner.until = 0.0
    assert search.with_devices_moved(planner, schedule, uneven(2, 1, 1, 2)).step_seconds == 9.0
    assert len(asked) == 1, "time is out"
    planner.until, takes[2, 1, 1, 2] = math.inf, None
    assert search.with_devices_moved(planner, schedule, uneven(2, 1, 1, 2)).step_seconds == 7.0
    takes.clear()
    takes.update(dict.fromkeys([(2, 1), (1, 2)]))
    with pytest.raises(NothingFits, match="it is too large"):
        search.with_devices_moved(planner, Schedule("1f1b", 2, 2, 8), uneven(2, 1))


def test_unequal_numbers_of_devices_are_tried_last_and_by_1f1b_alone(tmp_path):
    rounds = list(search._rounds(
        [Schedule("1f1b", 2, 2, 8), Schedule("zb-v", 2, 4, 8), Schedule("1f1b", 3, 3, 8), Schedule("1f1b", 4, 4, 8)],
        Mesh((4,), 2), hardware(tmp_path),
    ))  # fmt: skip
    assert [optional for optional, _ in rounds] == [False, True, True]
    assert [(one.schedule.ranks, one.mesh) for one in rounds[0][1]] == [
        (2, uneven(2, 2, copies=2)), (2, uneven(2, 2, copies=2)), (4, uneven(1, 1, 1, 1, copies=2))
    ]  # fmt: skip
    assert rounds[1][1] == [], "two devices are one axis"
    assert [(one.schedule.kind, one.mesh, one.moves) for one in rounds[2][1]] == [
        ("1f1b", uneven(2, 2, copies=2), True), ("1f1b", uneven(1, 1, 2, copies=2), True)
    ]  # fmt: skip
