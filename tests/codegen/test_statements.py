"""Single statements of generated code: calls of registered operators, tuples, what is rounded, what is let go."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nnscaler.codegen.body import Body, _tag
from nnscaler.codegen.divided import Divided, divided
from nnscaler.codegen.segments import Region, Segment
from nnscaler.codegen.stage import _header
from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.operators import operator_of
from nnscaler.pieces import Stretch
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.plan import NodePlan
from nnscaler.units import Unit

WHOLE = (REPLICATE,)
F32 = TensorMeta((4, 8), torch.float32, True)


def body_of(*names: str, mesh: Mesh | None = None, nodes: tuple[Node, ...] = (), **way: object) -> Body:
    """Of a block of matrices with these names, whose nodes lie whole on all devices."""
    mesh = mesh or Mesh((2,))
    layout = WHOLE * len(mesh.sizes)
    plans = {
        ("layer", node.name): NodePlan("-", (layout,) * len(node.inputs), (layout,) * len(node.outputs), **way)
        for node in nodes
    }
    block = Block("layer", "Layer", dict.fromkeys(names, F32), list(names), nodes=list(nodes))
    body = Body(SimpleNamespace(mesh=mesh, splits=False, nodes=plans), block, taken=set(names))
    for name in names:
        body._define(name, layout, name)
    return body


OWN = Node("a", "attention", tuple(map(Ref, "qkv")), {"scale": 2.0}, ("a",))


@pytest.mark.parametrize(("sizes", "split", "call"), [
    ((2,), "b", "attention("), ((2,), "l", "attention_along_l(axes.devices, "), ((1,), "l", "attention("),
    ((2, 3), "l,h", "attention_along_l(axes.outer, "), ((2, 3), "h,l", "attention_along_l(axes.inner, "),
    ((2, 3), "l,l", "attention_along_l(axes.devices, "), ((1, 3), "l,l", "attention_along_l(axes.inner, "),
    ((2, 3), "h,b", "attention("),
])  # fmt: skip
def test_an_operator_that_communicates_is_given_the_devices_along_which_it_is_split(sizes, split, call):
    """Not those of an axis of one device."""
    for copies in (1, 3):
        body = body_of(mesh=Mesh(sizes, copies))
        assert body._registered(operator_of(OWN), split, OWN, list(map(Ref, "xyz"))) == f"ops.{call}x, y, z, scale=2.0)"


def test_a_way_of_two_names_and_copies_have_functions_of_their_own():
    operator = replace(operator_of(OWN), name="own", along={"t n": "somewhere.own_along_t_n"}, among_copies="x.y")
    refs = list(map(Ref, "xyz"))
    written = [
        body_of(mesh=Mesh((2,), copies))._registered(operator, split, OWN, refs)
        for copies, split in ((1, "t n"), (1, "t"), (3, "t"))
    ]
    arguments = "x, y, z, scale=2.0)"
    assert written == [
        f"ops.own_along_t_n(axes.devices, {arguments}", f"ops.own({arguments}",
        f"ops.own_among_copies(axes.copies, {arguments}",
    ]  # fmt: skip


def test_results_of_a_tuple_are_taken_out_of_it():
    for outputs, is_tuple, target in ((("y",), True, "y, = "), (("y",), False, "y = "), (("y", "z"), True, "y, z = ")):
        node = Node("y", "aten.sin.default", (Ref("x"),), {}, outputs, returns_tuple=is_tuple)
        body = body_of("x", "y", "z", nodes=(node,))
        assert body._node(node, []) == [f"{target}x.sin()"]


def test_what_computes_without_gradients_does_so_where_there_would_be_one():
    node = Node("y", "aten.sin.default", (Ref("x"),), {}, ("y",), no_grad=True)
    body = body_of("x", "y", nodes=(node,))
    assert body._node(node, []) == ["with torch.no_grad():", "    y = x.sin()"]
    body.block.tensors["x"] = replace(F32, requires_grad=False)
    assert body._node(node, []) == ["y = x.sin()"]


def test_a_tensor_is_rounded_once_for_all_products_in_fp8():
    nodes = tuple(Node(name, "aten.linear.default", (Ref("x"), Ref("w")), {}, (name,)) for name in ("y", "z"))
    body, before = body_of("x", "w", "y", "z", "x_fp8", nodes=nodes, in_fp8=True), []
    lines = [line for node in nodes for line in body._node(node, before)]
    assert before == ["x_fp8_2 = fp8.rounded(x)"], "the name is taken"
    assert lines == [f"{name} = fp8.linear(x_fp8_2, w)" for name in ("y", "z")]


def test_names_get_the_first_free_number():
    body = body_of("x", "x_2")
    assert [body._fresh(name) for name in ("x", "y", "x", "y")] == ["x_3", "y", "x_4", "y_2"]


def test_layouts_of_a_tensor_are_told_apart():
    layouts = [(Shard(1),), WHOLE, (SHARED,), (Shard(0), REPLICATE), (Shard(12), Shard(0))]
    assert list(map(_tag, layouts)) == ["s1", "whole", "whole", "s0_whole", "s12_s0"]


@pytest.mark.parametrize(("blocks", "split", "whole"), [(None, 1, 1), (2, 1, (1, 2)), (4, (1, 2), (1, 4))])
def test_a_piece_has_a_part_of_each_block_that_a_device_has(blocks, split, whole):
    """Of eight columns in two pieces, whose halves lie on two devices, or all on both."""
    block = Block("layer", "Layer", {"x": F32, "y": F32})
    plan = SimpleNamespace(mesh=Mesh((2,)), pieces={("layer", "y"): 2 if blocks else 4})
    given = Divided(plan, block, Stretch("y", (0,), ("x",), ("y",), {"y": 1}, True), blocks)
    assert (given.along("y", (Shard(1),)), given.along("y", WHOLE)) == (split, whole)
    assert given.along("x", WHOLE) is None


@pytest.mark.parametrize(("blocks", "layout", "count", "fits"), [
    (None, (Shard(1),), 4, True), (None, (Shard(1),), 3, False), (None, (Shard(1),), 8, False), (None, WHOLE, 8, True),
    (4, (Shard(1),), 2, True), (4, (Shard(1),), 4, False), (3, (Shard(1),), 1, False), (1, WHOLE, 8, True),
])  # fmt: skip
def test_eight_columns_are_divided_only_evenly(blocks, layout, count, fits):
    """Each device's part, or each of so many blocks, of which every device has some whole."""
    block = Block("layer", "Layer", {"y": F32})
    plan = SimpleNamespace(mesh=Mesh((2,)), pieces={("layer", "y"): count})
    given = Divided(plan, block, Stretch("y", (0,), (), ("y",), {"y": 1}, True), blocks)
    said = f"y cannot be divided into the {count} pieces of y"
    with nullcontext() if fits else pytest.raises(AssertionError, match=said):
        given.along("y", layout)


@pytest.mark.parametrize("name", ["x", "y"])
def test_all_that_a_stretch_reads_and_makes_is_judged(name):
    node = Node("y", "aten.sin.default", (Ref("x"),), {}, ("y",))
    for count in (2, 3):
        body = body_of("x", "y", nodes=(node,))
        body.plan.pieces = {("layer", "y"): count}
        stretch = Stretch("y", (0,), ("x",), ("y",), {name: 1}, True)
        unit = Unit("cheap", [node], inputs=["x"], outputs=["y"])
        said = pytest.raises(AssertionError, match=f"{name} cannot be divided into the 3 pieces of y")
        with nullcontext() if count == 2 else said:
            assert divided(body.plan, body.block, stretch, [unit]).blocks is None


def test_what_no_later_segment_uses_is_let_go():
    """Not inputs, which the caller has; nor results of the block; nor anything in the last segment."""
    body = body_of("x", "y", "z", "t", "w")
    body.block.inputs, body.block.outputs, body.block.parameters = ["x"], ["z"], {"w": "w"}
    body.names["x", (Shard(0),)] = "x_s0"
    body.names["w", WHOLE], body.names["w", (Shard(0),)] = "w_whole", 'w["w"]'
    user = Unit("cheap", [Node("u", "aten.sin.default", (Ref("t"),), {}, ("u",))], inputs=["t"])
    names = dict(body.names)
    for following in (Segment([Region([user])]), Segment(others=[user])):
        body.names = dict(names)
        assert body._release([Segment(), following]) == ["del y, w_whole, x_s0"]
        assert list(body.names.values()) == ["z", "t", 'w["w"]']
    body.names = dict(names)
    assert body._release([]) == []


@pytest.mark.parametrize(("change", "said", "others"), [
    ({}, "axes.devices the group of all devices that one copy", ("axes.inner", "in_pieces", "import fp8", "imported")),
    ({"mesh": Mesh((2, 3))}, "axes.inner the group of neighbouring devices, axes.outer that of", ("in_pieces",)),
    ({"pieces": {("layer", "y"): 2}}, "import imported, in_pieces, operators", ("axes.inner",)),
    ({"pieces": {("layer", "y"): 2}}, "in_pieces(function, n, divided, joined, settle, keep, ...) runs a", ()),
    ({"nodes": {("layer", "y"): NodePlan("-", (), (), in_fp8=True)}}, "from nnscaler.kernels import fp8\n", ()),
    ({"splits": True}, "from nnscaler.kernels import later\n", ("fp8",)),
    ({"splits": True}, "later.linear: as F.linear, but", ()),
    ({}, "", ("later",)),
])  # fmt: skip
def test_the_head_of_a_module_says_and_imports_what_it_needs(change, said, others):
    block = Block("layer", "Layer", nodes=[OWN, Node("y", "aten.sin.default", (Ref("x"),), {}, ("y",))])
    given = {
        "mesh": Mesh((2,)),
        "splits": False,
        "pieces": {},
        "nodes": {},
        "graph": SimpleNamespace(all_blocks=lambda: [block]),
    }
    text = _header(
        SimpleNamespace(**{**given, **change}), [("what", "a text")], ["imported"] if "pieces" in change else []
    )
    assert said in text
    assert "\nwhat       a text\n" in text
    assert text.endswith("\nops = operators('attention')")
    for other in others:
        assert other not in text or other in str(change), other
