"""Stages of a graph together are the graph."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch

from nnscaler import UserError
from nnscaler.graph import Block, Call, Graph, Node, Ref, TensorMeta
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.pipeline.cut import cut, pivots, shared_parameters
from nnscaler.trace import build_on_meta, trace
from tests import tiny


def llama(layers: int = 4, tied: bool = False, length: int = tiny.LENGTH) -> Graph:
    """A graph of the test's own, which is traced once for all."""
    return deepcopy(_llama(layers, tied, length))


@cache
def _llama(layers: int, tied: bool, length: int) -> Graph:
    config = tiny.config(num_hidden_layers=layers, tie_word_embeddings=tied)
    prepare_config(config, length, "auto")
    model, buffers = build_on_meta(lambda: CausalLM(config))
    inputs = {name: torch.empty((1, length), dtype=torch.int64) for name in ("input_ids", "labels")}
    return trace(model, inputs, buffers)


def test_a_llama_passes_one_tensor_from_stage_to_stage():
    graph = llama()
    begins = pivots(graph)
    assert [graph.root.nodes[index].outputs for index in begins] == [(f"layers_{i}",) for i in range(4)]
    stages = cut(graph, begins[1:3])
    assert [(stage.received, stage.sent) for stage in stages] == [
        ((), ("layers_0",)), (("layers_0",), ("layers_1",)), (("layers_1",), ()),
    ]  # fmt: skip
    assert [stage.graph.root.inputs for stage in stages] == [["input_ids"], ["layers_0"], ["layers_1", "labels"]]
    assert [len(stage.graph.calls("llama_decoder_layer")) for stage in stages] == [1, 1, 2]
    assert stages[2].graph.root.outputs == graph.root.outputs
    # Each parameter is in one stage; the table of rotary frequencies, a buffer, in each.
    buffers = set(graph.buffers)
    names = [name for stage in stages for name in stage.graph.parameters if name not in buffers]
    assert sorted(names) == sorted(set(graph.parameters) - buffers)
    assert all(set(stage.graph.buffers) == buffers for stage in stages)
    assert shared_parameters([stage.graph for stage in stages]) == {}


def test_every_stage_is_a_graph_of_its_own():
    for stage in cut(llama(), pivots(llama())[1:]):
        root = stage.graph.root
        known = {*root.inputs, *root.parameters}
        for node in root.nodes:
            assert known.issuperset(node.inputs), node.name
            known.update(node.outputs)
        assert known.issuperset(root.outputs)
        assert set(root.tensors) == known


def test_tied_weights_belong_to_both_stages():
    stages = cut(llama(tied=True), pivots(llama(tied=True))[2:3])
    assert shared_parameters([stage.graph for stage in stages]) == {"model.model.embed_tokens.weight": [0, 1]}


def skipping() -> Graph:
    """x -> a -> b -> c -> d, where d also uses what came before a, and b's output is the graph's as well."""
    block = Block("layer", "Layer", inputs=["h"], outputs=["r"])
    block.tensors = {name: TensorMeta((4, 8), torch.float32, True) for name in ("h", "r")}
    block.tensors["w"] = TensorMeta((8, 8), torch.float32, True)
    block.parameters = {"w": "w"}
    block.nodes = [Node("r", "aten.linear.default", (Ref("h"), Ref("w")), {}, ("r",))]
    root = Block("model", "Model", inputs=["x"], parameters={"first": "first"})
    root.tensors = {"x": TensorMeta((4, 8), torch.float32), "first": TensorMeta((8,), torch.float32, True)}
    root.nodes.append(Node("start", "aten.mul.Tensor", (Ref("x"), Ref("first")), {}, ("start",)))
    before = "start"
    for name in "abcd":
        call = Call(name, "call", (Ref(before),), {}, (name,), block="layer", parameters={"w": f"{name}.w"})
        root.nodes.append(call)
        before = name
    root.nodes.append(Node("sum", "aten.add.Tensor", (Ref("d"), Ref("start")), {}, ("sum",)))
    root.tensors.update({name: TensorMeta((4, 8), torch.float32, True) for name in ("start", *"abcd", "sum")})
    root.outputs = ["sum", "b"]
    graph = Graph(root, {"layer": block}, {}, {})
    graph.parameters = {path: graph_block.tensors[tensor] for graph_block, tensor, path in graph.parameter_uses()}
    return graph


def test_what_a_later_stage_uses_goes_through_those_between():
    stages = cut(skipping(), [2, 3, 4])
    assert [stage.sent for stage in stages] == [("start", "a"), ("start", "b"), ("start", "b", "c"), ()]
    assert [list(stage.graph.parameters) for stage in stages] == [["first", "a.w"], ["b.w"], ["c.w"], ["d.w"]]
    assert stages[2].graph.root.inputs == ["start", "b"]


def test_pivots_are_classes_of_repeated_modules():
    with pytest.raises(UserError, match="has 'LlamaMLP'; the model's repeated modules are LlamaDecoderLayer"):
        pivots(llama(), ["LlamaMLP"])
    graph = llama()
    graph.blocks.clear()
    graph.root.nodes = [node for node in graph.root.nodes if not isinstance(node, Call)]
    with pytest.raises(UserError, match="needs a model with repeated modules"):
        pivots(graph)


def test_stages_begin_at_the_class_that_is_called_most():
    graph = skipping()
    graph.blocks = {"other": Block("other", "Other"), **graph.blocks}
    call = graph.root.nodes[2]
    graph.root.nodes[2] = Call(call.name, "call", call.args, {}, call.outputs, block="other", parameters={})
    assert pivots(graph) == [1, 3, 4]
    assert pivots(graph, ["Other"]) == [2]
    assert pivots(graph, ["Other", "Layer"]) == [1, 2, 3, 4]


def masked() -> Graph:
    """x -> start -> a -> b -> sum, which also uses a mask, of x and a buffer, and what start gives without a
    gradient."""
    graph = skipping()
    root = graph.root
    root.parameters["table"] = "table"
    plain = {name: TensorMeta((4, 8), torch.float32, False) for name in ("table", "mask", "hard")}
    root.tensors = {**root.tensors, **plain}
    start, a, b = root.nodes[:3]
    nodes = [
        Node(name, "aten.mul.Tensor", tuple(map(Ref, inputs)), {}, (name,))
        for name, *inputs in (("mask", "x", "table"), ("hard", "start", "start"), ("sum", "b", "mask", "hard"))
    ]
    root.nodes, root.outputs = [nodes[0], start, nodes[1], a, b, nodes[2]], ["sum"]
    graph.parameters = {path: block.tensors[tensor] for block, tensor, path in graph.parameter_uses()}
    graph.buffers = {"table": torch.zeros(4, 8)}
    graph.stored = {"first": (0,), "b.w": (1,)}
    graph.tied = {"one": "first", "other": "b.w"}
    return graph


def test_a_call_and_what_has_a_result_with_a_gradient_are_computed_once():
    """Though they follow from inputs and buffers alone: the mask is a call, and of what b gives one has a gradient."""
    graph = masked()
    root = graph.root
    start, hard, a, b, last = root.nodes[1:]
    two = Node("two", "aten.max.dim", (Ref("table"), 0), {}, ("first_of_two", "second_of_two"))
    root.tensors |= {name: root.tensors[kind] for name, kind in (("first_of_two", "a"), ("second_of_two", "mask"))}
    call = Call("mask", "call", (Ref("x"),), {}, ("mask",), block="layer", parameters={"w": "table"})
    end = Node("sum", last.op, (*last.args, Ref("first_of_two")), {}, ("sum",))
    root.nodes = [call, start, hard, two, a, b, end]
    first, second = cut(graph, [5])
    assert [node.name for node in second.graph.root.nodes] == ["b", "sum"]
    assert first.sent == ("mask", "hard", "first_of_two", "a")


def test_what_follows_from_inputs_and_buffers_is_computed_where_it_is_used():
    first, second = cut(masked(), [4])
    assert first.sent == second.received == ("hard", "a")
    assert [node.name for node in first.graph.root.nodes] == ["start", "hard", "a"]
    assert [node.name for node in second.graph.root.nodes] == ["mask", "b", "sum"]
    assert [stage.graph.root.inputs for stage in (first, second)] == [["x"], ["hard", "a", "x"]]
    assert [list(stage.graph.parameters) for stage in (first, second)] == [["first", "a.w"], ["table", "b.w"]]
    assert [list(stage.graph.buffers) for stage in (first, second)] == [[], ["table"]]
    assert [stage.graph.stored for stage in (first, second)] == [{"first": (0,)}, {"b.w": (1,)}]
    assert [stage.graph.tied for stage in (first, second)] == [{"one": "first"}, {"other": "b.w"}]
