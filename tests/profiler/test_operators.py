"""What operators are given when they are timed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.operators import operator_of
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


LINEAR = Node("y", "aten.linear.default", (Ref("x"), Ref("w")), {}, ("y",))
OPERANDS = [TensorMeta((8, 4), torch.bfloat16), TensorMeta((2, 4), torch.bfloat16, True)]


def test_a_call_is_timed_once_and_what_cannot_be_run_is_not_tried_again(monkeypatch, tmp_path):
    asked = []

    def measure(node, inputs):
        asked.append(inputs)
        return None if inputs[0].shape[0] == 9 else [1.0, 2.0]

    monkeypatch.setattr(operators, "_measure", measure)
    times = operators.OperatorTimes(tmp_path / "operators" / "gpu.json", "torch 1")
    times.save()
    assert not times.path.exists(), "nothing was measured"
    others = [replace(OPERANDS[0], shape=(9, 4)), OPERANDS[1]]
    frozen = [OPERANDS[0], replace(OPERANDS[1], requires_grad=False)]
    for _ in range(2):
        assert times.seconds(LINEAR, OPERANDS) == (1.0, 2.0)
        assert times.seconds(LINEAR, others) is None
        assert times.seconds(LINEAR, frozen) == (1.0, 2.0)
    assert asked == [OPERANDS, others, frozen], "a gradient makes another call"
    call = "aten.linear.default(bfloat16[8, 4], bfloat16[2, 4]*)"
    assert call in times.known
    times.save()
    kept = json.loads(times.path.read_text())
    assert kept["versions"] == "torch 1"
    assert kept["seconds"][call] == [1.0, 2.0]
    assert None in kept["seconds"].values()
    times.path.unlink()
    times.save()
    assert not times.path.exists(), "all is kept already"


def test_times_of_other_versions_are_measured_anew(monkeypatch, tmp_path):
    path = tmp_path / "operators" / "a-gpu.json"
    monkeypatch.setenv("NNSCALER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operators.OperatorTimes.here() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert operators.OperatorTimes.here().known == {}
    path.parent.mkdir()
    for versions, known in ((operators._versions(), {"call": [1.0, 2.0]}), ("others", {})):
        path.write_text(json.dumps({"versions": versions, "seconds": {"call": [1.0, 2.0]}}))
        found = operators.OperatorTimes.here()
        assert (found.path, found.known, found.versions) == (path, known, operators._versions())
    path.write_text("[]")
    assert operators.OperatorTimes.here().known == {}
    assert operators._versions().startswith(f"torch {torch.__version__}")


def test_what_runs_out_of_memory_is_not_timed(monkeypatch):
    def refuses(*given):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(operators, "_DEVICE", "cpu")
    monkeypatch.setattr(operators, "_forward_and_backward", refuses)
    assert operators._measure(LINEAR, OPERANDS) is None


def test_numbers_are_like_those_in_training(monkeypatch):
    monkeypatch.setattr(operators, "_DEVICE", "cpu")
    matrix = operators._example(TensorMeta((200, 400), torch.float32, True))
    assert matrix.requires_grad
    assert matrix.std().item() == pytest.approx(400**-0.5, rel=0.05), "a weight keeps the size of what it multiplies"
    rows = operators._example(TensorMeta((20, 10, 400), torch.float32))
    assert not rows.requires_grad
    assert rows.std().item() == pytest.approx(1, rel=0.05)
    numbers = operators._example(TensorMeta((3, 5), torch.int64))
    assert (numbers.dtype, numbers.tolist()) == (torch.int64, [[0] * 5] * 3)


def test_the_function_that_is_timed_is_the_operators():
    assert operators._function(LINEAR) is torch.ops.aten.linear.default
    own = Node("a", "attention", QUERY_KEY_VALUE, {}, ("out",))
    assert operators._function(own) is operator_of(own).function is not None
