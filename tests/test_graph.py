"""What a graph says of its parts, and its arguments as source."""

from __future__ import annotations

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.graph import (
    Block,
    Call,
    Graph,
    Node,
    Ref,
    TensorMeta,
    format_argument,
    format_arguments,
    map_refs,
    refs,
    short_dtype,
)


@pytest.mark.parametrize("value", [(), (1,), (1, 2), [], [1], ((1,), [(2,)]), {"a": (None,)}, "x", 0.5])
def test_an_argument_is_written_as_what_it_is(value):
    """A tuple of one has a comma."""
    found = eval(format_argument(value))
    assert (found, type(found)) == (value, type(value))


def test_tensors_are_written_by_name():
    assert format_arguments([Ref("x"), (Ref("y"),)], {"dim": [Ref("z")]}) == "x, (y,), dim=[z]"


def test_tensors_are_found_and_replaced_however_nested():
    """In order, each as often as it is there; what holds them stays what it was."""
    value = (Ref("b"), [Ref("a"), 1, (Ref("b"),)], {"k": {"l": Ref("c")}}, None)
    assert list(refs(value)) == ["b", "a", "b", "c"]
    assert map_refs(value, lambda ref: ref.name.upper()) == ("B", ["A", 1, ("B",)], {"k": {"l": "C"}}, None)
    assert Node("n", "op", (1, Ref("x")), {"out": Ref("y"), "more": [Ref("x")]}, ("n",)).inputs == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("dtype", "short", "size"),
    [(torch.bfloat16, "bf16", 2), (torch.float64, "f64", 8), (torch.int32, "i32", 4), (torch.uint8, "ui8", 1),
     (torch.bool, "bool", 1), (torch.float8_e4m3fn, "f8_e4m3fn", 1)],
)  # fmt: skip
def test_a_tensor_in_short_and_its_bytes(dtype, short, size):
    assert short_dtype(dtype) == short
    meta = TensorMeta((3, 5), dtype)
    assert (str(meta), meta.numel, meta.nbytes) == (f"{short}[3, 5]", 15, 15 * size)
    assert (str(TensorMeta((), dtype)), TensorMeta((), dtype).nbytes) == (f"{short}[]", size)


def graph() -> Graph:
    """Two layers of one block and one of another, between operators, with a weight that has two names."""
    meta = {name: TensorMeta((2,), torch.float32) for name in ("x", "w", "h", "y", "z", "out")}
    layer, last = (Block(name, "Layer", meta, ["x"], {"w": "w"}, [], ["x"]) for name in ("layer", "last"))
    nodes = [
        Call("h", "", (Ref("x"),), {}, ("h",), block="layer", parameters={"w": "first.w"}),
        Call("y", "", (Ref("h"),), {}, ("y",), block="last", parameters={"w": "own.w"}),
        Call("z", "", (Ref("y"),), {}, ("z",), block="layer", parameters={"w": "second.w"}),
        Node("out", "aten.mul.Tensor", (Ref("z"), Ref("w")), {}, ("out",), module="head", source="model.py:7"),
        Node("x", "aten.neg.default", (Ref("out"),), {}, ("x",), module="head", source="model.py:8"),
        Node("w", "aten.neg.default", (Ref("x"),), {}, ("w",)),
    ]
    root = Block("model", "Model", meta, ["x"], {"w": "head.w"}, nodes, ["out", "w"])
    parameters = dict.fromkeys(("first.w", "second.w", "own.w", "head.w"), meta["w"])
    return Graph(root, {"layer": layer, "last": last}, parameters, {}, {"tied.w": "head.w"})


def test_blocks_are_counted_by_their_calls():
    model = graph()
    assert [model.count(block) for block in model.all_blocks()] == [1, 2, 1]
    assert [call.name for call in model.calls("layer")] == ["h", "z"]
    assert [(block.name, name, path) for block, name, path in model.parameter_uses()] == [
        ("model", "w", "head.w"), ("layer", "w", "first.w"), ("layer", "w", "second.w"), ("last", "w", "own.w")
    ]  # fmt: skip


def test_how_a_parameter_is_stored_is_said_by_any_of_its_names():
    model = graph()
    model.store("tied.w", 0, None)
    model.store("first.w")
    assert model.stored == {"head.w": (0, None), "first.w": ()}
    with pytest.raises(UserError, match=r"^the model uses no parameter 'w'; it has first.w, second.w, own.w, head.w$"):
        model.store("w", 0)


def test_a_graph_as_text():
    """The module and the line are said where they change, and for the model's own operators."""
    root, layer, *_ = str(graph()).split("\n\n")
    assert root.splitlines() == [
        "block model (Model)", "    input      x: f32[2]", "    parameter  w: f32[2]  head.w",
        "  # .", "    h: f32[2] = layer(x)", "    y: f32[2] = last(h)", "    z: f32[2] = layer(y)",
        "  # head  model.py:7", "    out: f32[2] = aten.mul.Tensor(z, w)", "    x: f32[2] = aten.neg.default(out)",
        "  # .", "    w: f32[2] = aten.neg.default(x)", "    return out, w",
    ]  # fmt: skip
    assert layer == "block layer (Layer)\n    input      x: f32[2]\n    parameter  w: f32[2]  w\n    return x"
