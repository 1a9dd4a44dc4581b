"""Names in a graph, and what of an exported program does not get into it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.trace.convert import (
    _drop_unused,
    _identifier,
    _identity,
    _module_stack,
    _name_after_modules,
    _role,
    unused,
)
from nnscaler.trace.gradients import _name
from nnscaler.trace.own_code import source_of

X, Y = Ref("x"), Ref("y")
F32, BF16 = torch.empty(2, 3, device="meta"), torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
WIDE = torch.empty(4, 2, 3, device="meta")


@pytest.mark.parametrize(("op", "args", "result", "same"), [
    ("add.Tensor", (X, 0), F32, True), ("add.Tensor", (X, 1), F32, False), ("add.Tensor", (X, Y), F32, False),
    ("add.Tensor", (0, X), F32, False), ("add.Tensor", (X, 0), BF16, False), ("add.Tensor", (X, 0.0), WIDE, False),
    ("mul.Tensor", (X, 1), F32, True), ("mul.Tensor", (X, 0), F32, False), ("div.Tensor", (X, 1.0), F32, True),
    ("div.Tensor", (X, 0), F32, False), ("sub.Tensor", (X, 0), F32, False),
    ("dropout.default", (X, 0.0, True), F32, True),
    ("dropout.default", (X, 0.5, False), F32, True), ("dropout.default", (X, 0.5, True), F32, False),
    ("feature_dropout.default", (X, 0.5, False), F32, True), ("feature_dropout.default", (X, 0.5, True), F32, False),
    ("contiguous.default", (X,), F32, True), ("alias.default", (X,), F32, True), ("clone.default", (X,), F32, False),
    ("to.dtype", (X, torch.float32), F32, True), ("to.dtype", (X, torch.bfloat16), BF16, False),
    ("_to_copy.default", (X,), F32, True), ("contiguous.default", (X,), [F32], False),
])  # fmt: skip
def test_what_changes_nothing_is_left_out(op: str, args: Any, result: Any, same: bool) -> None:
    """Nothing is left out that has another type or shape than what it was given."""
    meta = TensorMeta((2, 3), torch.float32)
    block = Block("layer", "Layer", {"x": meta, "y": meta})
    assert _identity(f"aten.{op}", args, result, block) == (X if same else None)


def test_names_are_identifiers_and_each_is_given_once() -> None:
    assert [_identifier(text) for text in ("a.b-c", "w1", "1w", "_w", "ä")] == ["a_b_c", "w1", "t_1w", "t__w", "t_ä"]
    taken = {"x", "x_3"}
    assert [unused(name, taken) for name in ("x", "x", "y", "y")] == ["x_2", "x_4", "y", "y_2"]
    assert [_role(path) for path in ("mlp.up", "layers.12", "a.heads.0", "up", "")] == [
        "up", "layers_12", "heads_0", "up", "",
    ]  # fmt: skip
    counts: dict[str, int] = {}
    assert [_name(kind, counts) for kind in ("LlamaLayer", "Layer", "LlamaLayer", "LlamaLayer", "layer")] == [
        "llama_layer", "layer", "llama_layer_2", "llama_layer_3", "layer_2",
    ]  # fmt: skip


def test_a_node_is_told_its_module_below_the_one_that_is_traced() -> None:
    stack = {
        "a": ("", nn.Module), "z": ("layers.12", nn.Tanh), "b": ("layers.1", "pkg.models.Layer"),
        "c": ("layers.1.mlp", nn.Linear), "d": ("layers.1.mlp.act@2", nn.ReLU),
    }  # fmt: skip
    node: Any = SimpleNamespace(meta={"nn_module_stack": stack})
    assert _module_stack(node, "") == ("layers.1.mlp.act", ("Module", "Tanh", "Layer", "Linear", "ReLU"))
    assert _module_stack(node, "layers.1.") == ("mlp.act", ("Layer", "Linear", "ReLU"))
    assert _module_stack(node, "layers.10.") == ("", ())
    del stack["c"], stack["d"]
    assert _module_stack(node, "layers.1.") == ("", ("Layer",))
    assert _module_stack(SimpleNamespace(meta={}), "layers.1.") == ("", ())  # type: ignore[arg-type]


def test_a_line_is_the_innermost_one_of_the_model() -> None:
    def source(*frames: tuple[str, int]) -> str:
        text = "".join(f'  File "{file}", line {line}, in forward\n    x = y\n' for file, line in frames)
        return source_of({"stack_trace": text})

    own = [("/me/model.py", 3), ("/me/layer.py", 14)]
    assert source(*own, ("/lib/torch/nn/functional.py", 99)) == "layer.py:14"
    assert source(*own, ("<eval_with_key>.7", 5)) == "layer.py:14"
    assert source(("/lib/torch/nn/modules/module.py", 7), ("/lib/torch/nn/functional.py", 99)) == "functional.py:99"
    assert source() == ""


def test_results_are_called_after_the_module_that_gives_them() -> None:
    """What a module computes before its last result, and what is computed outside of modules, keeps its name."""
    modules = {
        "t": "mlp.up", "a": "mlp.up", "b": "mlp", "c": "mlp.up", "g": "mlp", "d": "", "e": "blocks.3", "f": "norm",
    }  # fmt: skip
    names = ["t", "up", "b", "up_2", "mlp", "d", "blocks_3", "norm_2"]
    nodes = [
        Node(name, "aten.sin.default", (Ref(given),), {"out": [Ref(given)]}, (name,), module=module)
        for given, (name, module) in zip(["x", *modules], modules.items())
    ]
    tensors = dict.fromkeys(["x", "norm", *modules], TensorMeta((2,), torch.float32))
    block = Block("layer", "Layer", tensors, ["x"], {"norm": "norm.weight"}, nodes, ["f", "c"])
    _name_after_modules(block)
    assert [node.name for node in block.nodes] == [node.outputs[0] for node in block.nodes] == names
    assert [node.args[0].name for node in block.nodes] == ["x", *names[:-1]]
    assert [node.kwargs["out"][0].name for node in block.nodes] == ["x", *names[:-1]]
    assert block.outputs == ["norm_2", "up_2"]
    assert set(block.tensors) == {"x", "norm", *names}
    several = Node("split", "aten.split.Tensor", (Ref("x"), 1), {}, ("x", "x_1"), module="heads")
    block = Block("layer", "Layer", {}, ["x"], {}, [several], ["x_1"])
    _name_after_modules(block)
    assert (several.name, several.outputs) == ("x_2", ("x_2", "x_1")), "of several, none is the module's"


def test_what_nobody_reads_is_dropped_but_inputs_stay() -> None:
    names = ["x", "unread", "w", "v", "a", "b", "c", "d"]
    nodes = [
        Node("a", "aten.mul.Tensor", (Ref("x"), Ref("w")), {}, ("a",)),
        Node("b", "aten.mul.Tensor", (Ref("a"), Ref("v")), {}, ("b",)),
        Node("c", "aten.split.Tensor", (Ref("a"), 1), {}, ("c", "d")),
    ]
    tensors = {name: TensorMeta((2,), torch.float32) for name in names}
    block = Block("layer", "Layer", tensors, ["x", "unread"], {"w": "w", "v": "v"}, nodes, ["d"])
    _drop_unused(block)
    assert [node.name for node in block.nodes] == ["a", "c"]
    assert (block.inputs, block.parameters) == (["x", "unread"], {"w": "w"})
    assert set(block.tensors) == {"x", "unread", "w", "a", "c", "d"}, "the first part is one that the node makes"
