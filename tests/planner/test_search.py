"""The search over meshes, with solvers whose answers are written here."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nnscaler.errors import UserError
from nnscaler.hardware.spec import Host
from nnscaler.mesh import Mesh
from nnscaler.plan import GIB, Key
from nnscaler.planner import NotFaster, NothingFits, search
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import Price
from nnscaler.planner.search import LEAST_SECONDS, find_plan, nodes_to_recompute
from nnscaler.planner.solve import OutOfTime
from nnscaler.sums import GradientSum
from tests.pipeline.test_cut import llama
from tests.planner.test_by_hand import graph, machine

__all__ = ["graph", "machine"]


OPTION = SimpleNamespace(transient=1.0)


def program(devices: int) -> SimpleNamespace:
    return SimpleNamespace(problem=SimpleNamespace(costs=SimpleNamespace(mesh=Mesh((devices,)))))


class Search(search._Search):
    """Of plans in 100 bytes, which has ten seconds from now on. `answers`: by mesh, (seconds, bytes, bound) or what is
    raised; `floors`: by mesh"""

    def __init__(self, monkeypatch, answers: dict[int, object], floors: dict[int, float], now: float = 50.0) -> None:
        super().__init__(100.0, 60.0)
        self.asked: list[tuple] = []
        self.least: dict[float, tuple | None] = {}
        self.now = now
        self.stops: set[int] = set()  # the meshes on which the solver ends before it is done

        def solve(program, memory, *, below, seconds, watch):
            devices = program.problem.costs.mesh.plan_ngpus
            self.asked.append((devices, memory, below, seconds))
            self.watch = watch
            answer = answers[devices]
            if isinstance(answer, Exception):
                raise answer
            return answer and SimpleNamespace(solution=answer, bound=answer[2], stopped=devices in self.stops)

        def least_memory(program, seconds, enough):
            assert enough == 100.0
            self.asked.append(("least memory", seconds))
            return self.least.get(seconds, (9.0, 90.0, 0.0))

        monkeypatch.setattr(search, "solve", solve)
        monkeypatch.setattr(search, "least_memory", least_memory)
        monkeypatch.setattr(search, "least_seconds", lambda program: floors[program.problem.costs.mesh.plan_ngpus])
        priced = lambda program, one: SimpleNamespace(total_seconds=one[0], total_memory=one[1])  # noqa: E731
        monkeypatch.setattr(search, "price", priced)
        monkeypatch.setattr(
            search, "time", SimpleNamespace(process_time=lambda: self.now, perf_counter=lambda: self.now)
        )

    def on_all(self, *devices: int) -> tuple[float | None, float]:
        """(seconds of the best plan, the bound) after a search on these meshes."""
        for left, each in enumerate(devices, 1 - len(devices)):
            self.on(program(each), -left)
        return self.found and self.found.price.total_seconds, self.bound


def test_later_meshes_have_to_be_faster_by_a_thousandth(monkeypatch):
    one = Search(monkeypatch, {1: (4.0, 80.0, 3.99), 2: (3.0, 100.0005, 2.9), 4: None}, {2: 1.0, 4: 2.0, 8: 2.9975})
    assert one.on_all(1, 2, 4, 8) == (3.0, 2.9)
    below = 3.0 * (1 - 1e-3)
    assert one.asked == [
        (1, 100.0, None, 5.0), (2, 100.0, pytest.approx(4.0 * (1 - 1e-3)), 5.0), (4, 100.0, pytest.approx(below), 5.0)
    ]  # fmt: skip
    one = Search(monkeypatch, {1: (3.0, 80.0, 2.999), 2: None}, {2: 1.0})
    assert one.on_all(1, 2) == (3.0, pytest.approx(below))
    assert one.asked[1][3] == 10.0, "the last one gets all that is left"
    one = Search(monkeypatch, {1: (3.0, 80.0, 2.999), 2: None}, {2: 2.9975})
    assert one.on_all(1, 2) == (3.0, pytest.approx(below)), "what is not searched could save as much at most"
    assert len(one.asked) == 1


def test_what_takes_more_memory_than_there_is_is_not_taken(monkeypatch, caplog):
    """Which a solver that is exact would not give."""
    assert Search(monkeypatch, {1: (4.0, 100.002, 3.9)}, {}).on_all(1) == (None, 3.9)
    (warned,) = caplog.records
    assert warned.levelname == "WARNING"
    assert "plan is not taken: it needs 9.313412e-08 GiB a device, of 9.3132257e-08 GiB" in warned.getMessage()


def test_where_time_is_out_the_best_so_far_stays(monkeypatch, caplog):
    """Or, where there is none, a plan that fits is taken, for which a little time is always left."""
    one = Search(monkeypatch, {1: (4.0, 80.0, 3.9), 2: OutOfTime(1.5), 4: (9.0, 1.0, 8.0)}, {2: 1.0, 4: 1.2})
    one.on(program(1), 1)
    one.on(program(2), 1)
    assert (one.found.price.total_seconds, one.bound) == (4.0, 1.5)
    one.now = 60.0
    one.on(program(4), 0)
    assert (one.found.price.total_seconds, one.bound) == (4.0, 1.2), "no plan on a mesh is faster than its floor"
    assert len(one.asked) == 2
    with caplog.at_level(logging.INFO, "nnscaler"):
        late = Search(monkeypatch, {1: OutOfTime(0.5)}, {}, now=70.0)
        assert late.on_all(1) == (9.0, 0.5)
    assert late.asked == [(1, 100.0, None, 0.1), ("least memory", LEAST_SECONDS)]
    assert "planning on 1 copy x 1 device: out of time; a plan that fits is taken" in caplog.text


def test_nothing_is_refused_that_time_left_open(monkeypatch):
    least = {LEAST_SECONDS: None, math.inf: (9.0, 90.0, 0.0)}
    one = Search(monkeypatch, {1: OutOfTime(0.5), 2: None, 4: OutOfTime(0.4)}, {})
    one.least = least
    assert one.on_all(1, 2, 4) == (None, 0.4)
    del one.asked[:]
    one.decide()
    assert one.found.price.total_seconds == 9.0
    assert one.asked == [("least memory", math.inf)], "one plan is enough"
    one.least = {LEAST_SECONDS: (9.0, 101.0, 0.0), math.inf: (9.0, 101.0, 0.0)}
    one.found, one.asked = None, []
    one.decide()
    assert (one.found, one.asked) == (None, 2 * [("least memory", math.inf)]), "of two meshes it was not known"
    done = Search(monkeypatch, {1: OutOfTime(0.5)}, {})
    done.least = least
    done.on(program(1), 0)
    monkeypatch.setattr(search, "solve", lambda *args, **kwargs: None)
    done.on(program(1), 0)  # with more choices, which include those before
    done.decide()
    assert done.found is None


def test_what_a_faster_plan_may_save_is_said_to_two_digits():
    said = [search.may_save(gap) for gap in (0.002, 0.0034, 0.0456, 0.2)]
    assert said == ["", *(f" (a faster one may save up to {percent} %)" for percent in ("0.34", "4.6", "20"))]


def test_what_need_not_be_decided_is_given_up_when_time_is_out(graph, machine, monkeypatch):
    def too_late(*arguments, **keywords):
        raise OutOfTime(0.0)

    asked = []
    monkeypatch.setattr(search, "solve", too_late)
    monkeypatch.setattr(search, "least_memory", lambda program, seconds, enough: asked.append(seconds))
    with pytest.raises(NothingFits, match="no plan that fits was found in time") as refused:
        find_plan(graph, [Mesh((2,))], machine, sparing=False, decided=False)
    assert refused.value.needed is None
    assert asked == [LEAST_SECONDS]


def test_a_refusal_says_what_is_known_of_the_least_memory_in_five_seconds(monkeypatch):
    """Or later, where nothing is known by then."""
    asked, answers = [], []
    monkeypatch.setattr(search, "least_memory", lambda program, *seconds: asked.append(seconds) or answers.pop(0))
    monkeypatch.setattr(search, "price", lambda program, one: SimpleNamespace(memory=one.memory))
    problem = SimpleNamespace(divisible=[], decisions=[SimpleNamespace(block="b", name="n", options=[OPTION])])
    one = SimpleNamespace(memory={Key("saved", "x", "y"): 2.0}, pieces={}, chosen=[0])
    for found, limits in (([one], [(LEAST_SECONDS,)]), ([None, one], [(LEAST_SECONDS,), ()])):
        answers[:] = found
        assert search._least(SimpleNamespace(problem=problem)) == (one.memory, "b.n")
        assert asked == limits
        asked.clear()


def test_what_is_left_unsearched_is_not_proven(monkeypatch):
    """What saves memory at a price may save a 200th of the time that a search of the rest proved to be the least."""
    one = Search(monkeypatch, {1: (4.0, 80.0, 3.9999)}, {1: 3.981})
    one.on(program(1), 0)
    assert one.leaves(program(1)), "it could save 0.475 %"
    assert (one.proven([program(1)]), one.stopped) == (3.981, False)
    late = Search(monkeypatch, {1: (4.0, 80.0, 3.9999)}, {1: 3.0})
    late.on(program(1), 0)
    assert not late.leaves(program(1)), "it could save a fourth, and there is time"
    late.now = 60.0
    assert late.leaves(program(1))
    assert (late.proven([program(1)]), late.stopped) == (3.0, True)
    none = Search(monkeypatch, {1: None}, {}, now=70.0)
    none.on(program(1), 0)
    assert not none.leaves(program(1)), "as long as there is no plan, all is tried"


def test_a_search_that_was_stopped_says_when_it_found_what_and_proves_at_least_the_floor(monkeypatch):
    one = Search(monkeypatch, {1: (4.0, 80.0, 0.0), 2: (3.0, 80.0, 0.5)}, {1: 2.0, 2: 2.5})
    one.stops = {1}
    one.findings.began = 50.0
    one.on(program(1), 1)
    one.now = 53.0
    one.on(program(2), 0)
    one.watch(3.5, 0.0)
    one.now = 54.0
    one.watch(2.9, 0.0)
    assert one.findings.found == [(0.0, 4.0), (3.0, 3.0), (4.0, 2.9)], "those that are faster than all before"
    assert one.stopped
    assert (one.bound, one.proven([program(1), program(2)])) == (0.0, 2.0)
    one.stopped = False
    assert one.proven([program(1), program(2)]) == 0.0


def test_a_long_search_says_how_far_it_is(monkeypatch, caplog):
    one = Search(monkeypatch, {1: (4.0, 80.0, 3.9), 2: None}, {2: 1.0})
    one.told = 50.0
    with caplog.at_level(logging.INFO, "nnscaler"):
        one.on(program(1), 1)
        one.now = 53.9
        one.watch(math.inf, 0.0)
        assert not caplog.records, "not more often than each few seconds"
        one.now = 54.0
        one.watch(math.inf, 0.0)
        one.now = 57.0
        one.watch(3.5, 3.25)
        one.now = 58.0
        one.watch(3.5, 3.25)
        one.on(program(2), 0)
        one.now = 65.0
        one.watch(math.inf, 2.0)
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first == "planning on 1 copy x 1 device: no plan found yet; the search may take 6 s more of a core"
    best = "the best plan takes 3.5 s a micro-batch, and none takes less than 3.25 s"
    assert second.endswith(f": {best}; the search may take 2 s more of a core")
    assert third.startswith("planning on 1 copy x 2 devices: no faster plan found yet, and none takes less than 2 s; ")


def test_what_saves_memory_at_a_price_is_tried_where_it_may_gain(graph, machine, monkeypatch):
    stated, gains = [], []
    build = search.build_problem

    def build_problem(graph, model, again, micro_batches, layouts, in_flight, *saving):
        *saving, known = saving
        stated.append((again.free, micro_batches, layouts, in_flight, tuple(saving)))
        return build(graph, model, again, micro_batches, layouts, in_flight, *saving, known)

    monkeypatch.setattr(search, "build_problem", build_problem)
    monkeypatch.setattr(search._Search, "may_gain", lambda self, program, worth: gains.append(worth) or worth == 5e-3)
    given = {"micro_batches": 3, "in_flight": 2, "seconds": 5.0}
    plan = find_plan(graph, [Mesh((1,))], machine, **given)
    assert stated == [(True, 3, None, 2, (0.0, False, False)), (True, 3, None, 2, (0.0, True, False))]
    assert gains == [5e-3, 1e-3]
    assert (plan.memory_limit, plan.host_limit, plan.micro_batches) == (0.9 * machine.memory, 0.0, 3)
    stated.clear()
    find_plan(llama(2), [Mesh((1,))], machine, **given, sparing=False, recompute_modules=("LlamaMLP",))
    assert stated == [(False, 3, None, 2, (0.0, False, False))]
    stated.clear()
    with_host = replace(machine, host=Host(1e12, 1e12, 1e12, 1e12))
    plan = find_plan(graph, [Mesh((1,))], with_host, **given, sparing=False, host=7.0, memory=8e11)
    assert [saving for *_, saving in stated] == [(0.0, False, False), (7.0, False, False)]
    assert (plan.memory_limit, plan.host_limit) == (8e11, 7.0)


def test_groups_are_tried_where_layers_follow_one_another(machine, monkeypatch):
    stated = []

    def build(*given):
        stated.append(given[6:9])
        return SimpleNamespace(costs=None, given=given[6:9])

    monkeypatch.setattr(search, "build_problem", build)
    monkeypatch.setattr(search, "Program", lambda problem: SimpleNamespace(problem=problem))
    monkeypatch.setattr(search._Search, "on", lambda self, program, left: None)
    monkeypatch.setattr(search._Search, "may_gain", lambda self, program, worth: True)

    def least(program):
        assert program.problem.given == stated[-1], "the last one says what is needed"
        return {Key("saved", "x", "y"): 2 * GIB}, "layer.up"

    monkeypatch.setattr(search, "_least", least)
    two_layers = llama(2)

    def tried(**given) -> list[tuple]:
        stated.clear()
        with pytest.raises(UserError, match=r"no plan fits: needs 2.0 GiB a device, constraint 1.0 GiB"):
            find_plan(two_layers, [Mesh((1,))], machine, memory=GIB, **given)
        return list(stated)

    whole = [(0.0, False, False), (5.0, True, False), (5.0, True, True)]
    assert tried(host=5.0) == whole
    assert tried(host=5.0, groups=False) == whole[:2]
    assert tried(recompute_modules=("LlamaMLP",)) == [(0.0, False, False), (0.0, True, False)]


def test_named_modules_are_nodes_of_blocks():
    whole = llama(2)
    layer = whole.blocks["llama_decoder_layer"]
    found = nodes_to_recompute(whole, ["LlamaMLP"])
    assert list(found) == ["llama_decoder_layer"]
    inside = {node.name for node in layer.nodes if ".mlp" in f".{node.module}"}
    assert found["llama_decoder_layer"] == inside
    assert 0 < len(inside) < len(layer.nodes)
    both = nodes_to_recompute(whole, ["LlamaDecoderLayer"])
    assert both == {"llama_decoder_layer": {node.name for node in layer.nodes}}
    with pytest.raises(UserError, match="recompute_modules names a module that contains LlamaDecoderLayer"):
        nodes_to_recompute(whole, ["LlamaModel"])
    with pytest.raises(UserError, match="recompute_modules names 'Llama', which is not in the model; its modules are"):
        nodes_to_recompute(whole, ["LlamaMLP", "Llama"])
    with pytest.raises(UserError, match=r"names 'Embedding', which is not in repeated layers.*them are .*LlamaMLP"):
        nodes_to_recompute(whole, ["LlamaMLP", "Embedding"])


def test_what_is_asked_of_a_search_reaches_the_problem(graph, machine, monkeypatch):
    """That for the best plan, and that for the lower bound of a step."""
    stated: list[tuple] = []
    problem = SimpleNamespace(costs=SimpleNamespace(mesh=Mesh((2,))))
    known: list[dict] = []

    def build(*given):
        stated.append(given[:9])
        known.extend(given[9:])
        return problem

    monkeypatch.setattr(search, "build_problem", build)
    monkeypatch.setattr(search, "Program", lambda problem: SimpleNamespace(problem=problem))
    monkeypatch.setattr(search._Search, "on", lambda self, program, left: None)
    monkeypatch.setattr(search._Search, "may_gain", lambda self, program, worth: True)
    monkeypatch.setattr(search, "_least", lambda problem: ({Key("saved", "x", "y"): 2 * GIB}, "layer.up"))
    again, mesh = search.recomputing(graph, ()), Mesh((2,), 3)
    given = {"recompute_modules": (), "micro_batches": 5, "fused": True, "times": "times", "sums": "sums", "host": 7.0}
    with pytest.raises(UserError):
        find_plan(graph, [mesh], machine, layouts={"x": "rows"}, in_flight=4, **given)
    costs = CostModel(machine, mesh, True, "times", "sums")
    assert stated[0] == (graph, costs, again, 5, {"x": "rows"}, 4, 0.0, False, False)
    assert [one[3:] for one in stated[1:]] == [(5, {"x": "rows"}, 4, 7.0, True, False)], "no layers, no groups"
    assert len(known) == 2
    assert known[0] is known[1], "what is known of blocks is found out once"
    asked = []
    monkeypatch.setattr(search, "relaxed", lambda *given: asked.append(given) or [SimpleNamespace(seconds=2.0)])
    stated.clear()
    assert search.least_step(graph, mesh, machine, **given) == 2.0 * 5
    assert stated == [(graph, costs, again, 5, None, 1, 7.0, True, False)]
    assert asked == [([SimpleNamespace(problem=problem)], 0.9 * machine.memory)]
    search.least_step(graph, mesh, machine, memory=3.0)
    assert stated[-1] == (graph, CostModel(machine, mesh), search.recomputing(graph, None), 1, None, 1, 0.0, True, True)
    assert asked[-1] == ([SimpleNamespace(problem=problem)], 3.0)
    monkeypatch.setattr(search, "relaxed", lambda *given: None)
    monkeypatch.setattr(search, "least_bytes", lambda program: 11.0)
    with pytest.raises(search.NothingFits, match=r"no plan fits: over 3\.0 GiB a device are needed") as refused:
        search.least_step(graph, mesh, machine, memory=3 * GIB)
    assert refused.value.needed == 11.0


def test_all_figures_of_a_solution_are_those_of_the_plan(graph, machine, monkeypatch):
    """Each is written here, and none is another's."""
    prices = Price(
        {Key("forward"): 1.0},
        {Key("saved"): 2.0},
        {Key("reshard"): 3.0},
        {Key("state"): 5.0},
        {Key("copies"): 6.0},
    )
    monkeypatch.setattr(search, "price", lambda program, solution: prices)
    monkeypatch.setattr(search._Search, "may_gain", lambda self, program, worth: False)
    sums = GradientSum("all_to_all", "bfloat16")
    plan = find_plan(graph, [Mesh((2,))], machine, micro_batches=3, memory=1e12, host=8.0, sums=sums)
    assert plan.sums == sums
    assert (plan.seconds, plan.memory, plan.beside) == (prices.seconds, prices.memory, prices.beside)
    assert (plan.host, plan.copies) == (prices.host, prices.copies)
    assert (plan.micro_batches, plan.memory_limit, plan.host_limit, plan.hardware) == (3, 1e12, 8.0, machine.name)
    assert (plan.step_seconds, plan.memory_bytes, plan.host_bytes) == (3.0, 2.0, 5.0)
    assert (plan.state_on_host, plan.gradients_on_host) == (5.0, 0)
    assert plan.costs == CostModel(machine, Mesh((2,)), sums=sums)


def test_where_no_plan_is_as_fast_as_asked_for_that_is_said_of_a_step(graph, machine, monkeypatch):
    monkeypatch.setattr(search, "solve", lambda *given, **named: None)
    monkeypatch.setattr(search, "least_seconds", lambda program: 0.5)
    with pytest.raises(NotFaster) as slower:
        find_plan(graph, [Mesh((2,))], machine, micro_batches=4, below=0.1)
    assert slower.value.bound == 4 * 0.5
