"""How generated code brings a tensor from one layout to another, and the comments on where it lies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.codegen.body import Body
from nnscaler.graph import Block, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Placements, Shard

ONE, TWO = Mesh((2,)), Mesh((2, 3))
PATH = "layer.x"


def brought(
    source: Placements, target: Placements, mesh: Mesh = ONE, trained: bool = True, parameter: bool = False,
    **plan: object,
) -> list[str]:  # fmt: skip
    """The lines that bring x [12, 6, 8] in bf16, and the name of the result."""
    block = Block("layer", "Layer", {"x": TensorMeta((12, 6, 8), torch.bfloat16, trained)}, inputs=["x"])
    if parameter:
        block.inputs, block.parameters = [], {"x": "x"}
    graph = SimpleNamespace(parameter_uses=lambda: [(block, "x", PATH)])
    ways = dict.fromkeys(("gathered_again", "gathered_in_fp8", "master_only"), ())
    given = {**ways, "mesh": mesh, "graph": graph, **plan}
    body = Body(SimpleNamespace(**given), block)
    body._define("x", source, "x")
    lines: list[str] = []
    return [*lines, name] if (name := body._in_layout("x", target, lines)) == "x" else lines


# From, to -> the call with a gradient, and without one where that differs; None: nothing has to be done.
CALLS = [
    (PARTIAL, REPLICATE, 'all_reduce(x, axes.devices, backward="identity")', ...),
    (PARTIAL, SHARED, 'all_reduce(x, axes.devices, backward="all_reduce")',
     'all_reduce(x, axes.devices, backward="identity")'),
    (PARTIAL, Shard(1), "reduce_scatter(x, axes.devices, dim=1)", ...),
    (REPLICATE, SHARED, "share(x, axes.devices)", None),
    (REPLICATE, Shard(1), 'slice_(x, axes.devices, dim=1, backward="all_gather")', ...),
    (SHARED, REPLICATE, "divide(x, axes.devices)", None),
    (SHARED, Shard(2), 'slice_(x, axes.devices, dim=2, backward="pad")',
     'slice_(x, axes.devices, dim=2, backward="all_gather")'),
    (Shard(0), REPLICATE, 'all_gather(x, axes.devices, dim=0, backward="slice")', ...),
    (Shard(1), SHARED, 'all_gather(x, axes.devices, dim=1, backward="reduce_scatter")',
     'all_gather(x, axes.devices, dim=1, backward="slice")'),
    (Shard(0), Shard(2), "all_to_all(x, axes.devices, source=0, target=2)", ...),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "call", "without"), CALLS, ids=str)
def test_the_call_for_each_change(source, target, call, without):
    for trained, text in ((True, call), (False, call if without is ... else without)):
        (line,) = brought((source,), (target,), trained=trained)
        assert line.partition(" = ")[2] == f"collectives.{text}" if text else line == "x", trained
    assert brought((source,), (target,), Mesh((1,))) == ["x"], "of one device"


def test_on_two_axes_the_inner_one_is_gathered_first():
    whole = (REPLICATE, REPLICATE)
    gathers = [f'collectives.all_gather(x{{}}, axes.{axis}, dim=0, backward="slice")' for axis in ("inner", "outer")]
    lines = brought((Shard(0), Shard(0)), whole, TWO)
    assert lines == [
        "x_whole_whole = " + gathers[0].format(""), "x_whole_whole = " + gathers[1].format("_whole_whole")
    ]  # fmt: skip
    (line,) = brought((Shard(1), PARTIAL), (Shard(1), Shard(2)), TWO)
    assert line == "x_s1_s2 = collectives.reduce_scatter(x, axes.inner, dim=2)"


@pytest.mark.parametrize(("plan", "how"), [
    ({}, ""),
    ({"gathered_again": {("layer", "x")}}, ", again=True"),
    ({"master_only": {PATH}}, ", dtype=torch.bfloat16"),
    ({"master_only": {PATH}, "gathered_again": {("layer", "x")}}, ", dtype=torch.bfloat16, again=True"),
    ({"gathered_again": {("other", "x"), ("layer", "y")}, "master_only": {"other.x"}}, ""),
    ({"gathered_in_fp8": {("other", "x", (SHARED,)), ("layer", "y", (SHARED,)), ("layer", "x", (Shard(0),))}}, ""),
])  # fmt: skip
def test_a_weight_is_gathered_as_the_plan_says(plan, how):
    assert brought((Shard(1),), (SHARED,), parameter=True, **plan) == [
        f"x_whole = axes.gathers.weight(x, (axes.devices, 1){how})"
    ]
    shards = "(axes.inner, 0), (axes.outer, 0)"
    assert brought((Shard(0), Shard(0)), (SHARED, SHARED), TWO, parameter=True, **plan) == [
        f"x_whole_whole = axes.gathers.weight(x, {shards}{how})"
    ]
    frozen = brought((Shard(1),), (REPLICATE,), trained=False, parameter=True, **plan)
    assert frozen == [f"x_whole = axes.gathers.weight(x, (axes.devices, 1){how})"]


def test_a_weight_that_is_gathered_in_fp8_has_parts():
    line = brought((Shard(1),), (SHARED,), parameter=True, gathered_in_fp8={("layer", "x", (SHARED,))})
    assert line == ["x_whole, x_whole_scale, x_whole_fp8 = axes.gathers.weight_in_fp8(x, (axes.devices, 1))"]


def test_a_weight_that_has_no_copy_beside_its_master_must_be_gathered():
    for source, target in (((Shard(1),), (Shard(0),)), ((REPLICATE,), (Shard(0),))):
        with pytest.raises(AssertionError, match="x is stored in fp32, and not gathered"):
            brought(source, target, parameter=True, master_only={PATH})


@pytest.mark.parametrize(("mesh", "layout", "text"), [
    (ONE, (REPLICATE,), "bf16[12, 6, 8]"),
    (ONE, (Shard(1),), "bf16[12, 3, 8] of [12, 6, 8], S(1)"),
    (TWO, (Shard(0), Shard(0)), "bf16[2, 6, 8] of [12, 6, 8], S(0),S(0)"),
    (TWO, (REPLICATE, Shard(1)), "bf16[12, 2, 8] of [12, 6, 8], R,S(1)"),
])  # fmt: skip
def test_comments_say_what_a_device_has(mesh, layout, text):
    meta = TensorMeta((12, 6, 8), torch.bfloat16)
    body = Body(SimpleNamespace(mesh=mesh), Block("layer", "Layer", {"x": meta}))
    assert body._describe(meta, layout) == text


@pytest.mark.parametrize(("split", "parts"), [("b,-", {"b": 2, "-": 3}), ("k,k", {"k": 6}), ("-,n", {"-": 2, "n": 3})])
def test_over_how_many_devices_a_name_is_split(split, parts):
    assert Body(SimpleNamespace(mesh=TWO), Block("layer", "Layer"))._parts(split) == parts


def test_a_piece_has_a_part_of_what_a_device_has():
    """Of two stretches, one within the other, that divide a tensor along different dimensions."""
    plan = SimpleNamespace(mesh=ONE, pieces={("layer", "outer"): 3, ("layer", "inner"): 2, ("layer", "other"): 5})
    body = Body(plan, Block("layer", "Layer", {"x": TensorMeta((12, 6, 8), torch.bfloat16)}))
    assert body._local_meta("x", (Shard(0),)).shape == (6, 6, 8)
    body.stretches = [
        SimpleNamespace(name="outer", dims={"x": 0}), SimpleNamespace(name="inner", dims={"x": 2, "y": 1}),
        SimpleNamespace(name="other", dims={"y": 0}),
    ]  # fmt: skip
    assert body._local_meta("x", (Shard(0),)).shape == (2, 6, 4)
