"""Which tensors of a graph have gradients, as follows from what is trained and from what the results need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nnscaler.graph import Block, Call, Graph, Node, Ref, TensorMeta
from nnscaler.trace.gradients import mark_gradients

ANY = TensorMeta((4,), torch.float32)


def node(name: str, op: str, *inputs: str, no_grad: bool = False) -> Node:
    return Node(name, f"aten.{op}", tuple(map(Ref, inputs)), {}, (name,), no_grad=no_grad)


def graph_of(nodes: Sequence[Node], outputs: Sequence[str], **parameters: bool) -> Graph:
    """Of an input x and these parameters: name -> whether it is trained."""
    root = Block("model", "Model", inputs=["x"], parameters={name: name for name in parameters}, nodes=list(nodes))
    root.tensors = dict.fromkeys(["x", *parameters, *(name for one in nodes for name in one.outputs)], ANY)
    root.outputs = list(outputs)
    metas = {name: TensorMeta((4,), torch.float32, trained) for name, trained in parameters.items()}
    return Graph(root, {}, metas, {})


def needed(graph: Graph) -> set[str]:
    """Names of the root's tensors that have a gradient."""
    mark_gradients(graph)
    return {name for name, meta in graph.root.tensors.items() if meta.requires_grad}


def trained(graph: Graph) -> set[str]:
    return {path for path, meta in graph.parameters.items() if meta.requires_grad}


Y, Z = node("y", "mul.Tensor", "x", "a"), node("z", "mul.Tensor", "y", "b")


def test_what_follows_from_what_is_trained_has_a_gradient() -> None:
    assert needed(graph_of([Y, Z], ["z"], a=True, b=False)) == {"a", "y", "z"}
    assert needed(graph_of([Y, Z], ["z"], a=False, b=True)) == {"b", "z"}
    assert needed(graph_of([Y, Z], ["z"], a=False, b=False)) == set()


MADE = ("zeros", "ones", "empty", "full")


@pytest.mark.parametrize("op", ["detach", *(f"{x}_like" for x in MADE), *(f"new_{x}" for x in MADE)])
def test_behind_some_operators_there_is_none(op: str) -> None:
    nodes = [
        Y,
        node("stopped", f"{op}.default", "y"),
        node("u", "mul.Tensor", "stopped", "c"),
        node("o", "add.Tensor", "y", "u"),
    ]
    assert needed(graph_of(nodes, ["o"], a=True, c=True)) == {"a", "y", "c", "u", "o"}
    graph = graph_of(nodes[:3], ["u"], a=True, c=True)
    assert needed(graph) == {"c", "u"}, "a is as good as frozen, for no gradient comes to it"
    assert trained(graph) == {"c"}


def test_without_gradients_and_of_whole_numbers_there_is_none() -> None:
    quiet = node("y", "mul.Tensor", "x", "a", no_grad=True)
    graph = graph_of([quiet, Z], ["z"], a=True, b=True)
    assert (needed(graph), trained(graph)) == ({"b", "z"}, {"b"})
    places = node("places", "argmax.default", "y")
    graph = graph_of([Y, places, Z], ["z", "places"], a=True, b=True)
    graph.root.tensors["places"] = TensorMeta((), torch.int64)
    assert needed(graph) == {"a", "y", "b", "z"}
    graph = graph_of([Y, Z], ["z"], a=True, b=True)
    graph.root.tensors |= dict.fromkeys("ayz", TensorMeta((4,), torch.complex64))
    assert needed(graph) == {"a", "y", "b", "z"}


def test_what_no_result_needs_is_not_trained() -> None:
    graph = graph_of([Y, Z], ["y"], a=True, b=True)
    assert (needed(graph), trained(graph)) == ({"a", "y", "z"}, {"a"})


def calling(own: Sequence[bool], first: bool = True, outputs: Sequence[str] = ()) -> Graph:
    """Calls of a layer, whose weight is trained or not, one behind the other; the first takes y, trained or not."""
    layer = Block("found", "DecoderLayer", dict.fromkeys("hwr", ANY), ["h"], {"w": "w"}, [], ["r"])
    layer.nodes = [node("r", "mul.Tensor", "h", "w")]
    nodes: list[Node] = [Y]
    for number in range(len(own)):
        name, before = f"c{number}", f"c{number - 1}" if number else "y"
        nodes.append(Call(name, "call", (Ref(before),), {}, (name,), block="found", parameters={"w": f"w{number}"}))
    graph = graph_of(nodes, outputs or [f"c{len(own) - 1}"], a=first)
    graph.blocks = {"found": layer}
    graph.parameters |= {f"w{number}": TensorMeta((4,), torch.float32, one) for number, one in enumerate(own)}
    return graph


@pytest.mark.parametrize(("first", "own", "blocks", "inputs"), [
    (True, (True, True), ["decoder_layer"] * 2, {"decoder_layer": True}),
    (False, (True, True), ["decoder_layer"] * 2, {"decoder_layer": True}),  # as the second call's has one
    (False, (True,), ["decoder_layer"], {"decoder_layer": False}),
    (False, (False, True, True), ["decoder_layer", "decoder_layer_2", "decoder_layer_2"],
     {"decoder_layer": False, "decoder_layer_2": True}),
    (True, (False, True, False), ["decoder_layer", "decoder_layer_2", "decoder_layer"],
     {"decoder_layer": True, "decoder_layer_2": True}),
    (False, (False, False, False), ["decoder_layer"] * 3, {"decoder_layer": False}),
    # Of frozen layers, those before a trained one have results without a gradient, and those after it with one.
    (False, (False, True, False), ["decoder_layer", "decoder_layer_2", "decoder_layer_3"],
     {"decoder_layer": False, "decoder_layer_2": False, "decoder_layer_3": True}),
])  # fmt: skip
def test_calls_that_are_trained_alike_share_a_block(first, own, blocks, inputs) -> None:
    graph = calling(own, first)
    mark_gradients(graph)
    assert [call.block for call in graph.root.nodes if isinstance(call, Call)] == blocks
    assert {name: block.tensors["h"].requires_grad for name, block in graph.blocks.items()} == inputs
    for block in graph.blocks.values():
        (weight,) = {graph.parameters[call.parameters["w"]].requires_grad for call in graph.calls(block.name)}
        assert block.tensors["w"].requires_grad == weight
        assert block.tensors["r"].requires_grad == (weight or block.tensors["h"].requires_grad)


def test_layers_that_no_gradient_comes_to_are_not_trained() -> None:
    """Though others of their block are: the optimizer would let their weights decay."""
    graph = calling((True, True, True), outputs=["sum"])
    stopped, total = node("stopped", "detach.default", "c2"), node("sum", "add.Tensor", "c1", "stopped")
    graph.root.nodes += [stopped, total]
    graph.root.tensors |= dict.fromkeys(("stopped", "sum"), ANY)
    mark_gradients(graph)
    assert trained(graph) == {"a", "w0", "w1"}
    assert [call.block for call in graph.root.nodes if isinstance(call, Call)] == ["decoder_layer"] * 2 + [
        "decoder_layer_2"
    ]
    assert not graph.blocks["decoder_layer_2"].tensors["w"].requires_grad


def test_of_a_layer_with_two_results_what_leads_to_the_one_that_counts_is_trained() -> None:
    layer = Block("found", "DecoderLayer", dict.fromkeys("hwvrs", ANY), ["h"], {"w": "w", "v": "v"}, [], ["r", "s"])
    layer.nodes = [node("r", "mul.Tensor", "h", "w"), node("s", "mul.Tensor", "h", "v")]
    for outputs, wanted in ((["one"], {"a", "w0"}), (["two"], {"a", "v0"}), (["two", "one"], {"a", "w0", "v0"})):
        call = Call("c", "call", (Ref("y"),), {}, ("one", "two"), block="found", parameters={"w": "w0", "v": "v0"})
        graph = graph_of([Y, call], outputs, a=True)
        graph.blocks = {"found": layer}
        graph.parameters |= dict.fromkeys(("w0", "v0"), TensorMeta((4,), torch.float32, True))
        mark_gradients(graph)
        assert trained(graph) == wanted
