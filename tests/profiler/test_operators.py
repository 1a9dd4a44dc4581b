"""What operators are given when they are timed."""

from __future__ import annotations

from typing import Any

import torch

from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.profiler import operators

SHAPES = [(2, 4, 8, 6), (2, 2, 8, 6), (2, 2, 8, 6)]
INPUTS = [*(TensorMeta(shape, torch.float32, True) for shape in SHAPES), TensorMeta((2, 8), torch.int64)]
QUERY_KEY_VALUE = (Ref("q"), Ref("k"), Ref("v"))


def timed(monkeypatch, node: Node) -> dict[str, Any]:
    """The tensors, by keyword, with which a call is timed."""
    seen: dict[str, Any] = {}

    def forward_and_backward(function, all_at_once, args, kwargs) -> list[float]:
        assert [tuple(tensor.shape) for tensor in args] == SHAPES
        seen.update(kwargs)
        return [1.0, 2.0]

    monkeypatch.setattr(operators, "_DEVICE", "cpu")
    monkeypatch.setattr(operators, "_forward_and_backward", forward_and_backward)
    assert operators._measure(node, INPUTS[: len(node.inputs)]) == [1.0, 2.0]
    return seen


def test_attention_is_timed_on_documents_as_long_as_those_of_the_data(monkeypatch):
    kwargs = {"documents": Ref("documents"), "document_length": 3}
    seen = timed(monkeypatch, Node("a", "attention", QUERY_KEY_VALUE, kwargs, ("out",)))
    assert seen["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]] * 2
    seen = timed(monkeypatch, Node("a", "attention", QUERY_KEY_VALUE, {"documents": Ref("documents")}, ("out",)))
    assert seen["documents"].tolist() == [[0] * 8] * 2, "of unknown length, they are one"
    assert timed(monkeypatch, Node("a", "attention", QUERY_KEY_VALUE, {}, ("out",))) == {}
