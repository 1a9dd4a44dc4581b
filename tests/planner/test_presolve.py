"""A program that the solver's presolve takes for infeasible, although many solutions fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnscaler.graph import Block, Call, Graph, Node, Ref, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.planner import on_host
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program
from nnscaler.planner.solve import least_memory, solve
from nnscaler.recompute import ON_DEVICE
from tests import tiny


def matrix(needs: bool = True) -> TensorMeta:
    return TensorMeta((32, 32), torch.float32, needs)


def linear_layers() -> Graph:
    """A linear layer, and two more as calls of a block; their results are added up."""
    root, block = Block("model", "Model"), Block("layer", "Layer")
    root.tensors = {"x": matrix(False), **{name: matrix() for name in ("w", "first", "second", "third")}}
    root.tensors["total"] = TensorMeta((), torch.float32, True)
    root.inputs, root.parameters, root.outputs = ["x"], {"w": "w"}, ["total"]
    root.nodes = [
        Node("first", "aten.linear.default", (Ref("x"), Ref("w")), {}, ("first",)),
        Call("second", "call", (Ref("first"),), {}, ("second",), block="layer", parameters={"w": "layers.0.w"}),
        Call("third", "call", (Ref("second"),), {}, ("third",), block="layer", parameters={"w": "layers.1.w"}),
        Node("total", "aten.sum.default", (Ref("third"),), {}, ("total",)),
    ]
    block.tensors = {name: matrix() for name in ("h", "w", "out")}
    block.inputs, block.parameters, block.outputs = ["h"], {"w": "w"}, ["out"]
    block.nodes = [Node("out", "aten.linear.default", (Ref("h"), Ref("w")), {}, ("out",))]
    graph = Graph(root, {"layer": block}, {}, {})
    graph.parameters = {name: each.tensors[tensor] for each, tensor, name in graph.parameter_uses()}
    return graph


def test_what_presolve_calls_infeasible_is_solved_without_it(monkeypatch):
    monkeypatch.setattr(on_host, "PARTS", 2)
    monkeypatch.setattr(stating, "ON_DEVICE", ON_DEVICE[::3])
    hardware = tiny.hardware("h100")
    assert hardware.host is not None
    slow = replace(hardware.host, to_host=1e8, to_device=0.8e8, both_ways=0.6e8)
    costs = CostModel(replace(hardware, host=slow), Mesh((1,)), False)
    problem = build_problem(linear_layers(), costs, Recomputing(), 1, host=36864.0, groups=False)
    problem.staging = problem.slots = 737.28
    program = Program(problem)
    least = least_memory(program)
    assert least is not None
    assert price(program, least).total_memory == pytest.approx(38338.56)
    for enough, fits in ((39000.0, True), (38000.0, False)):
        nearest = least_memory(program, enough=enough)
        assert (price(program, nearest).total_memory <= enough * (1 + 1e-5)) == fits
    found = [solve(program, memory, gap=0.0) for memory in (38000.0, 41915.84256, 41960.0)]
    assert found[0] is None, "less than the least"
    for one in found[1:]:
        assert one is not None
        assert price(program, one.solution).total_seconds == pytest.approx(8.22854e-4, rel=1e-5)
    assert solve(program, 41960.0, gap=0.0, below=8.23e-4) is not None, "where few are expected, likewise"
    assert solve(program, 41960.0, gap=0.0, below=8.22e-4) is None
