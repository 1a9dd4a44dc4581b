"""The mixed-integer program's optimum is that of trying everything, on random small graphs."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nnscaler.graph import Block, Graph, Node, Ref, TensorMeta
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.planner.costs import CostModel
from nnscaler.planner.evaluate import evaluate
from nnscaler.planner.problem import build_problem
from nnscaler.planner.program import solve

MOST = 6000  # combinations that are tried


@st.composite
def graphs(draw) -> Graph:
    """A chain with branches: products with weights, sums of two tensors, pointwise functions, and a sum at the end."""
    block = Block("model", "Model")
    width = draw(st.sampled_from([8, 16]))
    rows = draw(st.sampled_from([4, 32]))

    def tensor(name, shape, needs=True):
        block.tensors[name] = TensorMeta(shape, torch.float32, needs)
        return name

    block.inputs.append(tensor("x", (rows, width), needs=False))
    available = ["x"]
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["linear", "add", "silu", "mul"]))
        source = draw(st.sampled_from(available))
        name = f"t{index}"
        shape = block.tensors[source].shape
        if kind == "linear":
            weight = tensor(f"w{index}", (draw(st.sampled_from([width, 4 * width])), shape[1]))
            block.parameters[weight] = weight
            args, op, shape = (Ref(source), Ref(weight)), "aten.linear.default", (rows, block.tensors[weight].shape[0])
        elif kind == "silu":
            args, op = (Ref(source),), "aten.silu.default"
        else:
            same = [other for other in available if block.tensors[other].shape == shape]
            args, op = (Ref(source), Ref(draw(st.sampled_from(same)))), f"aten.{kind}.Tensor"
        needs = any(block.tensors[arg.name].requires_grad for arg in args)
        block.nodes.append(Node(name, op, args, {}, (tensor(name, shape, needs),)))
        available.append(name)
    tensor("total", (), block.tensors[available[-1]].requires_grad)
    block.nodes.append(Node("total", "aten.sum.default", (Ref(available[-1]),), {}, ("total",)))
    block.outputs.append("total")
    return Graph(block, {}, {name: block.tensors[name] for name in block.parameters}, {})


def best(problem, memory):
    """The least time within memory, by trying every combination."""
    found = None
    for chosen in product(*(range(len(decision.options)) for decision in problem.decisions)):
        evaluation = evaluate(problem, list(chosen))
        if evaluation is None or evaluation.total_memory > memory:
            continue
        if found is None or evaluation.total_seconds < found:
            found = evaluation.total_seconds
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    graph=graphs(), sizes=st.sampled_from([(2,), (4,), (2, 2)]), recompute=st.booleans(),
    fraction=st.sampled_from([0.5, 0.7, 0.9, 2.0]), hardware=st.sampled_from(["h100", "cpu"]),
)  # fmt: skip
def test_the_program_finds_the_optimum(graph, sizes, recompute, fraction, hardware):
    again = {"model": {node.name for node in graph.root.nodes[:2]}} if recompute else {}
    problem = build_problem(graph, CostModel(load_hardware(hardware), Mesh(sizes)), again, 2)
    assume(prod(len(decision.options) for decision in problem.decisions) <= MOST)
    unlimited = solve(problem, memory=1e18)
    memory = fraction * evaluate(problem, unlimited.chosen).total_memory
    wanted = best(problem, memory)
    solution = solve(problem, memory, gap=0.0)
    if wanted is None:
        assert solution is None
        return
    assert solution is not None
    found = evaluate(problem, solution.chosen)
    assert found.total_memory <= memory * (1 + 1e-5)
    assert found.total_seconds == pytest.approx(wanted, rel=1e-5)
