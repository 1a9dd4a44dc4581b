"""How tensors and sizes are divided over a mesh."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.annotation import Split
from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.operators import bind
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.planner.options import assignments, divides, layouts_of, local_sizes
from nnscaler.units import Unit


def test_a_tensor_is_whole_or_divided_where_it_divides():
    assert layouts_of((4, 6), Mesh((2,)), SHARED) == [(SHARED,), (Shard(0),), (Shard(1),)]
    assert layouts_of((4, 6), Mesh((4,)), REPLICATE) == [(REPLICATE,), (Shard(0),)]
    assert layouts_of((4, 6), Mesh((1, 3)), SHARED) == [(SHARED, SHARED), (SHARED, Shard(1))]
    assert layouts_of((4,), Mesh((2, 4)), SHARED) == [(SHARED, SHARED), (SHARED, Shard(0)), (Shard(0), SHARED)]
    assert layouts_of((), Mesh((2,)), SHARED) == [(SHARED,)]


@pytest.mark.parametrize(("shape", "divisible"), [((8,), True), ((4,), False), ((2,), False), ((12,), False)])
def test_a_dimension_of_two_axes_is_divided_by_both(shape, divisible):
    assert divides(shape, (Shard(0), Shard(0)), Mesh((2, 4))) == divisible


def test_sizes_on_a_device():
    bound = SimpleNamespace(sizes={"b": 8, "l": 6})
    rows, both, none = (Split(name, (), ()) for name in ("b", "l", None))
    assert local_sizes(bound, [rows, both], Mesh((2, 3))) == {"b": 4, "l": 2}
    assert local_sizes(bound, [rows, rows], Mesh((2, 4))) == {"b": 1, "l": 6}
    assert local_sizes(bound, [rows, rows], Mesh((4, 4))) is None
    assert local_sizes(bound, [none, both], Mesh((5, 4))) is None
    assert bound.sizes == {"b": 8, "l": 6}


def test_many_that_are_joined_are_split_as_one():
    """Each of 40 operators may be split in several ways; as they are joined, all in the same one."""
    meta, names = TensorMeta((4, 6), torch.float32, True), [f"t{i}" for i in range(40)]
    nodes = [Node(f"made_{name}", "aten.exp.default", (Ref(f"in_{name}"),), {}, (f"made_{name}",)) for name in names]
    parts = [Ref(node.name) for node in nodes]
    joined = Node("joined", "aten.stack.default", (parts, 1), {}, ("joined",))
    tensors = {name: meta for node in nodes for name in (node.name, *node.inputs)}
    block = Block("block", "Block", tensors=tensors | {"joined": TensorMeta((4, 40, 6), torch.float32, True)})
    unit = Unit("cheap", [*nodes, joined])
    found = list(assignments(unit, block, [bind(node, block) for node in unit.nodes]))
    assert [{split.outputs for split in one[:-1]} for one in found] == [
        {(place,)} for place in (REPLICATE, Shard(0), Shard(1))
    ]
    assert [one[-1].outputs for one in found] == [(REPLICATE,), (Shard(0),), (Shard(2),)]
