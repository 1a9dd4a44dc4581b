"""What a pipeline's plan makes of its stages' figures, by hand: which stages count together, and what counts once."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nnscaler.graph import Call
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.pipeline import stages
from nnscaler.pipeline.cut import cut, pivots
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.pipeline.simulate import Timeline
from nnscaler.pipeline.stages import Candidate, Estimate, StagePlanner, _fitting, _likeness, _renamed
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.plan import GIB, Key, Plan
from nnscaler.planner import NothingFits, find_plan
from nnscaler.planner.costs import CostModel
from nnscaler.planner.problem import Recomputing
from nnscaler.planner.solve import Needs
from nnscaler.recompute import KEEPS_ALL, LEVELS
from nnscaler.schedules import Schedule
from nnscaler.sums import GradientSum
from tests import tiny
from tests.pipeline.test_cut import llama

TWO = PipelineMesh.of([(2,)] * 2, 1)
HOST = next(level for level in LEVELS if level.on_host)
SECONDS = {
    Key("forward", "layer", "a"): 1.0,
    Key("reshard", "layer", "x", "S(0) -> R"): 2.0,
    Key("exchange", "", "forward"): 4.0,
    Key("copies", "", "forward"): 8.0,
    Key("backward", "layer", "a"): 16.0,
    Key("reshard backward", "layer", "x", "S(0) -> R"): 32.0,
    Key("again", "layer", "a", "recomputes all"): 64.0,
    Key("reshard again", "layer", "x", "S(0) -> R"): 128.0,
    Key("exchange", "", "backward"): 256.0,
    Key("copies", "", "backward"): 512.0,
    Key("update", "layer", "w"): 1024.0,
    Key("copies", "", "update"): 2048.0,
    Key("cast", "layer", "w"): 4096.0,
    Key("backward", "layer", "forward"): 8192.0,  # a node's name
}
FORWARD, BACKWARD, AGAIN, UPDATE = 15.0 + 4096, 1008.0 + 8192, 192.0, 3072.0


def stage(seconds: float = 1.0, memory: float = 1.0, host: float = 0.0) -> Plan:
    return Plan(
        SimpleNamespace(), Mesh((2,), 3), "a machine", micro_batches=4, memory={Key("saved"): memory},
        seconds={key: seconds * value for key, value in SECONDS.items()}, host={Key("state"): host},
    )  # fmt: skip


def test_each_second_is_of_forward_backward_or_the_update():
    assert forward_seconds(stage()) == FORWARD
    assert update_seconds(stage()) == UPDATE
    assert stage().step_seconds == 4 * (FORWARD + BACKWARD + UPDATE)


@pytest.mark.parametrize(
    ("kind", "ranks_of"), [("interleaved", [0, 1, 0, 1]), ("zb-v", [0, 1, 1, 0])], ids=["interleaved", "zb-v"]
)
def test_stages_of_a_rank_count_together(kind, ranks_of):
    schedule = Schedule(kind, 2, 4, 4)
    assert [schedule.rank_of(index) for index in range(4)] == ranks_of
    own = [stage(1.0, 10.0, 5.0), stage(3.0, 1.0, 6.0), stage(5.0, 4.0, 0.0), stage(8.0, 2.0, 3.0)]
    plan = PipelinePlan(own, schedule, [], {}, [], [], Timeline(seconds=7.0), 0.0)

    def most(figures: list[float]) -> float:
        return max(sum(figures[i] for i in range(4) if ranks_of[i] == rank) for rank in range(2))

    assert plan.memory_bytes == most([10.0, 1.0, 4.0, 2.0])
    assert plan.host_bytes == most([5.0, 6.0, 0.0, 3.0])
    assert plan.update_seconds == most([4 * UPDATE * share for share in (1.0, 3.0, 5.0, 8.0)])
    assert plan.step_seconds == 7.0 + plan.update_seconds
    plan.bound = 0.75 * plan.step_seconds
    assert plan.gap == pytest.approx(0.25)
    assert plan.mesh == PipelineMesh.of([(2,)] * 2, 3)
    assert plan.micro_batches == 4


def planner(fused: bool = False) -> StagePlanner:
    return StagePlanner(SimpleNamespace(), SimpleNamespace(), 1.0, None, fused, None, [])


class Figures(StagePlanner):
    """Plans stages of zb-v by figures that are written here: bytes of the device and the host, and seconds."""

    TAKES = ((11.0, 1.0, 9.0), (20.0, 3.0, 12.0), (31.0, 0.0, 6.0), (40.0, 5.0, 15.0))

    def _stages(self, candidate):
        return [SimpleNamespace(index=index) for index in range(4)]

    def _plan(self, stage, limit, host):
        self.asked.append((stage.index, limit, host))
        device, there, seconds = self.TAKES[stage.index]
        return SimpleNamespace(memory_bytes=device, host_bytes=there, seconds=seconds)

    def _seconds(self, plan, update=False):
        assert update, "what the update takes is a part of the step"
        return plan.seconds

    def _simulate(self, candidate, stages):
        self.simulated.append(list(stages))
        return sum(one for one in stages if isinstance(one, float))

    def _assemble(self, candidate, stages, plans):
        return SimpleNamespace(stages=[stage.index for stage in stages], bytes=[plan.memory_bytes for plan in plans])


def test_a_stage_is_planned_in_what_its_rank_has_left():
    """Ranks 0 and 1 have stages 0 and 3, and 1 and 2. The longest comes first; what it leaves is the other's."""
    candidate = Candidate(Schedule("zb-v", 2, 4, 4), (1, 1, 1, 1), (REPLICATE,), TWO)
    needs = (Needs(9.0, 10.0, 4.0), Needs(12.0, 20.0, 3.0), Needs(6.0, 30.0, 0.0), Needs(15.0, 40.0, 8.0))

    def plan(below: float) -> tuple[Figures, object]:
        found = Figures(SimpleNamespace(), SimpleNamespace(), 100.0, None, False, None, [], host=10.0, sparing=True)
        found.asked, found.simulated = [], []
        return found, found.plan(Estimate(candidate, needs, 1.0), below)

    found, made = plan(1e9)
    assert (made.stages, made.bytes) == ([0, 1, 2, 3], [11.0, 20.0, 31.0, 40.0])
    assert made.bound == 4 * (9.0 + 15.0), "rank 0 works longest"
    # Rank 0: 100 - 10 - 40 bytes are free, and nothing of the host, of which its stages need more than there is.
    # Rank 1: 100 - 20 - 30, and 10 - 3.
    assert found.asked == [
        (3, 40.0 + 50, 8.0), (1, 20.0 + 50, 3.0 + 7), (0, 10.0 + 90 - 40, 4.0 + 8 - 5), (2, 30.0 + 70 - 20, 10.0 - 3),
    ]  # fmt: skip
    first, second, third, _ = found._guess(candidate, needs)
    assert found.simulated[0] == [first, second, third, 15.0]
    assert found.simulated[2] == [9.0, 12.0, third, 15.0]
    found, made = plan(27.0)
    assert made is None
    assert [index for index, *_ in found.asked] == [3, 1], "with these two the step takes that long already"


def planned_stage(memory: float, host: float) -> Plan:
    return Plan(SimpleNamespace(), Mesh((2,)), "", memory={Key("saved"): memory}, host={Key("state"): host})


def test_a_plan_for_more_memory_is_taken_where_it_fits(monkeypatch):
    asked = []

    def find(graph, meshes, hardware, **given):
        asked.append((graph, meshes, hardware, given))
        return planned_stage(50.0, 4.0)

    monkeypatch.setattr(stages, "find_plan", find)
    times, machine = object(), SimpleNamespace()
    one = StagePlanner(
        SimpleNamespace(),
        machine,
        1e3,
        None,
        True,
        times,
        [],
        host=9.0,
        sparing=True,
        groups=True,
        sums="sums",
    )
    graph, layouts = SimpleNamespace(), {"x": (REPLICATE,)}
    this = stages._Stage(SimpleNamespace(graph=graph), Mesh((2,), first=3), "like", 4, 3, 10, layouts)
    plan = one._plan(this, 100.0, 8.0)
    ((found, meshes, hardware, given),) = asked
    assert (found, meshes, hardware) == (graph, [Mesh((2,), first=3)], machine)
    assert given.pop("seconds") == math.inf
    assert given == {
        "memory": 90.0, "recompute_modules": None, "micro_batches": 4, "fused": True, "times": times,
        "layouts": layouts, "in_flight": 3, "waiting": (), "host": 8.0, "sparing": True, "groups": True, "sums": "sums",
    }  # fmt: skip
    assert plan.memory_bytes == 60.0, "with what is received"
    assert plan.memory_limit == 100.0
    for limit, host, again in ((80.0, 8.0, False), (60.0, 4.0, False), (101.0, 8.0, True), (59.0, 8.0, True)):
        asked.clear()
        one.planned["like", 3, ()] = [(100.0, 8.0, plan)]
        assert (one._plan(this, limit, host) is not plan) == bool(asked) == again, limit
    for limit, host in ((80.0, 8.5), (80.0, 3.5)):
        asked.clear()
        one.planned["like", 3, ()] = [(100.0, 8.0, plan)]
        assert one._plan(this, limit, host) is not plan, host
    asked.clear()
    one._plan(replace(this, held=2), 80.0, 8.0)
    one.until = -1e9
    one._plan(replace(this, like="another"), 80.0, 8.0)
    later = one._plan(replace(this, waiting=((3, 1),)), 80.0, 8.0)
    assert [given["in_flight"] for *_, given in asked] == [2, 3, 3]
    assert [given["waiting"] for *_, given in asked] == [(), (), ((3, 1),)]
    assert (plan.splits, later.splits) == (False, True)
    assert asked[-1][-1]["seconds"] == stages.LEAST_SECONDS, "though time is out"


def test_stages_of_a_rank_are_estimated_together(monkeypatch):
    """In the memory that is left without what torch receives into, which comes on top of what each needs."""
    asked = []

    def relaxed(programs, memory):
        asked.append((programs, memory))
        return [Needs(1.0, 5.0, 6.0), Needs(2.0, 7.0, 8.0)]

    class Stated:
        def holding(self, in_flight, waiting):
            return (in_flight, *waiting)

    one = planner()
    one.memory = 100.0
    own = [
        stages._Stage(SimpleNamespace(), Mesh((2,)), like, 4, held, size, {})
        for like, held, size in (("a", 3, 10), ("b", 2, 20))
    ]
    one.programs = {"a": Stated(), "b": Stated()}
    monkeypatch.setattr(stages, "relaxed", relaxed)
    assert one._estimate(own) == [Needs(1.0, 15.0, 6.0), Needs(2.0, 27.0, 8.0)]
    assert asked == [([(3,), (2,)], 70.0)]
    one._estimate(own)
    assert len(asked) == 1, "what is known is not asked again"
    one._estimate([own[0], replace(own[1], held=1)])
    one._estimate([own[0], replace(own[1], waiting=((2, 1),))])
    assert asked[1:] == [([(3,), (1,)], 70.0), ([(3,), (2, (2, 1))], 70.0)]
    monkeypatch.setattr(stages, "relaxed", lambda programs, memory: None)
    one.estimated.clear()
    one.memory = 3 * GIB
    told = "a rank with 3 and 2 micro-batches of its stages in flight needs over 3 GiB a device"
    with pytest.raises(NothingFits, match=told):
        one._estimate(own)


def test_with_unlimited_memory_each_stage_is_estimated_once_whatever_it_holds(monkeypatch):
    asked = []

    def relaxed(programs, memory):
        asked.append(([program.name for program in programs], memory))
        return [Needs(float(len(asked)), 5.0, 6.0)]

    one = planner()
    one.memory = math.inf
    one.programs = {name: SimpleNamespace(name=name, problem=SimpleNamespace(micro_batches=1)) for name in ("a", "b")}
    a, b = (stages._Stage(SimpleNamespace(), Mesh((2,)), like, 4, 3, 10, {}) for like in "ab")
    monkeypatch.setattr(stages, "relaxed", relaxed)
    first, second = Needs(1.0, 15.0, 6.0), Needs(2.0, 15.0, 6.0)
    assert one._estimate([a, replace(a, held=2), b]) == [first, first, second]
    assert one._estimate([replace(b, waiting=((2, 1),))]) == [second]
    assert asked == [(["a"], math.inf), (["b"], math.inf)]


def test_with_unlimited_memory_a_stage_may_do_what_is_sparing_where_that_may_be_faster(monkeypatch):
    stated = []
    monkeypatch.setattr(stages, "build_problem", lambda *given, sparing, **named: stated.append(sparing) or sparing)
    monkeypatch.setattr(stages, "Program", lambda sparing: SimpleNamespace(problem=sparing))
    this = stages._Stage(SimpleNamespace(graph=SimpleNamespace()), Mesh((2,)), "like", 4, 3, 10, {})
    for may, sparing in ((True, [False, True]), (False, [False])):
        monkeypatch.setattr(stages, "may_save_time", lambda problem, may=may: may)
        stated.clear()
        assert planner()._freest(this).problem is may
        assert stated == sparing


def test_a_stage_is_stated_with_all_that_may_be_used(monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "build_problem", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr(stages, "Program", lambda problem: problem)
    machine, times, graph = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    sums = GradientSum("all_to_all", "bfloat16")
    one = StagePlanner(
        SimpleNamespace(), machine, 1.0, None, True, times, [], host=9.0, sparing=True, groups=True,
        sums=sums,
    )  # fmt: skip
    this = stages._Stage(SimpleNamespace(graph=graph), Mesh((2,), 3, first=4), "like", 4, 3, 10, {"x": (REPLICATE,)})
    one._program(this)
    one._program(replace(this, held=2))
    ((given, named),) = asked
    assert given == (graph, CostModel(machine, this.mesh, True, times, sums), Recomputing(), 4, this.layouts)
    assert named == {"host": 9.0, "sparing": True, "groups": True, "known": one.known}


def test_no_step_is_faster_than_the_busiest_rank_works(monkeypatch):
    """Of zb-v, ranks have the first and last stage, and the two in the middle: 9 and 6 s of each of 4 micro-batches."""
    needs = [stages.Needs(seconds, 1.0, 0.0) for seconds in (1.0, 2.0, 4.0, 8.0)]
    halves = [one._replace(seconds=one.seconds / 2) for one in needs]
    candidate = Candidate(Schedule("zb-v", 2, 4, 4), (1, 1, 1, 1), (REPLICATE,), TWO)
    estimate = stages.Estimate(candidate, tuple(needs), 50.0)
    assert replace(planner(), sparing=True)._least_seconds(estimate) == 36.0
    asked = []

    def estimated(self, candidate):
        asked.append((self.memory, candidate.splits))
        return stages.Estimate(candidate, tuple(halves), 25.0)

    monkeypatch.setattr(StagePlanner, "estimate", estimated)
    assert planner()._least_seconds(estimate) == 18.0, "what saves memory could make it as fast as that"
    in_two_parts = replace(estimate, candidate=replace(candidate, splits=True))
    assert replace(planner(), sparing=True)._least_seconds(in_two_parts) == 18.0, (
        "as whole backwards may, in less memory"
    )
    assert asked == [(math.inf, False), (1.0, False)]


def test_stages_know_what_crosses_and_what_they_share():
    """[1, 32, 32] in fp32 goes from stage to stage; in halves, where the layout says so. The embedding is the head."""
    graph = llama(tied=True)
    begins = pivots(graph)
    machine = SimpleNamespace(devices_per_node=8)
    one = StagePlanner(graph, machine, 1.0, None, False, None, begins)
    schedule, tied, mesh = Schedule("1f1b", 4, 4, 8), "model.model.embed_tokens.weight", PipelineMesh.of([(2,)] * 4, 1)
    found = one._stages(Candidate(schedule, (1, 1, 1, 1), (Shard(1),), mesh))
    assert [stage.held for stage in found] == [4, 3, 2, 1]
    assert [stage.count for stage in found] == [8] * 4
    half = 4 * 32 * 32 // 2
    assert [stage.receive_buffers for stage in found] == [8 * half, 16 * half, 16 * half, 8 * half]
    crossing = {"layers_0": (Shard(1),), "layers_1": (Shard(1),), "layers_2": (Shard(1),)}
    shared = {tied: (SHARED,)}
    assert [dict(stage.layouts) for stage in found] == [
        {"layers_0": crossing["layers_0"], **shared}, {name: crossing[name] for name in ("layers_0", "layers_1")},
        {name: crossing[name] for name in ("layers_1", "layers_2")}, {"layers_2": crossing["layers_2"], **shared},
    ]  # fmt: skip
    assert found[1].like == found[2].like
    assert len({stage.like for stage in found}) == 3
    others = one._stages(Candidate(schedule, (1, 1, 1, 1), (Shard(3),), mesh))
    assert dict(others[1].layouts) == {"layers_0": (REPLICATE,), "layers_1": (REPLICATE,)}, "of three dimensions"
    assert others[1].receive_buffers == 32 * half
    assert others[1].like != found[1].like
    shorter = one._stages(Candidate(replace(schedule, micro_batches=4), (1, 1, 1, 1), (Shard(1),), mesh))
    assert shorter[1].like != found[1].like
    one.recompute_modules = ["LlamaMLP", "CausalLM", "LlamaModel"]
    assert one._recomputed(found[1].cut.graph) == ["LlamaMLP", "CausalLM", "LlamaModel"]
    one.recompute_modules = ["Linear", "Embedding"]
    assert one._recomputed(found[1].cut.graph) == ["Linear"], "the embedding is in the first stage"
    assert one._recomputed(found[0].cut.graph) == ["Linear", "Embedding"]


@pytest.mark.parametrize(
    ("per_node", "sizes", "copies", "firsts"),
    [
        (8, [(2,)] * 4, 2, [0, 0, 0, 0]),
        (2, [(2,)] * 4, 2, [0, 0, 0, 0]),
        (3, [(2,)] * 4, 1, [0, 2, 0, 0]),  # 0 and 1, then 2 and 3 on two nodes, 4 and 5, 6 and 7
        (8, [(2, 3)] * 4, 1, [0, 6, 4, 0]),  # to 5, 11, 17, and 23
        (4, [(4,), (1,), (2,), (2,)], 1, [0, 0, 0, 3]),
    ],
)
def test_ranks_whose_devices_lie_on_nodes_alike_are_planned_alike(per_node, sizes, copies, firsts):
    machine = SimpleNamespace(devices_per_node=per_node)
    one = StagePlanner(SimpleNamespace(), machine, 1.0, None, False, None, [])
    wanted = [Mesh(each, copies, first) for each, first in zip(sizes, firsts)]
    assert [one._as_planned(mesh) for mesh in PipelineMesh.of(sizes, copies).ranks] == wanted


def test_a_plan_for_another_stage_has_the_names_of_this_one(tmp_path):
    """The second stage's plan under the third one's names is what planning the third one gives."""
    whole = llama()
    second, third = (stage.graph for stage in cut(whole, pivots(whole)[1:])[1:3])
    machine = load_hardware(tiny.write_hardware(tmp_path, intra={"bandwidth": 1e6, "latency": 1e-3}))
    given, wanted = (
        find_plan(one, [Mesh((2,))], machine, micro_batches=2, recompute_modules=("LlamaMLP",), sparing=False)
        for one in (second, third)
    )
    assert second.root.outputs != third.root.outputs
    assert _renamed(given, second) is given
    found = _renamed(given, third)
    assert found.graph is third
    assert found.to_json() == wanted.to_json() != given.to_json()
    for name in ("seconds", "memory", "beside", "master_only", "exchanged_once"):
        assert getattr(found, name) == getattr(wanted, name), name
    root = third.root
    other, own = dict(zip(second.root.outputs, root.outputs)), root.outputs[0]
    (was,) = other
    others = {(root.name, was): 1.0, ("layer", was): 2.0, (root.name, "another"): 3.0}
    kept = replace(
        given, gathered_again={(root.name, was), (root.name, "another"), ("layer", was)},
        recomputed={root.name: {was}, "layer": {was}}, nodes={},
        seconds={Key("forward", *at): seconds for at, seconds in others.items()},
        master_only={next(iter(second.parameters))},
    )  # fmt: skip
    found = _renamed(kept, third)
    assert found.gathered_again == {(root.name, own), (root.name, "another"), ("layer", was)}
    assert found.recomputed == {root.name: {own}, "layer": {was}}
    others[root.name, own] = others.pop((root.name, was))
    assert found.seconds == {Key("forward", *at): seconds for at, seconds in others.items()}
    assert found.master_only == {next(iter(third.parameters))}


def test_what_a_layout_does_not_divide_crosses_whole():
    mesh = Mesh((2, 3))
    for shape, layout, fits in (
        ((4, 6), (Shard(0), Shard(1)), True), ((5, 6), (Shard(0), Shard(1)), False), ((6, 5), (Shard(0),) * 2, True),
        ((4, 6), (Shard(2), Shard(1)), False), ((4, 6), (Shard(1), REPLICATE), True), ((), (REPLICATE,) * 2, True),
    ):  # fmt: skip
        assert _fitting(shape, layout, mesh) == (layout if fits else (REPLICATE,) * 2), (shape, layout)
    assert _fitting((4, 6), (Shard(1),), Mesh((1,))) == (REPLICATE,), "one device has all"


def test_stages_on_unequal_numbers_of_devices_hold_what_they_can_divide():
    """[1, 32, 32] in fp32, by the sequence: in halves on two devices, whole on three and on one."""
    graph = llama()
    machine = SimpleNamespace(devices_per_node=8)
    one = StagePlanner(graph, machine, 1.0, None, False, None, pivots(graph))
    mesh = PipelineMesh.of([(2,), (3,), (1,)], 1)
    found = one._stages(Candidate(Schedule("1f1b", 3, 3, 5), (2, 1, 1), (Shard(1),), mesh))
    size = 5 * 4 * 32 * 32
    assert [stage.mesh.sizes for stage in found] == [(2,), (3,), (1,)]
    assert [list(stage.layouts.values()) for stage in found] == [[(Shard(1),)], [(REPLICATE,)] * 2, [(REPLICATE,)]]
    assert [stage.receive_buffers for stage in found] == [size // 2, 2 * size, size]


def test_the_second_part_of_backward_computes_gradients_of_weights_alone(monkeypatch):
    """Also in the first stage: where its input has no gradient, its first part is as long as any."""
    monkeypatch.setattr(stages, "weight_seconds", lambda plan: 6.0 * plan.splits)
    plan = stage()
    plan.splits = True
    found = planner()._seconds(plan)
    assert (found.forward, found.backward) == (FORWARD, BACKWARD)
    assert (found.inputs, found.weights) == (BACKWARD - 6.0, 6.0)
    assert planner()._seconds(plan, update=True).backward == BACKWARD + UPDATE
    plan.splits = False
    whole = planner()._seconds(plan)
    assert (whole.forward, whole.backward, whole.inputs, whole.weights) == (FORWARD, BACKWARD, BACKWARD, 0.0)


def test_what_cannot_be_split():
    """Weights that are gathered early, what lies on the host, and what is computed in pieces."""
    plain = stage()
    plain.levels = {"layer": {KEEPS_ALL: 3}}
    assert stages._can_split(plain)
    gathers, hosts, cuts = stage(), stage(), stage()
    gathers.memory[Key("buffers", "", "gathered early")] = 1.0
    hosts.levels = {"other": {KEEPS_ALL: 1}, "layer": {KEEPS_ALL: 3, HOST: 1}}
    cuts.pieces = {("layer", "y"): 4}
    assert not any(stages._can_split(plan) for plan in (gathers, hosts, cuts))


def test_where_only_the_sum_is_known_backward_is_twice_forward():
    split = Candidate(Schedule("zb-v", 2, 4, 4), (1,) * 4, (REPLICATE,), TWO, splits=True)
    for candidate, parts in ((split, (3.0, 3.0)), (replace(split, splits=False), (6.0, 0.0))):
        (guess,) = planner()._guess(candidate, [Needs(9.0, 1.0, 0.0)])
        assert (guess.forward, guess.backward, guess.inputs, guess.weights) == (3.0, 6.0, *parts)


def test_a_plan_is_taken_for_another_stage_only_where_that_does_the_same():
    whole = llama()
    first, second, third, last = (stage.graph for stage in cut(whole, pivots(whole)[1:]))
    assert _likeness(second) == _likeness(third), "they differ in names alone"
    assert len({_likeness(graph) for graph in (first, second, last)}) == 3
    root = second.root
    (call,) = (node for node in root.nodes if isinstance(node, Call))
    (sent,) = root.outputs

    def with_root(**changes):
        own = second.blocks[call.block]
        return replace(
            second, root=replace(root, **changes), blocks={call.block: own, "another": replace(own, name="another")}
        )

    others = [
        with_root(nodes=[replace(node, block="another") if node is call else node for node in root.nodes]),
        with_root(nodes=[replace(node, op=f"{node.op} else") if node is not call else node for node in root.nodes]),
        with_root(nodes=[replace(node, kwargs={"dim": 1}) if node is not call else node for node in root.nodes]),
        with_root(nodes=[replace(node, kwargs={"dim": 2}) if node is not call else node for node in root.nodes]),
        with_root(nodes=[replace(node, no_grad=True) if node is not call else node for node in root.nodes]),
        with_root(tensors={**root.tensors, sent: replace(root.tensors[sent], requires_grad=False)}),
        with_root(outputs=list(root.inputs)),
    ]
    assert len(root.nodes) > 1, "the second of them is another graph"
    assert len({_likeness(other) for other in [with_root(), *others]}) == 1 + len(others)
