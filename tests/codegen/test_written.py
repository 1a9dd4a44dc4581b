"""Whole functions of small blocks, as they are to be written: what is a region, what it is given, what the head has."""

from __future__ import annotations

from collections.abc import Collection
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch

from nnscaler.codegen.body import Body
from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Placements, Shard
from nnscaler.plan import NodePlan

WHOLE = (REPLICATE,)


def node(name: str, op: str, *args: object, **given: object) -> Node:
    """Where an argument is a text, it is a tensor's name."""
    refs = tuple(Ref(arg) if isinstance(arg, str) else arg for arg in args)
    return Node(name, op if "." in op or op == "attention" else f"aten.{op}.default", refs, {}, (name,), **given)


SIN = node("y", "sin", "x", module="mlp", source="model.py:3")
MUL = node("z", "aten.mul.Tensor", "y", "x", module="mlp", source="model.py:4")
ADD = node("z", "aten.add.Tensor", "y", "c", module="norm", source="model.py:9")
FULL = Node("c", "aten.full.default", ([4, 8], 1.0), {"device": torch.device("cpu")}, ("c",))
LINEAR = node("y", "linear", "x", "w")


def written(
    *nodes: Node, inputs: str | list[str] = "x", outputs: str = "z",
    again: tuple[str, ...] = (), fp8: tuple[str, ...] = (),
    parameters: dict[str, Placements] | None = None, layouts: dict[tuple[str, str], Placements] | None = None,
    results: Placements = WHOLE, splits: bool = False, narrow: Collection[tuple[str, str, Placements]] = (),
) -> str:  # fmt: skip
    """The functions of a block, one after the other.

    parameters  name -> where it lies; other tensors are inputs, or made
    layouts     (a node, one of its tensors) -> where that lies for it, if not whole
    results     where the block's results lie
    splits      whether backward runs in two parts
    narrow      what is gathered in fp8
    """
    stored, layouts = parameters or {}, layouts or {}
    names = {*inputs, *stored, *(output for one in nodes for output in one.outputs)}
    tensors = dict.fromkeys(names, TensorMeta((4, 8), torch.float32, True))
    block = Block(
        "layer", "Layer", tensors, inputs=list(inputs), outputs=list(outputs), nodes=list(nodes),
        parameters={name: name for name in stored},
    )  # fmt: skip
    other = Block("other", "Layer", tensors, parameters={"w": "w"})

    def lie(one: Node, tensors: list[str] | tuple[str, ...]) -> tuple[Placements, ...]:
        return tuple(layouts.get((one.name, tensor), WHOLE) for tensor in tensors)

    ways = {
        ("layer", one.name): NodePlan("-", lie(one, one.inputs), lie(one, one.outputs), in_fp8=one.name in fp8)
        for one in nodes
    }
    uses = [(other, "w", "other.w"), *((block, name, f"layers.0.{name}") for name in stored)]
    plan = SimpleNamespace(
        mesh=Mesh((2,)), splits=splits, nodes=ways, inputs={"layer": [WHOLE] * len(inputs)},
        outputs={"layer": [results] * len(outputs)}, pieces={},
        recomputed={"layer": set(again)}, graph=SimpleNamespace(parameter_uses=lambda: uses),
        parameters={"other.w": (Shard(0),)} | {f"layers.0.{name}": layout for name, layout in stored.items()},
        master_only=set(), gathered_again=set(), gathered_in_fp8=narrow,
    )  # fmt: skip
    return "\n".join("\n".join(lines) for lines in Body(plan, block).write()) + "\n"


CASES = {
    "one operator stands in its place": (
        lambda: written(SIN, outputs="y"),
        """\
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            y = x.sin()
            return y
        """,
    ),
    "also with views of it": (
        lambda: written(SIN, node("v", "view", "y", [8, 4]), outputs="v"),
        """\
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            y = x.sin()
            v = y.reshape(4, 8)
            return v
        """,
    ),
    "but not where the user wants it computed again": (
        lambda: written(SIN, outputs="y", again=("y",)),
        """\
        @region
        def layer_again_0(x):
            # mlp  model.py:3
            y = x.sin()
            return y
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            y = layer_again_0("recomputes all but attention", x)
            return y
        """,
    ),
    "or where it is rounded before": (
        lambda: written(LINEAR, inputs="xw", outputs="y", fp8=("y",)),
        """\
        @region
        def layer_region_0(x, w):
            # Layer
            x_fp8 = fp8.rounded(x)
            y = fp8.linear(x_fp8, w)
            return y
        def layer(w, axes, keep, x, w):
            # x: f32[4, 8]
            # w: f32[4, 8]
            y = layer_region_0(keep, x, w)
            return y
        """,
    ),
    "or where it is several kernels": (
        lambda: written(node("y", "nnscaler.dropout.default", "x", 0.5, "d", 0, [4, 8]), inputs="xd", outputs="y"),
        """\
        @region
        def layer_region_0(x, d):
            # Layer
            y = torch.ops.nnscaler.dropout(x, 0.5, d, 0, [4, 8])
            return y
        def layer(w, axes, keep, x, d):
            # x: f32[4, 8]
            # d: f32[4, 8]
            y = layer_region_0(keep, x, d)
            return y
        """,
    ),
    "each region rounds for itself": (
        lambda: written(
            LINEAR, node("a", "attention", "y", "x", "x"), node("z", "linear", "x", "a"), inputs="xw", fp8=("y", "z")
        ),
        """\
        @region
        def layer_region_0(x, w):
            # Layer
            x_fp8 = fp8.rounded(x)
            y = fp8.linear(x_fp8, w)
            return y
        @region
        def layer_region_1(x, a):
            # Layer
            x_fp8_2 = fp8.rounded(x)
            z = fp8.linear(x_fp8_2, a)
            return z
        def layer(w, axes, keep, x, w):
            # x: f32[4, 8]
            # w: f32[4, 8]
            y = layer_region_0(keep, x, w)
            # Layer
            a = ops.attention(y, x, x)
            del y
            z = layer_region_1(keep, x, a)
            return z
        """,
    ),
    "where backward runs in two parts, the gradient of a product's weight comes later": (
        lambda: written(
            LINEAR, node("z", "sin", "y"), parameters={"w": WHOLE}, splits=True, results=(Shard(0),),
            layouts={(one, tensor): (Shard(0),) for one, tensor in ("yx", "yy", "zy", "zz")},
        ),
        """\
        @region
        def layer_region_0(x_s0, w):
            # Layer
            y = later.linear(x_s0, w)
            z = y.sin()
            return z
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            x_s0 = collectives.slice_(x, axes.devices, dim=0, backward="all_gather")
            z = layer_region_0(keep, x_s0, axes.later.weight(w["w"], [2, 8], [2, 8]))
            return z
        """,
    ),
    "also where the product stands in its place; but not in fp8, nor where there is no weight": (
        lambda: written(
            LINEAR, node("a", "attention", "y", "x", "x"), node("z", "linear", "a", "b"), node("v", "linear", "z", "u"),
            inputs="xu", outputs="v", parameters={"w": WHOLE, "b": WHOLE}, fp8=("z",), splits=True,
        ),
        """\
        @region
        def layer_region_1(a, b, b_scale, u):
            # Layer
            a_fp8 = fp8.rounded(a)
            z = fp8.linear(a_fp8, fp8.Weight(b, b_scale))
            v = F.linear(z, u)
            return v
        def layer(w, axes, keep, x, u):
            # x: f32[4, 8]
            # u: f32[4, 8]
            y = later.linear(x, axes.later.weight(w["w"], [4, 8], [4, 8]))
            # Layer
            a = ops.attention(y, x, x)
            del y
            b_scale = w.scale_of("b")
            v = layer_region_1(keep, a, w["b"], b_scale, u)
            return v
        """,
    ),
    "nor of a weight that is used twice, or as it is not stored": (
        lambda: written(
            LINEAR, node("z", "linear", "y", "w"), node("v", "linear", "z", "u"), outputs="v", splits=True,
            parameters={"w": WHOLE, "u": (Shard(0),)},
        ),
        """\
        @region
        def layer_region_0(x, w, u_whole):
            # Layer
            y = F.linear(x, w)
            z = F.linear(y, w)
            v = F.linear(z, u_whole)
            return v
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            u_whole = collectives.all_gather(w["u"], axes.devices, dim=0, backward="slice")
            v = layer_region_0(keep, x, w["w"], u_whole)
            return v
        """,
    ),
    "several are one region, with a comment for each module": (
        lambda: written(SIN, MUL),
        """\
        @region
        def layer_region_0(x):
            # mlp  model.py:3
            y = x.sin()
            z = y * x
            return z
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            z = layer_region_0(keep, x)
            return z
        """,
    ),
    "what makes a tensor is told the device": (
        lambda: written(FULL, outputs="c"),
        """\
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            device = axes.device
            c = torch.full([4, 8], 1.0, device=device)
            return c
        """,
    ),
    "also in a region": (
        lambda: written(SIN, FULL, ADD),
        """\
        @region
        def layer_region_0(x, device):
            # mlp  model.py:3
            y = x.sin()
            # Layer
            c = torch.full([4, 8], 1.0, device=device)
            # norm  model.py:9
            z = y + c
            return z
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            device = axes.device
            z = layer_region_0(keep, x, device)
            return z
        """,
    ),
    "a registered operator stands between regions": (
        lambda: written(SIN, node("a", "attention", "y", "x", "x", module="attn"), node("z", "cos", "a")),
        """\
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            y = x.sin()
            # attn
            a = ops.attention(y, x, x)
            del y
            z = a.cos()
            return z
        """,
    ),
    "weights are gathered before, and found by their own place; results are brought to where they are to lie": (
        lambda: written(
            LINEAR, node("z", "tanh", "y"), parameters={"v": WHOLE, "w": (Shard(0),)}, results=(SHARED,),
            layouts={("y", "w"): (SHARED,), ("y", "y"): (PARTIAL,), ("z", "y"): (REPLICATE,)},
        ),
        """\
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            w_whole = axes.gathers.weight(w["w"], (axes.devices, 0))
            y = F.linear(x, w_whole)
            del w_whole
            y_whole = collectives.all_reduce(y, axes.devices, backward="identity")
            z = y_whole.tanh()
            z_whole = collectives.share(z, axes.devices)
            return z_whole
        """,
    ),
    "the scale of a weight that is stored is asked for once, and is not that of what is made of it": (
        lambda: written(
            LINEAR, node("a", "attention", "y", "x", "x"), node("z", "linear", "a", "w"), node("v", "linear", "a", "u"),
            outputs="zv", parameters={"w": WHOLE, "u": (REPLICATE,)}, layouts={("v", "u"): (Shard(0),)},
            fp8=("y", "z", "v"),
        ),
        """\
        @region
        def layer_region_0(x, w, w_scale):
            # Layer
            x_fp8 = fp8.rounded(x)
            y = fp8.linear(x_fp8, fp8.Weight(w, w_scale))
            return y
        @region
        def layer_region_1(a, w, w_scale, u_s0):
            # Layer
            a_fp8 = fp8.rounded(a)
            z = fp8.linear(a_fp8, fp8.Weight(w, w_scale))
            v = fp8.linear(a_fp8, u_s0)
            return z, v
        def layer(w, axes, keep, x):
            # x: f32[4, 8]
            w_scale = w.scale_of("w")
            y = layer_region_0(keep, x, w["w"], w_scale)
            # Layer
            a = ops.attention(y, x, x)
            del y
            u_s0 = collectives.slice_(w["u"], axes.devices, dim=0, backward="all_gather")
            z, v = layer_region_1(keep, a, w["w"], w_scale, u_s0)
            return z, v
        """,
    ),
    "what is gathered in fp8 is passed in parts, for which names are found; all are let go of": (
        lambda: written(
            LINEAR, node("a", "attention", "y", "y", "y"), node("z", "cos", "a"), inputs=["x", "w_whole_scale"],
            parameters={"w": (Shard(0),)}, layouts={("y", "w"): (SHARED,)}, fp8=("y",),
            narrow={("layer", "w", (SHARED,))},
        ),
        """\
        @region
        def layer_region_0(x, w_whole, w_whole_scale_2, w_whole_fp8):
            # Layer
            x_fp8 = fp8.rounded(x)
            y = fp8.linear(x_fp8, fp8.Weight(w_whole, w_whole_scale_2, w_whole_fp8))
            return y
        def layer(w, axes, keep, x, w_whole_scale):
            # x: f32[4, 8]
            # w_whole_scale: f32[4, 8]
            w_whole, w_whole_scale_2, w_whole_fp8 = axes.gathers.weight_in_fp8(w["w"], (axes.devices, 0))
            y = layer_region_0(keep, x, w_whole, w_whole_scale_2, w_whole_fp8)
            # Layer
            a = ops.attention(y, y, y)
            del w_whole, w_whole_scale_2, w_whole_fp8, y
            z = a.cos()
            return z
        """,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_written_as_by_hand(name):
    found, wanted = CASES[name]
    assert found() == dedent(wanted)
