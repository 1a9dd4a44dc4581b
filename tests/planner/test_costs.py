"""What the cost model says of exchanges, updates and the optimizer's state, and what the search says of its plan: each
figure worked out by hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.hardware import Hardware
from nnscaler.hardware.communication import Timing
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, Shard
from nnscaler.plan import GIB
from nnscaler.planner import costs, find_plan, search
from nnscaler.planner.costs import CostModel
from nnscaler.planner.options import unit_options
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.solve import OutOfTime
from nnscaler.reshard import reshards
from nnscaler.sums import gradient_sum
from nnscaler.units import divide
from tests.planner.test_by_hand import LINK, MEMORY, graph, machine

__all__ = ["graph", "machine"]

WEIGHT = TensorMeta((10, 10), torch.bfloat16, True)
NORM = TensorMeta((10,), torch.float32, True)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(costs, "BUCKET_ELEMENTS", 1000)


def test_buffers_of_exchanges_are_buckets(machine):
    """Of 4000 bytes: six on their way, with the part of each that comes back, and two that are being filled."""
    model = CostModel(machine, Mesh((4,), 2))
    assert model.exchange_buffers(20_000) == 4000 * (6 + 2 + 6 / 8)
    assert model.exchange_buffers(3500) == 4000 * (4 + 4 / 8), "of four buckets"
    assert model.exchange_buffers(6500) == 4000 * (7 + 6 / 8), "of seven"
    assert model.exchange_buffers(500) == 2000 * (1 + 1 / 8), "of a part of one"


def test_the_optimizer_s_state(machine):
    """A bf16 weight has a master weight, an fp32 one is its own; both have two moments. Three buckets are staged."""
    model = CostModel(machine, Mesh((4,), 2))
    assert model.state_memory([WEIGHT, NORM]) == (100 * (4 + 8) + 10 * 8) / 8
    assert model.staging_memory(20_000) == 3 * 1000 * 12 / 2
    assert model.staging_memory(500) == 3 * 500 * 12 / 2
    held = model.parameter_memory(NORM, (REPLICATE,), 1)
    assert held == {"parameters": 40, "gradients": 40 / 8, "master weights": 0, "moments": 80 / 8}
    held = model.parameter_memory(replace(WEIGHT, shape=(12, 10)), (Shard(0),), 4, exchanged_once=True)
    assert held == {"parameters": 60, "gradients": 120, "master weights": 60, "moments": 120}, "3 rows of 10"
    assert model.parameter_memory(replace(WEIGHT, requires_grad=False), (REPLICATE,), 4) == {"parameters": 200}


def test_gradients_on_the_host_and_where_they_come_to(machine):
    """All ranks own equal parts of them. As many buckets as there are slots, or as there are, are on the device; the
    copies divide them."""
    model = CostModel(machine, Mesh((4,), 2))
    assert model.gradient_memory([WEIGHT, NORM], 3) == (100 + 10) * 4 / 8
    large = replace(WEIGHT, shape=(100, 25))
    assert model.slots_memory([WEIGHT, NORM], 3) == 110 * 4 / 2
    assert model.slots_memory([large], 3) == 3 * 1000 * 4 / 2
    assert model.slots_memory([large] * 9, 3) == costs.GRADIENT_SLOTS * 1000 * 4 / 2
    alone = CostModel(machine, Mesh((1,)))
    assert alone.gradient_memory([WEIGHT, NORM], 1) == 100 * 2 + 10 * 4, "to which none is added"
    assert alone.slots_memory([WEIGHT, NORM], 1) == 110 * 4, "of the largest type"
    assert alone.slots_memory([WEIGHT], 1) == 100 * 2


def test_a_cast_reads_fp32_and_writes_the_weight_s_type(machine):
    """25 elements of each of four devices; it is launched, too."""
    model = CostModel(replace(machine, launch=1e-3), Mesh((4,), 2))
    weight = replace(WEIGHT, shape=(20, 5))
    assert model.cast(weight, (Shard(0),)) == pytest.approx(1e-3 + 25 * (4 + 2) / MEMORY)
    assert model.cast(weight, (REPLICATE,)) == pytest.approx(1e-3 + 100 * (4 + 2) / MEMORY)
    assert model.local_bytes(weight, (Shard(0),)) == 50
    assert (model.owners((Shard(0),)), model.owners((REPLICATE,))) == (2, 8)
    assert model.weight_exchange(weight, (REPLICATE,)) == pytest.approx(2 * 100 * 7 / 8 / LINK)


def test_bytes_that_move_are_those_of_the_larger_side(machine):
    """Of [32, 8] in bf16, from whole to slices of one device's rows, and on to columns."""
    model = CostModel(machine, Mesh((4,)))
    meta = TensorMeta((32, 8), torch.bfloat16, True)
    for source, target, size in (
        (REPLICATE, Shard(0), 512), (Shard(0), REPLICATE, 512), (Shard(0), Shard(1), 128), (PARTIAL, Shard(1), 512),
        (PARTIAL, REPLICATE, 512),
    ):  # fmt: skip
        ((change, part, _),) = model.each_reshard(meta, (source,), reshards((source,), (target,)))
        assert (change.source, change.target, part) == (source, target, size)
    two = CostModel(machine, Mesh((2, 2)))
    changes = reshards((Shard(0), Shard(0)), (REPLICATE, REPLICATE))
    assert [part for _, part, _ in two.each_reshard(meta, (Shard(0), Shard(0)), changes)] == [256, 512]


def test_a_fused_cluster_moves_what_enters_and_leaves_it(machine):
    """exp(a * b), of [4, 8] in bf16, where b is frozen: forward reads two and writes one; backward reads b, the result
    and its gradient, and writes one."""
    block = Block("model", "Model")
    block.tensors = {name: TensorMeta((4, 8), torch.bfloat16, name != "b") for name in "abmy"}
    block.inputs, block.outputs = ["a", "b"], ["y"]
    block.nodes = [
        Node("m", "aten.mul.Tensor", (Ref("a"), Ref("b")), {}, ("m",)),
        Node("y", "aten.exp.default", (Ref("m"),), {}, ("y",)),
    ]
    (unit,) = divide(block)
    each = 4 * 8 * 2
    (fused,) = unit_options(unit, block, CostModel(machine, Mesh((1,)), fused=True))
    assert fused.seconds.forward == pytest.approx(3 * each / MEMORY)
    assert fused.seconds.backward == pytest.approx(4 * each / MEMORY)
    assert (fused.transient, fused.inner_bytes) == (3 * each, 0)
    (apart,) = unit_options(unit, block, CostModel(machine, Mesh((1,))))
    assert apart.seconds.forward == pytest.approx((3 + 2) * each / MEMORY)
    # Each reads the gradient of its result and what it has saved with all that forward read, and writes one.
    assert apart.seconds.backward == pytest.approx((4 + 3) * each / MEMORY)
    assert (apart.transient, apart.inner_bytes) == (3 * each, 0), "the last one's result is no inner tensor"
    block.tensors["a"] = TensorMeta((4, 8), torch.bfloat16)
    block.tensors |= {name: TensorMeta((4, 8), torch.bfloat16) for name in "my"}
    for kind in (True, False):
        (frozen,) = unit_options(unit, block, CostModel(machine, Mesh((1,)), fused=kind))
        assert frozen.seconds.backward == 0


def test_a_fused_cluster_is_free_only_where_all_of_it_are_views(machine):
    """Of a transposed, and of a * b transposed, which reads two and writes one."""
    for takes, moved in (("a", 0), ("m", 3)):
        block = Block("model", "Model")
        block.tensors = {name: TensorMeta((8, 8), torch.bfloat16, name != "b") for name in "abmy"}
        block.inputs, block.outputs = ["a", "b"], ["y"]
        block.nodes = [Node("m", "aten.mul.Tensor", (Ref("a"), Ref("b")), {}, ("m",))] if moved else []
        block.nodes.append(Node("y", "aten.t.default", (Ref(takes),), {}, ("y",)))
        (unit,) = divide(block)
        (fused,) = unit_options(unit, block, CostModel(machine, Mesh((1,)), fused=True))
        assert fused.seconds.forward == pytest.approx(moved * 8 * 8 * 2 / MEMORY)


def test_a_gradient_to_which_none_is_added_stays_as_it_is(machine):
    """On one device in one micro-batch: 2 bytes an element, of which 8 are read and written for the update, and 4 where
    backward writes them."""
    weight = (WEIGHT, (REPLICATE,))
    alone, two = CostModel(machine, Mesh((1,))), CostModel(machine, Mesh((1,), 2))
    models = [(alone, 1), (alone, 2), (two, 1)]
    assert [model.parameter_memory(*weight, n)["gradients"] for model, n in models] == [200, 400, 4 * 50]
    assert alone.update(*weight, 1, True) == pytest.approx(100 * (2 * 12 + 4 * 2 + 6 + 4) / MEMORY)


@pytest.mark.parametrize("once", [True, False])
def test_an_update_by_hand(machine, once):
    """100 elements on two copies, in 4 micro-batches: of the 50 owned ones 46 bytes each are read and written once a
    step, and the bf16 weights travel. In each micro-batch a gradient of 2 bytes is read, and 4 bytes are written: the
    sum, which three of four read before; or what is exchanged, of which they add the owned elements, reading both."""
    model = CostModel(machine, Mesh((1,), 2))
    step = 50 * 46 / MEMORY + 2 * 100 / 2 / LINK
    added = 0.75 * 4 * (100 if once else 3 * 50)
    found = model.update(WEIGHT, (REPLICATE,), 4, once)
    assert found == pytest.approx(step / 4 + (100 * (2 + 4) + added) / MEMORY)
    assert model.gradient_exchange(WEIGHT, (REPLICATE,)) == pytest.approx(4 * 100 / 2 / LINK)
    assert model.exchange_buffer(WEIGHT, (REPLICATE,)) == 4 * 100 * (1 + 1 / 2)


@pytest.mark.parametrize(("nodes", "collective"), [(1, "all_to_all"), (2, "reduce_scatter")])
def test_gradients_that_travel_in_bf16(graph, machine, monkeypatch, nodes, collective):
    """Half as much travels, by the collective that is right within a node or across; and where gradients are exchanged
    once a step, there are buffers too."""
    asked = []

    def seconds(self, name, size, *group):
        asked.append(name)
        return Timing(size, "profile")

    monkeypatch.setattr(Hardware, "collective_seconds", seconds)
    here = replace(machine, devices_per_node=2 // nodes)
    ways = [gradient_sum(dtype, 2, here.devices_per_node) for dtype in ("fp32", "bf16")]
    models = [CostModel(here, Mesh((1,), 2), sums=sums) for sums in ways]
    assert [model.gradient_exchange(WEIGHT, (REPLICATE,)) for model in models] == [4 * 100, 2 * 100]
    assert asked == ["reduce_scatter", collective]
    problems = [build_problem(graph, model, Recomputing(), 2) for model in models]
    options = [
        next(option for decision in problem.decisions for option in decision.options if option.exchanged_once)
        for problem in problems
    ]
    assert [option.exchange_buffers > 0 for option in options] == [False, True]


def test_groups_of_collectives_by_axis_and_node(machine, monkeypatch):
    """(size of the group, whether it spans nodes, devices of it on each node)"""
    asked = []

    def seconds(self, name, *group):
        asked.append(group)
        return Timing(3.0, "profile")

    monkeypatch.setattr(Hardware, "collective_seconds", seconds)

    def groups(per_node: int, mesh: Mesh) -> list[tuple]:
        asked.clear()
        model = CostModel(replace(machine, devices_per_node=per_node), mesh)
        for axis in mesh.axes:
            model.collective("all_gather", 64.0, axis)
        return [group[1:] for group in asked]

    def over_all(per_node: int, mesh: Mesh) -> tuple:
        asked.clear()
        CostModel(replace(machine, devices_per_node=per_node), mesh).collective("all_to_all", 64.0, *mesh.axes)
        return asked[0][1:]

    assert groups(16, Mesh((8,))) == [(8, False, 8)]
    assert groups(4, Mesh((8,))) == [(8, True, 4)]
    assert groups(8, Mesh((2, 4))) == [(2, False, 2), (4, False, 4)]
    assert groups(4, Mesh((2, 4))) == [(2, True, 1), (4, False, 4)]
    assert groups(2, Mesh((2, 4))) == [(2, True, 1), (4, True, 2)]
    assert groups(8, Mesh((4, 4))) == [(4, True, 2), (4, False, 4)]
    assert groups(4, Mesh((2, 2), first=2)) == [(2, True, 1), (2, False, 2)], "2 and 3 on a node, 4 and 5 on the next"
    assert over_all(8, Mesh((2, 4))) == (8, False, 8)
    assert over_all(4, Mesh((2, 4))) == (8, True, 4)
    asked.clear()
    model = CostModel(replace(machine, devices_per_node=4), Mesh((2, 4), 2))
    assert model.among_owners("all_gather", 500.0, (Shard(0), REPLICATE)) == (3.0 * 500 / 4000, "profile")
    assert asked == [(4000, 8, True, 4)], "a whole bucket over two copies of four"
    asked.clear()
    model = CostModel(replace(machine, devices_per_node=16), Mesh((2, 4), 2))
    model.among_owners("all_gather", 500.0, (REPLICATE, Shard(0)))
    assert asked == [(4000, 4, False, 4)]
    asked.clear()
    model = CostModel(replace(machine, devices_per_node=4), Mesh((2, 4), 2))
    model.among_owners("all_gather", 500.0, (REPLICATE, Shard(0)))
    assert asked == [(4000, 4, True, 1)], "those with the same quarter are on four nodes"
    assert CostModel(machine, Mesh((2, 4))).among_owners("all_gather", 500.0, (Shard(0), Shard(1))).seconds == 0.0


def test_the_search_says_how_far_its_plan_may_be_from_the_best(graph, machine, monkeypatch, caplog):
    solve = search.solve

    def loosely(*arguments, **keywords):
        solved = solve(*arguments, **keywords)
        return replace(solved, bound=0.8 * solved.bound)

    caplog.set_level(logging.INFO)
    best = find_plan(graph, [Mesh((2,))], machine, micro_batches=3, memory=2.0 * GIB)
    assert best.gap < 1e-3
    assert "may save" not in caplog.text
    assert f": {best.step_seconds:.3g} s a step, {best.memory_bytes / GIB:.3g} GiB of 2 GiB a device" in caplog.text
    monkeypatch.setattr(search, "solve", loosely)
    plan = find_plan(graph, [Mesh((2,))], machine, micro_batches=3)
    assert plan.bound == pytest.approx(0.8 * best.step_seconds, rel=1e-3)
    assert plan.gap == pytest.approx(0.2, rel=1e-3)
    assert "s a step (a faster one may save up to 20 %)" in caplog.text
    assert plan.memory_limit == 0.9 * machine.memory


def test_when_time_is_out_a_plan_that_fits_is_taken(graph, machine, monkeypatch, caplog):
    def too_late(*arguments, **keywords):
        raise OutOfTime(1e-9)

    best = find_plan(graph, [Mesh((2,))], machine)
    monkeypatch.setattr(search, "solve", too_late)
    caplog.set_level(logging.INFO)
    plan = find_plan(graph, [Mesh((2,))], machine)
    assert plan.memory_bytes <= 0.9 * machine.memory
    assert 1e-9 < plan.bound <= best.step_seconds * (1 + 1e-6), "choices made in parts prove more than the solver did"
    assert (plan.searched.stopped, best.searched.stopped) == (True, False)
    assert "out of time; a plan that fits is taken" in caplog.text


def test_a_mesh_is_searched_only_where_it_could_save_a_thousandth(graph, machine, monkeypatch):
    asked, floor = [], []
    solve = search.solve
    monkeypatch.setattr(search, "solve", lambda program, *a, **k: asked.append(program) or solve(program, *a, **k))
    monkeypatch.setattr(search, "least_seconds", lambda program: floor[0] * best)
    best = find_plan(graph, [Mesh((2,))], machine, sparing=False).step_seconds
    assert len(asked) == 1
    for share, searches in ((0.9985, 2), (0.9995, 1)):
        asked.clear()
        floor[:] = [share]
        plan = find_plan(graph, [Mesh((2,)), Mesh((1, 2))], machine, sparing=False)
        assert len(asked) == searches
        assert plan.gap <= 1.001e-3, "what was not searched could save no more"
