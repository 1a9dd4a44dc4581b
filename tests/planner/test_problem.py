"""What is to be decided of a model, and what flows between the decisions: by hand, of a model whose layers share
weights with each other and with what is around them, and of which two get the same scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnscaler.compiler import Source
from nnscaler.graph import Graph
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.problem import Flow, Problem, Recomputing, build_problem
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, ON_DEVICE, RECOMPUTES_ALL, SAME_ON_HOST
from nnscaler.trace import trace

WEIGHT = 8 * 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)).t().t() * scale)


class Model(nn.Module):
    scales = (0, 1, 0)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.layers[1].up.weight
        for layer in self.layers:
            layer.down.weight = self.layers[0].down.weight
        self.gain, self.frozen = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("table", torch.ones(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        both = self.table * self.gain, self.table + self.frozen.unsqueeze(1)
        for layer, scale in zip(self.layers, self.scales):
            x = layer(x, both[scale])
        return self.head(x).sum()


class Chained(Model):
    scales = (0, 0, 1)


def traced(kind: type[Model]) -> Graph:
    inputs = {"x": torch.zeros(4, 8)}
    model, buffers = Source(kind, inputs, torch.bfloat16).build()
    return trace(model, inputs, buffers)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return traced(Model)


def stated(graph: Graph, mesh: Mesh = Mesh((2,)), micro_batches: int = 3, **given: object) -> Problem:  # noqa: B008
    return build_problem(graph, CostModel(load_hardware("h100"), mesh), Recomputing(), micro_batches, **given)


def of_parameter(problem: Problem, block: str, tensor: str):
    return problem.decisions[problem.parameter_of[block, tensor]]


def test_weights_that_are_tied_or_of_all_calls_are_stored_alike(graph):
    problem = stated(graph)
    assert problem.calls == {"layer": 3, "model": 1}
    assert problem.parameter_of["layer", "up_weight"] == problem.parameter_of["model", "head_weight"]
    counts = {use: problem.decisions[index].count for use, index in problem.parameter_of.items()}
    assert counts == {
        ("layer", "up_weight"): 3, ("model", "head_weight"): 3, ("layer", "down_weight"): 1, ("model", "gain"): 1,
        ("model", "frozen"): 1, ("model", "table"): 1,
    }  # fmt: skip
    trained = 3 * WEIGHT + WEIGHT + 8
    assert problem.gathered_early == 2 * trained
    assert problem.optimizer_state == (4 + 8) * trained / 2
    assert problem.exchange_buffers == 4 * trained * (1 + 1 / 2), "of one bucket, with what comes back"


def test_no_more_is_gathered_early_than_there_is_room_for(graph, monkeypatch):
    monkeypatch.setattr(stating, "PREFETCH_BYTES", 100)
    assert stated(graph).gathered_early == 100


def test_ways_to_store_a_parameter(graph):
    """(layout, whether its gradient is exchanged once a step, whether only its master is stored)"""

    def ways(mesh: Mesh, tensor: str, graph: Graph = graph, **given: object) -> list[tuple]:
        options = of_parameter(stated(graph, mesh, **given), "model", tensor).options
        return [(*one.outputs[0], one.exchanged_once, one.master_only) for one in options]

    whole, halves = [(SHARED, False, False), (SHARED, True, False)], [(Shard(0), False, False), (Shard(0), False, True)]
    assert ways(Mesh((2,)), "gain") == whole + halves
    assert ways(Mesh((2,)), "gain", sparing=False) == whole + halves[:1]
    assert ways(Mesh((2,)), "gain", micro_batches=1) == whole[:1] + halves
    in_fp32 = {**graph.parameters, "gain": replace(graph.parameters["gain"], dtype=torch.float32)}
    assert ways(Mesh((2,)), "gain", replace(graph, parameters=in_fp32)) == whole + halves[:1], "which is its own master"
    assert ways(Mesh((1,)), "gain") == [(SHARED, False, False)]
    assert ways(Mesh((1,), 2), "gain") == whole
    assert ways(Mesh((2,), 2), "gain") == [*whole, halves[0], (Shard(0), True, False)], "two have each half"
    assert ways(Mesh((2,)), "gain", layouts={"gain": (Shard(0),)}) == halves
    assert ways(Mesh((2,)), "frozen") == [(REPLICATE, False, False), (Shard(0), False, False)]
    assert ways(Mesh((2,)), "table") == [(REPLICATE, False, False)], "a buffer"
    assert ways(Mesh((8,)), "frozen") == [(REPLICATE, False, False)], "of four elements"


def test_each_tensor_flows_from_what_makes_it_to_all_that_use_it(graph):
    problem = stated(graph)
    names = [f"{one.kind} {one.block}.{one.name}" for one in problem.decisions]

    def said(flow: Flow) -> tuple:
        users = [(names[index].removeprefix("unit "), place) for index, place in flow.consumers]
        return names[flow.producer[0]].removeprefix("unit "), users, flow.count, flow.needed, sorted(flow.read_by)

    flows = {(flow.block, flow.tensor): flow for flow in problem.flows}
    of_layer = {tensor: said(flow) for (block, tensor), flow in flows.items() if block == "layer"}
    up, down = of_layer.pop("up_weight"), of_layer.pop("down_weight")
    assert [weight[1:] for weight in (up, down)] == [
        ([("layer.up", 1)], 3, False, [0]),
        ([("layer.down", 1)], 3, False, [2]),
    ]
    assert of_layer == {
        "x": ("input layer.x", [("layer.up", 0), ("layer.add", 0)], 3, True, [0]),
        "scale": ("input layer.scale", [("layer.mul", 1)], 2, True, [1]),  # two different ones
        "up": ("layer.up", [("layer.mul", 0)], 3, True, [1]),
        "mul": ("layer.mul", [("layer.down", 0)], 3, True, [2]),
        "down": ("layer.down", [("layer.add", 1)], 3, False, []),
        "add": ("layer.add", [("output layer.add", 0)], 3, False, []),
    }
    of_root = {tensor: said(flow) for (block, tensor), flow in flows.items() if block == "model"}
    assert of_root["x"] == ("input model.x", [("input layer.x", 0)], 1, False, [])
    assert of_root["layers_0"] == ("output layer.add", [("input layer.x", 0)], 2, False, []), "two go to the next layer"
    assert of_root["layers_2"] == ("output layer.add", [("model.head", 0)], 1, True, [5])
    assert of_root["table"] == ("parameter model.table", [("model.mul", 0), ("model.add", 1)], 1, False, [0])
    assert {tensor for (_, tensor), flow in flows.items() if flow.is_parameter} == {
        "up_weight", "down_weight", "head_weight", "gain", "frozen", "table",
    }  # fmt: skip
    assert {tensor for (_, tensor), flow in flows.items() if flow.freed_first} == {"layers_2"}
    assert {tensor for (_, tensor), flow in flows.items() if flow.used_last} == {"head_weight"}


def test_units_know_how_often_and_where_they_run(graph):
    units = {(one.block, one.name): one for one in stated(graph).decisions if one.kind == "unit"}
    assert {name: (one.count, one.place, one.region, one.reads) for name, one in units.items()} == {
        ("layer", "up"): (3, 0, 0, True),
        ("layer", "mul"): (3, 1, 0, True),
        ("layer", "down"): (3, 2, 0, True),
        ("layer", "add"): (3, 3, 0, False),
        ("model", "mul"): (1, 0, 0, True),
        ("model", "add"): (1, 1, 0, False),
        ("model", "head"): (1, 5, 3, True),
        ("model", "sum_1"): (1, 6, 3, False),
    }  # fmt: skip, behind three calls
    assert not any(one.fused for one in units.values())
    fused = build_problem(graph, CostModel(load_hardware("h100"), Mesh((2,)), True), Recomputing(), 3)
    kinds = {name for name, one in zip(units, (d for d in fused.decisions if d.kind == "unit")) if one.fused}
    assert kinds == {("layer", "mul"), ("layer", "add"), ("model", "mul"), ("model", "add"), ("model", "sum_1")}


def test_levels_that_calls_may_have(graph):
    """Groups only where layers follow one another that get the same besides, and no larger ones than these are; the
    host's where it has memory."""
    pairs, chained = tuple(level for level in IN_GROUPS if level.size == 2), traced(Chained)
    for one, groups in ((graph, True), (chained, False)):
        problem = stated(one, groups=groups)
        assert (problem.levels, problem.stacks) == ({"layer": ON_DEVICE, "model": (KEEPS_ALL,)}, [])
    (stack,) = (problem := stated(chained)).stacks
    assert problem.levels["layer"] == ON_DEVICE + pairs
    names = [(problem.decisions[index].kind, problem.decisions[index].name) for index in (stack.taken, stack.given)]
    assert (stack.block, stack.lengths, names) == ("layer", (2,), [("input", "x"), ("output", "add")])
    away = tuple(SAME_ON_HOST[level] for level in ON_DEVICE if level in SAME_ON_HOST)
    assert stated(graph, groups=False, host=1.0).levels == {"layer": ON_DEVICE + away, "model": (KEEPS_ALL,)}
    costs = CostModel(load_hardware("h100"), Mesh((1,)))
    layer = graph.blocks["layer"]
    every = frozenset(node.name for node in layer.nodes)
    for named, level in ((every, RECOMPUTES_ALL), (frozenset(), KEEPS_ALL)):
        asked = Recomputing(False, {"layer": named})
        assert build_problem(graph, costs, asked, 1).levels == {"layer": (level,), "model": (KEEPS_ALL,)}
    (some,) = Recomputing(False, {"layer": frozenset({"up"})}).levels(layer)
    assert some.named == frozenset({"up"})


def test_what_may_be_computed_in_pieces(graph):
    """All of a layer, along the rows, of which a device has four or two: into so many parts, and no more."""
    (divisible,) = (problem := stated(graph)).divisible
    assert (divisible.block, divisible.whole, divisible.ends_block) == ("layer", 4, True)
    assert [problem.decisions[index].name for index in divisible.decisions] == ["up", "mul", "down", "add"]
    assert divisible.dims == {
        name: int(name == "t") for name in ("x", "up", "tanh", "t", "t_1", "scale", "mul", "down", "add")
    }
    for index, sizes in zip(divisible.decisions, divisible.sizes):
        layouts = [option.outputs[0] for option in problem.decisions[index].options]
        assert list(sizes) == [2 if layout == (Shard(0),) else 4 for layout in layouts]
    assert stated(graph, sparing=False).divisible == []
    assert stated(graph, groups=False).divisible == [replace(divisible, whole=1)]
