"""The search over divisions: with plans whose times are written here, and with the planner's own."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from nnscaler import compiler, division_search, loaded
from nnscaler.batch import Batch, Division
from nnscaler.compiler import compile_model
from nnscaler.config import ComputeConfig
from nnscaler.division_search import Divided, Tried, divide, in_division
from nnscaler.errors import UserError
from nnscaler.loaded import division_in
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.plan import GIB
from nnscaler.planner import NotFaster, NothingFits
from nnscaler.planning import plan_for, traced
from nnscaler.report import explain, read_plan
from nnscaler.report.divisions import division_lines, division_rows, division_section
from nnscaler.source import Source
from tests import tiny

FOUR = Mesh((4,))
TINY = tiny.config()
INPUTS = {name: torch.empty((1, tiny.LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}


def source(config: LlamaConfig = TINY) -> Source:
    prepare_config(config, tiny.LENGTH, "eager")
    return Source(lambda: CausalLM(config), INPUTS, torch.float32, tokens=tiny.LENGTH, length=tiny.LENGTH)


class World:
    """A planner whose answers are given. All are by (devices a copy, size of micro-batches).

    bounds  seconds of a step, or what is raised, on one mesh axis
    wide    likewise on two, where that is not 7 s, or what is raised on one
    one     of a step, on one mesh axis
    more    likewise, on two
    pipes   likewise, as a pipeline
    others  likewise, whose ranks have several axes, or devices in unequal numbers
    """

    def __init__(self, monkeypatch, bounds, one=None, more=None, pipes=None, others=None, wide=None):
        self.asked: list[tuple] = []
        self.seconds: list[float] = []  # given to each search
        self.now = 0.0
        answers = {"one": one or {}, "more": more or {}, "pipeline": pipes or {}, "others": others or {}}

        def bound_for(graph, config, hardware, times, mesh):
            self.now += 1.0
            assert config.micro_batches * graph * 4 // config.plan_ngpus == 8, "the batch is divided"
            answer = bounds[config.plan_ngpus, graph]
            if len(mesh.sizes) > 1:
                answer = (wide or {}).get((config.plan_ngpus, graph), answer if isinstance(answer, Exception) else 7.0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        def plan_for(graph, config, hardware, times, meshes, alone, below, plain):
            self.now += 10.0
            assert plain or not alone
            kind = ("pipeline" if plain else "others") if not alone else "one" if len(meshes[0].sizes) == 1 else "more"
            assert config.explore_pipeline == (not alone)
            assert not alone or len({len(mesh.sizes) for mesh in meshes}) == 1
            assert kind != "one" or len(meshes) == 1
            rooms = [logging.getLogger(f"nnscaler.{room}") for room in ("planner", "pipeline", "planning")]
            assert not any(room.isEnabledFor(logging.INFO) for room in rooms), "they are quiet meanwhile"
            assert not alone or (config.pipeline_schedule, config.pipeline_nstages, config.pipeline_pivots) == (
                None, None, ()
            )  # fmt: skip
            self.seconds.append(config.search_seconds)
            self.asked.append((kind, config.plan_ngpus, graph, below))
            answer = answers[kind].get((config.plan_ngpus, graph), 0.0)
            if isinstance(answer, Exception):
                raise answer
            if not answer or answer >= below:
                raise NotFaster(bounds[config.plan_ngpus, graph] - 0.5 if alone else below)
            return SimpleNamespace(
                step_seconds=answer, bound=answer - 0.25, memory_bytes=GIB, memory_limit=2 * GIB, gap=0.0, searched=None
            )  # fmt: skip

        monkeypatch.setattr(division_search, "bound_for", bound_for)
        monkeypatch.setattr(division_search, "plan_for", plan_for)
        monkeypatch.setattr(division_search, "traced", lambda source, strategy: source.inputs["input_ids"].shape[0])
        monkeypatch.setattr(division_search, "time", SimpleNamespace(process_time=lambda: self.now))
        self.hardware = SimpleNamespace(devices_per_node=8, name="Test")
        self.times = None

    def divide(self, batch=None, **changes):
        config = ComputeConfig(1, 4, **changes)
        return divide(batch or Batch(8, 4), source(), config, self.hardware, self.times)


BOUNDS = {
    (1, 1): 10.0, (1, 2): 9.0, (2, 1): 12.0, (2, 2): 8.0, (2, 4): 7.9, (4, 1): 20.0, (4, 2): 13.0, (4, 4): 7.99,
    (4, 8): 30.0,
}  # fmt: skip


def test_those_that_promise_most_are_planned_first_and_the_rest_is_not(monkeypatch):
    world = World(monkeypatch, BOUNDS, {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07})
    found = world.divide()
    assert world.asked[:3] == [("one", 2, 4, float("inf")), ("one", 4, 4, float("inf")), ("one", 2, 2, float("inf"))]
    assert (found.config.plan_ngpus, found.config.micro_batches) == (2, 2), "4 devices save less than 0.5 %"
    assert found.source.inputs["input_ids"].shape == (2, tiny.LENGTH)
    assert found.source.tokens == 2 * tiny.LENGTH
    assert found.tried[0].division == Division(2, 2, 2)
    more = [("more", 4, size) for size in (4, 2, 1, 8)]
    assert [asked[:3] for asked in world.asked[3:]] == more, (
        "those of the lowest bounds first; two devices have one axis"
    )
    order = [(one.division.plan_ngpus, one.division.micro_batch_size) for one in found.tried]
    assert order == [(2, 2), (4, 4), (2, 4), (1, 2), (1, 1), (2, 1), (4, 2), (4, 1), (4, 8)], "by time, or by bound"
    assert {below for *_, below in world.asked[3:]} == {8.05 * 0.995}


def test_timing_operators_takes_nothing_of_the_time_to_search(monkeypatch):
    """Of 30 s, nine bounds take 9, and each plan 10: so there are three, however long operators are timed."""
    one = {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07}
    world = World(monkeypatch, BOUNDS, one)
    world.now, world.times = 500.0, SimpleNamespace(spent=12.0)
    found = world.divide(search_seconds=10.0)
    assert [asked[1:3] for asked in world.asked] == [(2, 4), (4, 4), (2, 2)]
    assert found.config.plan_ngpus == 2

    def slow(graph, config, hardware, times, mesh):
        times.spent += 12.0
        world.now += 12.0
        return bound(graph, config, hardware, times, mesh)

    bound = division_search.bound_for
    monkeypatch.setattr(division_search, "bound_for", slow)
    asked = world.asked.copy()
    world.asked.clear()
    world.divide(search_seconds=10.0)
    assert world.asked == asked


def test_a_bound_is_near_the_fastest_plan_up_to_a_fiftieth(monkeypatch):
    """One device a copy is planned at 8.2 s, and not at 8.23: more than 1.02 times the 8.05 s of the fastest."""
    one = {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07}
    for bound, planned in ((8.2, True), (8.23, False)):
        world = World(monkeypatch, {**BOUNDS, (1, 2): bound}, one)
        world.divide()
        assert (("one", 1, 2, float("inf")) in world.asked) == planned


def test_the_log_says_what_is_looked_for_and_what_comes_next(monkeypatch, caplog):
    caplog.set_level("INFO", logger="nnscaler")
    World(monkeypatch, BOUNDS, {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07}).divide(search_seconds=10.0)
    first, *_, last = caplog.messages
    assert first == (
        "looking for the fastest of 9 ways to divide 8 sequences among 4 devices; that takes at most about 30 s"
    )
    assert last == (
        "chosen: 2 devices a copy, 2 x 2 sequences, 8.07 s a step; "
        "next comes 4 devices a copy, 2 x 4 sequences, 8.05 s, which is less than 0.5 % faster"
    )
    caplog.clear()
    World(monkeypatch, BOUNDS, {(2, 4): 8.1, (4, 4): NothingFits(), (2, 2): UserError("dp cannot")}).divide()
    assert caplog.messages[1:4] == [
        "2 devices a copy, 1 x 4 sequences: 8.1 s a step", "4 devices a copy, 2 x 4 sequences: does not fit",
        "2 devices a copy, 2 x 2 sequences: dp cannot",
    ]  # fmt: skip
    assert caplog.messages[-1] == "chosen: 2 devices a copy, 1 x 4 sequences, 8.1 s a step"
    World(monkeypatch, BOUNDS, {(2, 4): 8.1, (4, 4): 8.3}).divide()
    assert caplog.messages[-1].endswith("8.1 s a step; next comes 4 devices a copy, 2 x 4 sequences, 8.3 s")


def test_two_axes_and_pipelines_may_be_faster(monkeypatch):
    one = {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07}
    found = World(monkeypatch, BOUNDS, one, more={(4, 2): 7.0}).divide()
    assert (found.plan.step_seconds, found.config.plan_ngpus, found.config.micro_batches) == (7.0, 4, 4)
    world = World(monkeypatch, BOUNDS, one, pipes={(2, 2): 7.5})
    found = world.divide(explore_pipeline=True, search_seconds=100.0)
    assert (found.plan.step_seconds, found.tried[0].pipeline, found.tried[0].division) == (7.5, True, Division(2, 2, 2))
    pipelines = [asked[1:3] for asked in world.asked if asked[0] == "pipeline"]
    # Stages of two devices: 8 s with two sequences, and a fourth of it idle, are 10 s. Likewise 11.85, 12.5, and twice
    # 13.5. With one micro-batch there is no pipeline.
    assert pipelines == [(4, 2), (4, 4), (2, 1), (2, 2), (4, 1)]
    below = [asked[-1] for asked in world.asked if asked[0] == "pipeline"]
    assert below == [8.05 * 0.995] * 4 + [7.5 * 0.995]
    others = [asked[1:] for asked in world.asked if asked[0] == "others"]
    assert others == [(*which, 7.5 * 0.995) for which in pipelines], "after all that are even, in the same order"
    found = World(monkeypatch, BOUNDS, one, pipes={(2, 2): 7.5}, others={(2, 2): 7.4, (4, 1): 7.2}).divide(
        explore_pipeline=True, search_seconds=100.0
    )
    assert (found.plan.step_seconds, found.tried[0].pipeline, found.tried[0].division) == (7.2, True, Division(4, 1, 8))
    beyond = {"pipes": {(4, 1): UserError("not so")}, "others": {(4, 1): 7.4}}
    found = World(monkeypatch, BOUNDS, one, **beyond).divide(explore_pipeline=True, search_seconds=100.0)
    assert (found.plan.step_seconds, found.tried[0].refusal) == (7.4, "")
    assert [one.bound for one in found.tried if one.pipeline and not one.plan] == [0.0] * 4, (
        "that there is none, is not known"
    )
    world = World(monkeypatch, BOUNDS, pipes={(4, 2): NothingFits(), (4, 1): 9.5})
    found = world.divide(explore_pipeline=True, search_seconds=100.0)
    assert {kind for kind, *_ in world.asked} == {"one", "more", "pipeline", "others"}
    assert found.plan.step_seconds == 9.5
    assert {one.bound for one in found.tried if one.pipeline and not one.plan} == {0.0}
    world = World(monkeypatch, BOUNDS, pipes={(4, 1): 9.5})
    found = world.divide(explore_pipeline=True, pipeline_schedule="1f1b")
    assert {kind for kind, *_ in world.asked} == {"pipeline", "others"}, "the user wants one"
    assert found.plan.step_seconds == 9.5


def test_pipelines_that_promise_most_come_first_where_no_copy_is_as_small_as_a_stage(monkeypatch):
    """Of copies of four devices alone: 20 s and an eighth of it idle, 13 and a quarter, 7.99 and half."""
    given = {key: bound for key, bound in BOUNDS.items() if key[0] == 4}
    world = World(monkeypatch, given, pipes={(4, 1): 9.5})
    world.divide(Batch(8, 4, plan_ngpus=4), explore_pipeline=True, pipeline_schedule="1f1b")
    assert [asked[1:3] for asked in world.asked if asked[0] == "pipeline"] == [(4, 4), (4, 2), (4, 1)]
    full = NothingFits()
    unfit = {key: full if key[0] < 4 else bound for key, bound in BOUNDS.items()}
    world = World(monkeypatch, unfit, pipes={(4, 1): 9.5})
    world.divide(explore_pipeline=True, pipeline_schedule="1f1b")
    # With two devices a copy: 20 s and a fourth of it idle, and 13 and half of it, which is 19.5.
    order = [asked[1:3] for asked in world.asked if asked[0] == "pipeline"]
    assert order == [(4, 4), (4, 2), (2, 2), (4, 1), (2, 1)]


@pytest.mark.parametrize(("launch", "best"), [(0.0, Division(2, 1, 4)), (1e-3, Division(2, 2, 2))])
def test_sizes_of_micro_batches_are_compared_as_pipelines(tmp_path, launch, best):
    """Two stages take five times as long as one of four small micro-batches, or three times one of two larger ones.
    Where arithmetic takes all the time, that is 5 to 6; where starting operators does, 5 to 3."""
    link = {"bandwidth": 1e12, "latency": 0.0}
    config = ComputeConfig(
        1, 2, hardware=tiny.write_hardware(tmp_path, launch=launch, intra=link), explore_pipeline=True,
        pipeline_schedule="1f1b",
    )  # fmt: skip
    found = divide(Batch(4, 2, plan_ngpus=2), source(), config, config.find_hardware(), None)
    first, *others = found.tried
    assert (first.division, first.pipeline) == (best, True)
    assert {one.division.micro_batch_size for one in others if one.pipeline} == {1, 2} - {best.micro_batch_size}


def test_what_does_not_fit_is_told_and_more_sequences_are_not_tried(monkeypatch):
    full = NothingFits("no")
    full.needed = 5 * GIB
    bounds = {key: value for key, value in BOUNDS.items() if key[0] > 1} | {
        (1, 1): full,
        (2, 1): UserError("dp cannot"),
    }
    found = World(monkeypatch, bounds, {(2, 4): 8.1, (4, 4): full, (2, 2): 8.2}, {(4, 4): full}).divide()
    assert {one.bound for one in found.tried if one.needed or one.refusal} == {float("inf")}
    said = {tuple(row[name] for name in ("plan_ngpus", "micro_batch_size")): row for row in division_rows(found, 32)}
    assert said[2, 4]["why"] == "chosen"
    assert said[2, 2]["why"] == "1.2 % slower"
    assert (said[2, 2]["step_seconds"], said[2, 2]["memory_bytes"], said[2, 2]["copies"]) == (8.2, GIB, 2)
    assert said[2, 2]["tokens_per_second_per_gpu"] == 8 * 32 / 8.2 / 4
    for unfit in (1, 1), (1, 2), (4, 4):
        assert said[unfit]["why"] == "does not fit: 3.00 GiB too much, or more"
    assert said[2, 1]["why"] == "dp cannot"
    assert (said[4, 8]["why"], said[4, 8]["bound_seconds"]) == ("at least 264.2 % slower", 29.5)


def test_where_memory_is_not_what_is_wrong_the_largest_copies_say_what_is(monkeypatch):
    """Of which most numbers of stages are allowed, say."""

    def advise(source, graph, config, hardware, times):
        raise UserError(f"{config.plan_ngpus} devices, {config.micro_batches} micro-batches")

    monkeypatch.setattr(division_search, "plan_or_advise", advise)
    world = World(monkeypatch, dict.fromkeys(BOUNDS, UserError("no such number of stages")))
    with pytest.raises(UserError, match="4 devices, 8 micro-batches"):
        world.divide()


def test_the_search_ends_in_time_with_the_best_so_far(monkeypatch):
    world = World(monkeypatch, BOUNDS, {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07})
    found = world.divide(search_seconds=1.0)
    assert world.asked == [("one", 2, 2, float("inf"))], "of nine divisions four were looked at, and the best planned"
    assert "not tried: time was out" in {row["why"] for row in division_rows(found, 32)}
    world.asked.clear()
    world.now = 0.0
    world.divide(search_seconds=4.0)
    assert world.asked == [("one", 2, 4, float("inf"))], "all nine have bounds after nine seconds of twelve"
    found = World(monkeypatch, {**BOUNDS, (1, 1): UserError("dp cannot")}, {(1, 2): 9.1}).divide(search_seconds=0.1)
    assert found.tried[0].division == Division(1, 2, 1), "no earlier than with one that may be possible"


def test_each_search_has_its_time_and_pipelines_have_half_of_what_is_left(monkeypatch):
    """All bounds are known after 9 s, and each search takes 10."""
    one = {(2, 4): 8.1, (4, 4): 8.05, (2, 2): 8.07}
    world = World(monkeypatch, BOUNDS, one)
    world.divide(search_seconds=10.0)
    assert world.seconds == [10.0, 10.0, division_search.LEAST_SECONDS], "21 s are left, 11, and 1"
    world = World(monkeypatch, BOUNDS, one)
    world.divide(search_seconds=20.0)
    assert [kind for kind, *_ in world.asked] == ["one"] * 3 + ["more"] * 3, "51 s"
    world = World(monkeypatch, BOUNDS, one)
    world.divide(search_seconds=20.0, explore_pipeline=True)
    assert [kind for kind, *_ in world.asked] == ["one"] * 3 + ["more"] * 2 + ["pipeline"]
    world = World(monkeypatch, BOUNDS, one)
    world.divide(search_seconds=70 / 3, explore_pipeline=True)
    assert [kind for kind, *_ in world.asked] == ["one"] * 3 + ["more"] * 2 + ["pipeline"] * 2, "31 s"


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [({"pipeline_nstages": 1}, {"one", "more"}), ({"pipeline_nstages": 2}, {"pipeline", "others"}),
     ({"pipeline_pivots": ("Layer",)}, {"one", "more", "pipeline", "others"})],
)  # fmt: skip
def test_only_what_the_user_allows_is_planned(wanted, kinds, monkeypatch):
    world = World(monkeypatch, BOUNDS, {(2, 4): 8.1}, pipes={(4, 1): 9.5})
    world.divide(explore_pipeline=True, search_seconds=100.0, **wanted)
    assert {kind for kind, *_ in world.asked} == kinds


def test_each_size_of_micro_batch_is_traced_once_with_the_strategy_asked_for(monkeypatch):
    world, told = World(monkeypatch, BOUNDS, {(2, 4): 8.1}), []

    def traced(source: Source, strategy: str) -> int:
        told.append((source.inputs["input_ids"].shape[0], strategy))
        return told[-1][0]

    monkeypatch.setattr(division_search, "traced", traced)
    found = world.divide(trace_strategy="cpu")
    assert told == [(size, "cpu") for size in (1, 2, 4, 8)]
    assert found.graph == 4


def planned(seconds: float) -> SimpleNamespace:
    return SimpleNamespace(step_seconds=seconds, memory_bytes=GIB, memory_limit=2 * GIB)


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        (Tried(Division(2, 1, 4), plan=planned(9.96)), "0.4 % faster, which is too little for more devices a copy"),
        (Tried(Division(1, 4, 2), plan=planned(9.96)), "0.4 % faster, which is too little for larger micro-batches"),
        (Tried(Division(1, 2, 4), True, plan=planned(9.96)), "0.4 % faster, which is too little for a pipeline"),
        (Tried(Division(1, 1, 8), plan=planned(11.0)), "10.0 % slower"),
        (Tried(Division(1, 1, 8), bounds={FOUR: 12.0}), "at least 20.0 % slower"),
        (Tried(Division(1, 1, 8), bounds={FOUR: 9.9}), "no faster plan was found"),
        (Tried(Division(1, 1, 8), bounds={FOUR: 10.0}), "no faster plan was found"),
        (Tried(Division(1, 1, 8)), "not tried: time was out"),
        (Tried(Division(1, 1, 8), True), "no faster plan was found"),
        (
            Tried(Division(1, 1, 8), bounds={FOUR: float("inf")}, needed=5 * GIB),
            "does not fit: 3.00 GiB too much, or more",
        ),
        (Tried(Division(1, 1, 8), needed=GIB), "does not fit: 0 B too much, or more"),
        (Tried(Division(1, 1, 8), bounds={FOUR: 12.0}, needed=5 * GIB, refusal="dp cannot"), "dp cannot"),
    ],
)
def test_why_a_division_lost(lost, why):
    first = Tried(Division(1, 2, 4), plan=planned(10.0))
    divided = Divided(source(), ComputeConfig(1, 1), None, first.plan, [first, lost])  # type: ignore[arg-type]
    assert [row["why"] for row in division_rows(divided, 32)] == ["chosen", why]


def test_where_nothing_fits_the_division_of_least_memory_is_explained(monkeypatch):
    refusals = {key: NothingFits("no") for key in BOUNDS}
    for (plan, _), refusal in refusals.items():
        refusal.needed = 9 * GIB / plan
    asked = []

    def advise(source, graph, config, hardware, times):
        assert (hardware, times) == (world.hardware, world.times)
        asked.append((config.plan_ngpus, graph))
        raise UserError("no plan fits; what would fit: more")

    world = World(monkeypatch, refusals)
    world.times = SimpleNamespace(spent=0.0)
    monkeypatch.setattr(division_search, "plan_or_advise", advise)
    with pytest.raises(UserError, match="what would fit: more"):
        world.divide()
    assert asked == [(4, 1)]


@pytest.mark.parametrize(
    ("memory", "best"), [(3e5, Division(2, 2, 2)), (4e5, Division(1, 1, 2)), (6e5, Division(1, 2, 1))]
)
def test_the_answer_is_the_best_of_all_plans(tmp_path, memory, best):
    """Starting an operator takes time, so that larger micro-batches pay, where a device has room for them, or two."""
    model = source(tiny.config(num_hidden_layers=1))
    link = {"bandwidth": 1e9, "latency": 1e-6}
    machine = {"launch": 2e-5, "intra": link, "inter": link, "memory": memory / 0.9, "workspaces": 0.0}
    config = ComputeConfig(1, 2, hardware=tiny.write_hardware(tmp_path, **machine))
    hardware, batch = config.find_hardware(), Batch(4, 2)
    found = divide(batch, model, config, hardware, None)
    every = {}
    for division in batch.divisions():
        one, divided = in_division(model, config, division)
        try:
            every[division] = plan_for(traced(one, config.trace_strategy), divided, hardware, None).step_seconds
        except NothingFits:
            every[division] = float("inf")
    fastest = min(every.values())
    assert found.plan.step_seconds <= 1.005 * fastest
    chosen = found.tried[0].division
    assert every[chosen] == pytest.approx(found.plan.step_seconds)
    assert chosen == min(division for division, seconds in every.items() if seconds <= 1.005 * fastest)
    assert len({round(seconds, 9) for seconds in every.values()}) >= 3, "divisions differ"
    assert chosen == best


def test_a_plan_that_was_searched_is_used_again_without_a_search(tmp_path, monkeypatch):
    config = ComputeConfig(1, 2, hardware=tiny.write_hardware(tmp_path))
    batch, folder = Batch(4, 2, micro_batch_size=2), tmp_path / "code"
    compile_model(source(), config, folder, batch=batch)
    division = division_in(folder)
    assert division in batch.divisions()
    values = read_plan(folder)
    assert values["divisions"][0]["why"] == "chosen"
    assert any("chosen" in line for line in explain(values).splitlines())
    assert "How the batch is divided" in (folder / "plan.html").read_text()
    searched = []

    def divide_again(*given):
        searched.append(given[0])
        raise UserError("searched")

    monkeypatch.setattr(compiler, "divide", divide_again)
    loaded._compile_if_needed(source(), config, folder, lambda model: None, batch)
    assert searched == []
    for other in replace(batch, sequences=8), replace(batch, micro_batch_size=None):
        with pytest.raises(UserError, match="searched"):
            loaded._compile_if_needed(source(), config, folder, lambda model: None, other)
    one_left = replace(config, runtime_ngpus=1), replace(batch, runtime_ngpus=1)
    with monkeypatch.context() as divided_over_two:
        divided_over_two.setattr(loaded, "division_in", lambda folder: Division(2, 2, 2))
        with pytest.raises(UserError, match="searched"):
            loaded._compile_if_needed(source(), one_left[0], folder, lambda model: None, one_left[1])
    smaller = replace(config, gpu_mem_constraint=1.0)
    with pytest.raises(UserError, match="searched"):
        loaded._compile_if_needed(source(), smaller, folder, lambda model: None, batch)
    assert division_in(tmp_path) is None


def test_only_the_first_rows_are_shown():
    row = {
        "copies": 2, "plan_ngpus": 1, "micro_batches": 3, "micro_batch_size": 4, "pipeline": False, "step_seconds": 2.0,
        "bound_seconds": None, "tokens_per_second_per_gpu": 1234.0, "memory_bytes": GIB, "why": "chosen",
    }  # fmt: skip
    slower = {
        **row,
        "pipeline": True,
        "step_seconds": None,
        "bound_seconds": 3.0,
        "memory_bytes": None,
        "why": "slower",
    }
    lines = division_lines({"divisions": [row, *[slower] * 9]})
    assert [word for word in lines[1].split("  ") if word] == [
        " 2 x 1",
        "3 of 4",
        "2.00 s",
        "1,234",
        "1.00 GiB",
        "chosen",
    ] or (lines[1].split() == ["2", "x", "1", "3", "of", "4", "2.00", "s", "1,234", "1.00", "GiB", "chosen"])
    assert lines[2].split()[:9] == ["2", "x", "1,", "pipeline", "3", "of", "4", "≥", "3.00"]
    assert (len(lines), lines[-1]) == (10, "2 more in plan.json")
    assert division_lines({}) == []
    assert division_section({}) == []


def test_a_division_says_what_it_is():
    assert Tried(Division(2, 1, 3)).name == "2 devices a copy, 3 x 1 sequence"
    assert Tried(Division(1, 4, 1), pipeline=True).name == "1 device a copy, 1 x 4 sequences, as a pipeline"
