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
from nnscaler.placement import REPLICATE, SHARED, Placements, Shard
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Flow, Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Terms
from nnscaler.planner.working import Working
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, ON_DEVICE, RECOMPUTES_ALL, SAME_ON_HOST, Level
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
        self.layers = nn.ModuleList(Layer() for _ in self.scales)
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


class TwiceThree(Model):
    scales = (0, 0, 0, 1, 1, 1)


class TwiceFive(Model):
    scales = (0,) * 5 + (1,) * 5


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
    for decisions, everywhere, products in ((stated(graph).decisions, 1, 1), (fused.decisions, 4, 2)):
        kept = {one.name: len(one.inner_kept_at) for one in decisions if (one.kind, one.block) == ("unit", "layer")}
        assert kept == {"up": products, "mul": 1, "down": everywhere, "add": everywhere}, "of four levels"
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


def priced(problem: Problem, level: Level, pieces: int, **layouts: Placements) -> bool:
    """Whether a layer's stretch may be in so many pieces at a level; what is not named lies whole on both devices."""
    chosen = []
    for decision in problem.decisions:
        wanted = layouts.get(decision.name, (REPLICATE,)) if decision.block == "layer" else (REPLICATE,)
        found = [i for i, option in enumerate(decision.options) if option.outputs[0] in (wanted, (SHARED,))]
        chosen.append(found[0])
    levels = {"layer": {level: 3}, "model": {KEEPS_ALL: 1}}
    return (
        price(Program(problem), Solution(chosen, levels, pieces={("layer", "add"): pieces} if pieces else {}))
        is not None
    )


def test_what_is_resharded_inside_or_kept_is_not_computed_in_pieces(graph):
    problem, columns = stated(graph, groups=False), {"mul": (Shard(1),)}
    found = [
        priced(problem, level, pieces, **layouts)
        for level in (RECOMPUTES_ALL, KEEPS_ALL)
        for pieces in (0, 4)
        for layouts in ({}, columns)
    ]
    assert found == [True, True, True, False, True, True, False, False]


def test_what_is_divided_among_devices_is_in_no_more_pieces_than_a_device_has_rows(graph):
    """A device has two of four rows: all four may be in four pieces."""
    problem = stated(graph, groups=False)
    rows = dict.fromkeys((one.name for one in problem.decisions if one.kind == "unit"), (Shard(0),))
    assert [priced(problem, RECOMPUTES_ALL, pieces, **rows) for pieces in (0, 4)] == [True, False]


def test_what_other_calls_keep_is_counted_of_the_micro_batch_that_runs_backward(graph, monkeypatch):
    """However many others are in flight."""
    found: dict[int, list] = {}
    count = Working.kept_after

    def counted(self: Working, block: str, level: Level) -> Terms:
        found[self.problem.in_flight].append(((block, level), terms := count(self, block, level)))
        return terms

    monkeypatch.setattr(Working, "kept_after", counted)
    for in_flight in (1, 4):
        found[in_flight] = []
        Program(stated(graph, in_flight=in_flight, groups=False))
    assert any(terms for _, terms in found[1])
    assert found[1] == found[4]


def first_of_all(program: Program) -> list[int]:
    return [0] * len(program.problem.decisions)


def test_no_more_calls_are_in_groups_than_their_chains_have_places_for():
    """Of two chains of three, two calls each may be a pair; three pairs would reach from one into the other."""
    problem = stated(traced(TwiceThree), Mesh((1,)))
    (pair, *_) = (level for level in problem.levels["layer"] if level.size == 2)
    program, found = Program(problem), []
    for together in (2, 4, 6):
        levels = {"layer": {pair: together, KEEPS_ALL: 6 - together}, "model": {KEEPS_ALL: 1}}
        found.append(price(program, Solution(first_of_all(program), levels)) is not None)
    assert found == [True, True, False]


def test_groups_of_all_sizes_together_have_no_more_places():
    """Two chains of five have places for two fours, or for a four and two pairs: for eight calls, whatever they are."""
    problem = stated(traced(TwiceFive), Mesh((1,)))
    pair, four = (next(one for one in problem.levels["layer"] if one.size == size) for size in (2, 4))
    program, found = Program(problem), []
    for pairs, fours in ((8, 0), (0, 8), (4, 4), (2, 8), (6, 4)):
        levels = {"layer": {pair: pairs, four: fours, KEEPS_ALL: 10 - pairs - fours}, "model": {KEEPS_ALL: 1}}
        found.append(price(program, Solution(first_of_all(program), levels)) is not None)
    assert found == [True, True, True, False, False]


def test_a_level_that_some_call_has_counts_as_used(graph):
    program = Program(stated(graph, groups=False, host=1e12))
    for level in program.problem.levels["layer"]:
        levels = {"layer": {level: 2}, "model": {KEEPS_ALL: 1}}
        levels["layer"][KEEPS_ALL] = levels["layer"].get(KEEPS_ALL, 0) + 1
        values = program.values(Solution(first_of_all(program), levels))
        assert program.statement.values(values) is not None
        for (_, used), variable in program.choices.u.items():
            assert values[variable] == (used in levels["layer"])
            if values[variable]:
                assert program.statement.values({**values, variable: 0.0}) is None


def test_sizes_of_what_flows_are_those_of_all_its_layouts(graph):
    """With the largest, which sums are bounded by: of [4, 8] in fp32, or half of it on each of two devices."""
    program = Program(stated(graph))
    flow = next(flow for flow in program.problem.flows if (flow.block, flow.tensor) == ("layer", "up"))
    terms, most = program.flows.size(flow)
    assert sorted(size for _, size in terms) == [64, 64, 128, 128], "a sum's terms are whole"
    assert most == 128
