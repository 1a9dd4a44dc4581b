"""What a pipeline's plan makes of its stages' figures, by hand: which stages count together, and what counts once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nnscaler.graph import Call
from nnscaler.mesh import Mesh
from nnscaler.pipeline.cut import cut, pivots
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.pipeline.simulate import Timeline
from nnscaler.pipeline.stages import StagePlanner, _likeness
from nnscaler.plan import Key, Plan
from nnscaler.recompute import KEEPS_ALL, LEVELS
from nnscaler.schedules import Schedule
from tests.pipeline.test_cut import llama

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
}
FORWARD, BACKWARD, AGAIN, UPDATE = 15.0, 1008.0, 192.0, 3072.0


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
    assert plan.mesh == Mesh((2,), 3, pipeline=2)
    assert plan.micro_batches == 4


def planner(fused: bool = False) -> StagePlanner:
    return StagePlanner(SimpleNamespace(), Mesh((2,)), SimpleNamespace(), 1.0, None, fused, None, [])


def test_backward_is_split_where_both_parts_compute_again_what_they_need():
    plan = stage()
    plan.weight_seconds = 6.0
    found = planner()._seconds(plan)
    assert (found.forward, found.backward) == (FORWARD, BACKWARD)
    assert (found.inputs, found.weights) == (BACKWARD - 6.0, 6.0 + AGAIN)
    assert planner()._seconds(plan, update=True).backward == BACKWARD + UPDATE
    first = found.of_first()
    assert (first.forward, first.inputs, first.weights) == (FORWARD, 0.0, BACKWARD + AGAIN)
    whole = planner(fused=True)._seconds(plan)
    assert (whole.forward, whole.backward, whole.inputs, whole.weights) == (FORWARD, BACKWARD, BACKWARD, 0.0)


def test_what_cannot_be_split():
    """Compiled regions, weights that are gathered early, what lies on the host, and what is computed in pieces."""
    plain = stage()
    plain.levels = {"layer": {KEEPS_ALL: 3}}
    assert planner()._splits(plain)
    assert not planner(fused=True)._splits(plain)
    gathers, hosts, cuts = stage(), stage(), stage()
    gathers.memory[Key("buffers", "", "gathered early")] = 1.0
    hosts.levels = {"other": {KEEPS_ALL: 1}, "layer": {KEEPS_ALL: 3, HOST: 1}}
    cuts.pieces = {("layer", "y"): 4}
    assert not any(planner()._splits(plan) for plan in (gathers, hosts, cuts))


def test_where_only_the_sum_is_known_backward_is_twice_forward():
    guess = planner()._guess(9.0)
    assert (guess.forward, guess.backward, guess.inputs, guess.weights) == (3.0, 6.0, 3.0, 3.0)
    guess = planner(fused=True)._guess(9.0)
    assert (guess.forward, guess.backward, guess.inputs, guess.weights) == (3.0, 6.0, 6.0, 0.0)


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
        with_root(tensors={**root.tensors, sent: replace(root.tensors[sent], requires_grad=False)}),
        with_root(outputs=list(root.inputs)),
    ]
    assert len(root.nodes) > 1, "the second of them is another graph"
    assert _likeness(with_root()) not in {_likeness(other) for other in others}
