"""The mixed-integer program's optimum is that of trying everything, on random small graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, combinations_with_replacement, product
from math import comb, prod

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from nnscaler import register_op
from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, Node, Ref, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.operators import bind
from nnscaler.placement import SHARED
from nnscaler.plan import Plan
from nnscaler.planner import deferred, find_plan, on_host
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.flows import beside
from nnscaler.planner.pieces import counts_of
from nnscaler.planner.price import price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.search import WORTH
from nnscaler.planner.solve import least_memory, least_seconds, solve, stated
from nnscaler.planner.statement import Account
from nnscaler.recompute import IN_GROUPS, ON_DEVICE, Level
from tests import tiny

MOST = 4000  # solutions that are tried


def add_tensor(block: Block, name: str, shape: tuple[int, ...], needs: bool = True) -> str:
    block.tensors[name] = TensorMeta(shape, torch.float32, needs)
    return name


def grow(draw, block: Block, available: list[str], count: int, width: int) -> str:
    """Adds `count` random nodes that use `available` tensors: products with weights, sums, pointwise functions."""
    for index in range(count):
        kind = draw(st.sampled_from(["linear", "add", "silu", "mul"]))
        source = draw(st.sampled_from(available))
        shape = block.tensors[source].shape
        name = f"t{index}"
        if kind == "linear":
            weight = add_tensor(block, f"w{index}", (width, shape[1]))
            block.parameters[weight] = weight
            args, op = (Ref(source), Ref(weight)), "aten.linear.default"
        elif kind == "silu":
            args, op = (Ref(source),), "aten.silu.default"
        else:
            args, op = (Ref(source), Ref(draw(st.sampled_from(available)))), f"aten.{kind}.Tensor"
        needs = any(block.tensors[arg.name].requires_grad for arg in args)
        block.nodes.append(Node(name, op, args, {}, (add_tensor(block, name, shape, needs),)))
        available.append(name)
    return available[-1]


@st.composite
def graphs(draw, calls: tuple[int, int] = (0, 3)) -> Graph:
    """A chain with branches, perhaps with a block that is called several times, and a sum at the end.

    calls  at least and at most
    """
    width, rows = draw(st.sampled_from([(8, 4), (8, 256), (64, 2), (32, 32)]))
    root, blocks = Block("model", "Model"), {}
    root.inputs.append(add_tensor(root, "x", (rows, width), needs=False))
    calls = draw(st.integers(*calls))
    last = grow(draw, root, ["x"], draw(st.integers(1, 1 if calls else 4)), width)
    if calls:
        block = Block("layer", "Layer")
        block.inputs.append(add_tensor(block, "h", (rows, width), root.tensors[last].requires_grad))
        block.outputs.append(grow(draw, block, ["h"], draw(st.integers(1, 3)), width))
        blocks["layer"] = block
        needs = block.tensors[block.outputs[0]].requires_grad
        assume(needs or not root.tensors[last].requires_grad)
        for index in range(calls):
            name = add_tensor(root, f"layer{index}", (rows, width), needs)
            bound = {tensor: f"layers.{index}.{tensor}" for tensor in block.parameters}
            root.nodes.append(Call(name, "call", (Ref(last),), {}, (name,), block="layer", parameters=bound))
            last = name
    add_tensor(root, "total", (), root.tensors[last].requires_grad)
    root.nodes.append(Node("total", "aten.sum.default", (Ref(last),), {}, ("total",)))
    root.outputs.append("total")
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    for block in (root, *blocks.values()):
        block.tensors = {name: replace(meta, dtype=dtype) for name, meta in block.tensors.items()}
    graph = Graph(root, blocks, {}, {})
    graph.parameters = {path: block.tensors[tensor] for block, tensor, path in graph.parameter_uses()}
    return graph


def level_counts(problem: Problem) -> list[dict[str, dict[Level, int]]]:
    """Every way to give the calls of each block their levels."""
    per_block = []
    for block, levels in problem.levels.items():
        ways = combinations_with_replacement(levels, problem.calls[block])
        per_block.append([(block, dict(Counter(way))) for way in ways])
    return [dict(choice) for choice in product(*per_block)]


def level_ways(problem: Problem) -> int:
    """How many these are."""
    return prod(comb(problem.calls[b] + len(levels) - 1, len(levels) - 1) for b, levels in problem.levels.items())


def gatherable(problem: Problem, chosen: tuple[int, ...]) -> list[int]:
    """Flows that backward could gather again."""

    def layout(use, side):
        return getattr(problem.decisions[use[0]].options[chosen[use[0]]], side)[use[1]]

    return [
        index
        for index, flow in enumerate(problem.flows)
        if (flow.as_used or flow.as_resharded)
        and any(beside(flow, layout(flow.producer, "outputs"), layout(use, "inputs")) for use in flow.consumers)
    ]


def piece_counts(problem: Problem) -> list[dict[tuple[str, str], int]]:
    """Every way to compute runs in pieces."""
    names = [(one.block, one.name) for one in problem.divisible]
    ways = product(*((1, *counts_of(one)) for one in problem.divisible))
    return [{name: count for name, count in zip(names, counts) if count > 1} for counts in ways]


def everything(problem: Problem) -> Iterator[Solution]:
    levels, pieces = level_counts(problem), piece_counts(problem)
    for chosen in product(*(range(len(decision.options)) for decision in problem.decisions)):
        flows = gatherable(problem, chosen)
        for again in chain.from_iterable(combinations(flows, count) for count in range(len(flows) + 1)):
            for counts, divided in product(levels, pieces):
                away = range(on_host.PARTS + 1) if problem.host else (0,)
                for state, gradients in product(away, away):
                    yield Solution(list(chosen), counts, frozenset(again), state, divided, gradients)


def best(program: Program, memory: float) -> float | None:
    """The least time within memory, by trying everything."""
    evaluations = (price(program, solution) for solution in everything(program.problem))
    fitting = [
        e.total_seconds
        for e in evaluations
        if e is not None and e.total_memory <= memory and sum(e.host.values()) <= program.problem.host
    ]
    return min(fitting, default=None)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    graph=graphs(), sizes=st.sampled_from([(2,), (4,), (2, 2)]), fused=st.booleans(),
    fraction=st.sampled_from([0.35, 0.5, 0.65, 0.8, 0.92]), hardware=st.sampled_from(["h100", "cpu"]),
)  # fmt: skip
def test_the_program_finds_the_optimum(graph, sizes, fused, fraction, hardware):
    costs = CostModel(tiny.hardware(hardware), Mesh(sizes), fused)
    problem = build_problem(graph, costs, Recomputing(), 2, groups=False)
    ways = level_ways(problem) * len(piece_counts(problem))
    assume(prod(len(decision.options) for decision in problem.decisions) * ways <= MOST)
    program = Program(problem)
    free = price(program, solve(program, memory=1e18, gap=0.0).solution)
    assert free.total_seconds == pytest.approx(best(program, 1e18), rel=1e-5)
    assert 0.5 * free.total_seconds < least_seconds(program) <= free.total_seconds * (1 + 1e-6)
    memory = fraction * free.total_memory
    wanted = best(program, memory)
    solution = solve(program, memory, gap=0.0)
    if wanted is None:
        assert solution is None
        return
    assert solution is not None
    event(f"{len(solution.solution.pieces)} runs in pieces")
    found = price(program, solution.solution)
    assert found.total_memory <= memory * (1 + 1e-5)
    assert found.total_seconds == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=graphs((0, 1)), fused=st.booleans(), fraction=st.sampled_from([0.8, 2.0]), backwards=st.booleans())
def test_no_mesh_is_left_out_that_has_a_better_plan(graph, fused, fraction, backwards):
    hardware = replace(tiny.hardware("h100"), devices_per_node=2)
    meshes = [Mesh((4,)), Mesh((2, 2))]
    most = find_plan(graph, meshes[:1], hardware, fused=fused, sparing=False).memory_bytes

    def plan(*meshes: Mesh) -> Plan | None:
        try:
            return find_plan(graph, meshes, hardware, memory=fraction * most, fused=fused, sparing=False)
        except UserError:
            return None

    alone = [found.step_seconds for mesh in meshes if (found := plan(mesh)) is not None]
    together = plan(*(reversed(meshes) if backwards else meshes))
    if together is None:
        assert not alone
        return
    event(f"the best is on a mesh of {len(together.mesh.sizes)} axes")
    assert together.step_seconds <= min(alone) * (1 + WORTH + 1e-6)
    assert together.bound <= min(alone) * (1 + 1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    graph=graphs((1, 6)), devices=st.sampled_from([1, 1, 2]), fused=st.booleans(),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.6]), there=st.sampled_from([0.2, 0.5, 2.0]),
    rate=st.sampled_from([1e8, 1e10, 1e13]), parts=st.sampled_from([1, 1, 2]), micro_batches=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_program_finds_the_optimum_with_host_memory(
    graph, devices, fused, fraction, there, rate, parts, micro_batches
):
    hardware = tiny.hardware("h100")
    hardware = replace(hardware, host=replace(hardware.host, to_host=rate, to_device=0.8 * rate, both_ways=0.6 * rate))
    costs = CostModel(hardware, Mesh((devices,)), fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_host, "PARTS", parts)
        patch.setattr(stating, "ON_DEVICE", ON_DEVICE[::3])  # the most and the least, or there are too many ways
        plain = Program(build_problem(graph, costs, Recomputing(), micro_batches, groups=False))
        most = price(plain, solve(plain, memory=1e18, gap=0.0).solution).total_memory
        problem = build_problem(graph, costs, Recomputing(), micro_batches, host=there * most, groups=False)
        ways = level_ways(problem) * len(piece_counts(problem)) * (parts + 1) ** 2
        assume(prod(len(decision.options) for decision in problem.decisions) * ways <= MOST // 2)
        problem.staging = problem.slots = 0.01 * most  # as large a part as in a model
        program = Program(problem)
        least = price(program, least_memory(program)).total_memory
        memory = least * 1.001 + fraction * max(0.0, most - least)
        wanted = best(program, memory)
        solved = solve(program, memory, gap=0.0)
        assert solved is not None
        found = price(program, solved.solution)
        assert found.total_memory <= memory * (1 + 1e-5)
        assert sum(found.host.values()) <= problem.host * (1 + 1e-5)
        assert found.total_seconds == pytest.approx(wanted, rel=1e-5)
        event(f"on the host: {sorted({key.category for key in found.host})}")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    graph=graphs((2, 6)), devices=st.sampled_from([1, 1, 2]), fused=st.booleans(),
    random=st.randoms(use_true_random=False),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.6]), there=st.sampled_from([0.0, 0.0, 0.2]),
)  # fmt: skip
def test_the_program_finds_the_optimum_with_groups(graph, devices, fused, random, fraction, there):
    costs = CostModel(tiny.hardware("h100"), Mesh((devices,)), fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_host, "PARTS", 1)
        alone = ON_DEVICE[::3]  # the most and the least, or there are too many ways
        groups = [level for level in IN_GROUPS if level.inner in alone]
        patch.setattr(stating, "ON_DEVICE", alone)
        patch.setattr(stating, "IN_GROUPS", tuple(random.sample(groups, 2 if there else 3)))
        plain = Program(build_problem(graph, costs, Recomputing(), 2, groups=False))
        most = price(plain, solve(plain, memory=1e18, gap=0.0).solution).total_memory
        problem = build_problem(graph, costs, Recomputing(), 2, host=there * most)
        ways = level_ways(problem) * len(piece_counts(problem)) * (4 if there else 1)
        assume(prod(len(decision.options) for decision in problem.decisions) * ways <= MOST)
        program = Program(problem)
        least = price(program, least_memory(program)).total_memory
        memory = least * 1.001 + fraction * max(0.0, most - least)
        wanted = best(program, memory)
        solved = solve(program, memory, gap=0.0)
        found = price(program, solved.solution)
        assert found.total_memory <= memory * (1 + 1e-5)
        assert sum(found.host.values()) <= problem.host * (1 + 1e-5)
        assert found.total_seconds == pytest.approx(wanted, rel=1e-5)
        levels = solved.solution.levels.get("layer", {})
        event(f"groups of {sorted(level.size for level in levels)}")


def holds(program: Program, solution: Solution, memory: float) -> float | None:
    """Seconds of the program with everything decided as in a solution; None where it does not fit in memory."""
    problem, milp = program.problem, stated(program, memory)
    fixed = {xs[chosen]: 1.0 for xs, chosen in zip(program.x, solution.chosen)}
    for block, counts in program.n.items():
        fixed.update({n: float(solution.levels[block].get(level, 0)) for level, n in counts.items()})
    for (index, source, target), g in program.flows.gathered.items():
        flow = problem.flows[index]
        options = {d: problem.decisions[d].options[solution.chosen[d]] for d, _ in [flow.producer, *flow.consumers]}
        is_source = options[flow.producer[0]].outputs[flow.producer[1]] == source
        is_target = target in [options[d].inputs[i] for d, i in flow.consumers]
        fixed[g] = float(index in solution.gathered_again and is_source and is_target)
    for run, counts in program.pieces.counts.items():
        fixed.update({c: float(solution.pieces.get(run) == count) for count, c in counts.items()})
    for variable, value in fixed.items():
        milp.row([(variable, 1.0)], value, value)
    answer = milp.solve(0.0)
    if answer is None:
        return None
    values = answer.values
    return float(sum(values[variable] * each for variable, each in program.statement.terms(Account.TIME)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    graph=graphs(),
    sizes=st.sampled_from([(2,), (4,), (2, 2)]),
    fused=st.booleans(),
    random=st.randoms(use_true_random=False),
    hardware=st.sampled_from(["h100", "cpu"]),
)
def test_the_program_prices_any_solution_as_the_plain_sum_does(graph, sizes, fused, random, hardware):
    problem = build_problem(graph, CostModel(tiny.hardware(hardware), Mesh(sizes), fused), Recomputing(), 2)
    problem.exchange_buffers *= random.choice([1.0, 0.4])  # they hold all gradients at a time, or not
    program = Program(problem)
    levels, pieces = level_counts(problem), piece_counts(problem)
    for _ in range(6):
        chosen = tuple(random.randrange(len(decision.options)) for decision in problem.decisions)
        again = frozenset(index for index in gatherable(problem, chosen) if random.random() < 0.7)
        solution = Solution(list(chosen), random.choice(levels), again, pieces=random.choice(pieces))
        evaluation = price(program, solution)
        if evaluation is None:
            continue
        event(f"gathered {len(again)}")
        event(f"{len(solution.pieces)} runs in pieces")
        exact = evaluation.total_memory
        assert holds(program, solution, exact * (1 + 1e-5)) == pytest.approx(evaluation.total_seconds, rel=1e-5)
        assert holds(program, solution, exact * (1 - 1e-4)) is None


def called_in_turn(root: Block, block: Block, last: str, calls: int) -> Graph:
    """`root` with calls of `block` after its tensor `last`, each of what the one before it makes, and their sum."""
    shape = root.tensors[last].shape
    for index in range(calls):
        name = add_tensor(root, f"layer{index}", shape)
        bound = {tensor: f"layers.{index}.{tensor}" for tensor in block.parameters}
        root.nodes.append(Call(name, "call", (Ref(last),), {}, (name,), block="layer", parameters=bound))
        last = name
    root.nodes.append(Node("total", "aten.sum.default", (Ref(last),), {}, (add_tensor(root, "total", ()),)))
    root.outputs.append("total")
    graph = Graph(root, {"layer": block}, {}, {})
    graph.parameters = {path: block.tensors[tensor] for block, tensor, path in graph.parameter_uses()}
    return graph


def stack_of_linear_layers(calls: int = 2, products: int = 3) -> Graph:
    """A block with products and cheap operators between them, called several times."""
    root, block = Block("model", "Model"), Block("layer", "Layer")
    root.inputs.append(add_tensor(root, "x", (4096, 8), needs=False))
    weight = add_tensor(root, "first", (8, 8))
    root.parameters[weight] = weight
    first = add_tensor(root, "y", (4096, 8))
    root.nodes.append(Node("y", "aten.linear.default", (Ref("x"), Ref(weight)), {}, (first,)))
    last = add_tensor(block, "h", (4096, 8))
    block.inputs.append(last)
    for index in range(products):
        weight = add_tensor(block, f"w{index}", (8, 8))
        block.parameters[weight] = weight
        for op, more in (("silu", ()), ("linear", (Ref(weight),))):
            name = add_tensor(block, f"{op}{index}", (4096, 8))
            block.nodes.append(Node(name, f"aten.{op}.default", (Ref(last), *more), {}, (name,)))
            last = name
    block.outputs.append(last)
    return called_in_turn(root, block, "y", calls)


@register_op("r^ n, r^ n, r^ n -> r^ n", name="test_mixes_rows_of_three")
def mixes_rows_of_three(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query * key.flip(0) + value.flip(0)


def calls_of_a_mixer(calls: int = 2) -> Graph:
    """A block whose registered operator takes three products of one tensor, called several times after a product."""
    root, block, rows, width = Block("model", "Model"), Block("layer", "Layer"), 4096, 16

    def grow(block: Block, op: str, name: str, *sources: str, weight: bool = False) -> str:
        if weight:
            block.parameters[f"w_{name}"] = add_tensor(block, f"w_{name}", (width, width))
            sources = (*sources, f"w_{name}")
        block.nodes.append(Node(name, op, tuple(map(Ref, sources)), {}, (name,)))
        return add_tensor(block, name, (rows, width))

    root.inputs.append(add_tensor(root, "x", (rows, width), needs=False))
    last = grow(root, "aten.linear.default", "y", "x", weight=True)
    block.inputs.append(add_tensor(block, "h", (rows, width)))
    normed = grow(block, "aten.silu.default", "normed", "h")
    products = [grow(block, "aten.linear.default", name, normed, weight=True) for name in "qkv"]
    mixed = grow(block, "test_mixes_rows_of_three", "mixed", *products)
    block.outputs.append(grow(block, "aten.linear.default", "out", mixed, weight=True))
    return called_in_turn(root, block, last, calls)


def mixer_of_columns() -> Graph:
    """The same for two devices: its columns are divided, as it mixes rows, and the rows of all else."""
    graph = calls_of_a_mixer()
    for block, node in ((b, node) for b in graph.all_blocks() for node in b.nodes if not isinstance(node, Call)):
        _, first, *_ = (way.name for way in bind(node, block).splits(1))
        node.pin("n" if node.op == "test_mixes_rows_of_three" else first)
    return graph


@pytest.mark.parametrize(("make", "names", "devices"), [
    (stack_of_linear_layers, {"linear2"}, 1), (calls_of_a_mixer, {"mixed"}, 1), (mixer_of_columns, {"mixed"}, 2),
])  # fmt: skip
def test_what_fits_only_in_pieces_is_computed_so(make, names, devices, monkeypatch):
    monkeypatch.setattr(stating, "IN_GROUPS", ())  # or there are too many ways
    graph, costs = make(), CostModel(tiny.hardware("h100"), Mesh((devices,)), True)
    whole = {path: (SHARED,) for path in graph.parameters if devices > 1 and not path.startswith("layers.1")}
    program = Program(build_problem(graph, costs, Recomputing(), 1 if whole else 2, whole))
    evaluations = [(one, price(program, one)) for one in everything(program.problem)]
    whole = min(e.total_memory for one, e in evaluations if e is not None and not one.pieces)
    least = min(e.total_memory for _, e in evaluations if e is not None)
    assert least < 0.8 * whole
    for memory in (least, (least + whole) / 2, 0.999 * whole):
        solution = solve(program, memory * (1 + 1e-6), gap=0.0).solution
        found = price(program, solution)
        assert solution.pieces
        assert memory > least or names <= {name for _, name in solution.pieces}
        assert found.total_memory <= memory * (1 + 1e-5)
        fitting = [e.total_seconds for _, e in evaluations if e is not None and e.total_memory <= memory * (1 + 1e-6)]
        assert found.total_seconds == pytest.approx(min(fitting), rel=1e-5)


def calls_of_a_product(calls: int) -> Graph:
    """A block that is one product, in bf16, called after another product."""
    root, block = Block("model", "Model"), Block("layer", "Layer")
    root.inputs.append(add_tensor(root, "x", (8, 64), needs=False))
    for where, source, name in ((root, "x", "y"), (block, add_tensor(block, "h", (8, 64)), "z")):
        weight = add_tensor(where, "weight", (64, 64))
        where.parameters[weight] = weight
        args = (Ref(source), Ref(weight))
        where.nodes.append(Node(name, "aten.linear.default", args, {}, (add_tensor(where, name, (8, 64)),)))
    block.inputs, block.outputs, last = ["h"], ["z"], "y"
    for index in range(calls):
        name, bound = add_tensor(root, f"layer{index}", (8, 64)), {"weight": f"layers.{index}.weight"}
        root.nodes.append(Call(name, "call", (Ref(last),), {}, (name,), block="layer", parameters=bound))
        last = name
    root.nodes.append(Node("total", "aten.sum.default", (Ref(last),), {}, (add_tensor(root, "total", ()),)))
    root.outputs.append("total")
    for one in (root, block):
        one.tensors = {name: replace(meta, dtype=torch.bfloat16) for name, meta in one.tensors.items()}
    graph = Graph(root, {"layer": block}, {}, {})
    graph.parameters = {path: block.tensors[tensor] for block, tensor, path in graph.parameter_uses()}
    return graph


@pytest.mark.parametrize("host", [0.0, 0.2])
def test_weights_without_a_copy_are_the_optimum_where_memory_is_short(host, monkeypatch):
    """`host`: bytes of the host's memory, for the optimizer's state, as a part of what the fastest plan takes."""
    monkeypatch.setattr(on_host, "PARTS", 3)
    monkeypatch.setattr(stating, "SAME_ON_HOST", {})
    monkeypatch.setattr(deferred, "GRADIENT_BYTES", 0.01)  # what waits is as small a part as in a model

    def stated(host: float) -> Program:
        costs, layouts = CostModel(tiny.hardware("h100"), Mesh((2,))), {"weight": (SHARED,)}
        problem = build_problem(calls_of_a_product(12), costs, Recomputing(False), 1, layouts, host=host)
        problem.gathered_early *= 0.01  # likewise
        problem.staging *= 0.01
        problem.slots *= 0.01
        return Program(problem)

    plain = stated(0.0)
    most = price(plain, solve(plain, 1e18).solution).total_memory
    program = stated(host * most)
    evaluations = [(one, found) for one in everything(program.problem) if (found := price(program, one)) is not None]
    within = [found for _, found in evaluations if sum(found.host.values()) <= program.problem.host]
    least = min(found.total_memory for found in within)
    for fraction in (0.0, 0.02, 0.1, 0.2, 0.3, 1.0):
        memory = (least + fraction * (most - least)) * (1 + 1e-6)
        solution = solve(program, memory, gap=0.0).solution
        found = price(program, solution)
        assert found.total_memory <= memory * (1 + 1e-5)
        assert found.total_seconds == pytest.approx(
            min(one.total_seconds for one in within if one.total_memory <= memory), rel=1e-5
        )
        if fraction in (0.0, 1.0):
            chosen = [decision.options[o] for decision, o in zip(program.problem.decisions, solution.chosen)]
            assert any(option.master_only for option in chosen) == (fraction == 0.0)
            assert (solution.state_on_host > 0) == (fraction == 0.0 and host > 0)
    for one, found in evaluations[:: len(evaluations) // 25] if not host else ():
        memory = found.total_memory
        assert holds(program, one, memory * (1 + 1e-5)) == pytest.approx(found.total_seconds, rel=1e-5)
        assert holds(program, one, memory * (1 - 1e-4)) is None


@pytest.mark.parametrize("calls", [9, 14])
def test_what_fits_only_in_groups_is_computed_so(monkeypatch, calls):
    """Nine layers in a group of four, two of two, and one by itself, hold four inputs at a time: the others' are free
    when the four run backward, which hold three inside. Groups of one size hold five."""
    monkeypatch.setattr(stating, "ON_DEVICE", ON_DEVICE[::3])
    monkeypatch.setattr(stating, "IN_GROUPS", tuple(level for level in IN_GROUPS if level.inner is ON_DEVICE[3]))
    costs = CostModel(tiny.hardware("h100"), Mesh((1,)), True)
    problem = build_problem(stack_of_linear_layers(calls, products=1), costs, Recomputing(), 2, sparing=False)
    program = Program(problem)
    evaluations = [(one, e) for one in everything(problem) if (e := price(program, one)) is not None]
    single = [e.total_memory for one, e in evaluations if max(level.size for level in one.levels["layer"]) == 1]
    least, whole, most = min(e.total_memory for _, e in evaluations), min(single), max(single)
    assert least < whole - costs.local_bytes(problem.flows[0].meta, problem.decisions[0].options[0].outputs[0])
    sizes = set()
    for memory in (least, *np.linspace(least, most, 20)):
        solution = solve(program, memory * (1 + 1e-6), gap=0.0).solution
        found = price(program, solution)
        sizes |= {level.size for level in solution.levels["layer"]}
        assert found.total_memory <= memory * (1 + 1e-5)
        fitting = [e.total_seconds for _, e in evaluations if e.total_memory <= memory * (1 + 1e-6)]
        assert found.total_seconds == pytest.approx(min(fitting), rel=1e-5)
    assert sizes == {1, 2, 4}
