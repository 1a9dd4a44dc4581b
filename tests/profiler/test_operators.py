"""What operators are given when they are timed."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
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


def test_two_runs_at_a_time_keep_the_times_of_both(monkeypatch, tmp_path):
    path, rows = tmp_path / "gpu.json", (8, 9, 10)
    monkeypatch.setattr(operators, "_measure", lambda node, inputs: [float(inputs[0].shape[0]), 0.0])
    one, other, older = (operators.OperatorTimes(path, versions) for versions in ("torch 1", "torch 1", "torch 0"))
    for times, row in zip((older, one, other), rows):
        times.seconds(LINEAR, [replace(OPERANDS[0], shape=(row, 4)), OPERANDS[1]])
        times.save()
    kept = json.loads(path.read_text())["seconds"]
    assert sorted(kept.values()) == [[9.0, 0.0], [10.0, 0.0]], "and none that hold for other versions"


def test_what_takes_very_long_is_timed_by_a_part_of_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(operators, "_measure", lambda node, inputs: asked.append(inputs) or [1.0, 2.0])
    times = operators.OperatorTimes(tmp_path / "gpu.json", "torch 1")
    halves = [replace(OPERANDS[0], shape=(4, 4)), OPERANDS[1]]
    for shape, factor in (((8, 4), 2.0), ((16, 4), 5.0)):
        whole = [replace(OPERANDS[0], shape=shape), OPERANDS[1]]
        assert times.seconds(LINEAR, whole, operators.Part(halves, factor)) == (factor, 2 * factor)
        assert times.seconds(LINEAR, whole) == (factor, 2 * factor), "as reports ask"
    assert asked == [halves]
    monkeypatch.setattr(operators, "_measure", lambda node, inputs: None)
    half, whole = ([replace(OPERANDS[0], shape=shape), OPERANDS[1]] for shape in ((9, 4), (18, 4)))
    assert times.seconds(LINEAR, whole, operators.Part(half, 2.0)) is None


@pytest.mark.parametrize(
    ("first", "compiling", "then", "runs"),
    [(8.0, 0.1, 8.0, 1), (8.0, 3.0, 5.0, 2), (0.7, 0.5, 0.2, 5), (0.2, 0.0, 0.2, 5), (0.5, 0.0, 0.5, 4)],
)
def test_a_call_that_takes_long_is_run_once_or_twice(monkeypatch, first, compiling, then, runs):
    """Seconds of the first run, in which the host compiles so long, and of later ones."""
    clock, done = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = clock[0]

        def record(self) -> None:
            self.at = clock[0] + sum(done)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    def function(x: torch.Tensor) -> torch.Tensor:
        clock[0] += compiling if not function.runs else 0.0
        done.append(then if function.runs else first - compiling)
        function.runs += 1
        return x

    def synchronize() -> None:
        clock[0] += sum(done)
        done.clear()

    function.runs = 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(operators, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert operators._forward_and_backward(function, False, [torch.ones(1)], {}) == [pytest.approx(then), 0.0]
    assert function.runs == runs


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


def test_times_are_those_of_the_libraries_of_kernels_too(monkeypatch):
    there = {"flash-attn": "2.8", "liger-kernel": "0.6"}

    def version(name: str) -> str:
        if name not in there:
            raise operators.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(operators.metadata, "version", version)
    assert operators._versions() == f"torch {torch.__version__}, flash-attn 2.8, liger-kernel 0.6"
    there["flash-attn-4"] = "4.0"
    assert operators._versions() == f"torch {torch.__version__}, flash-attn-4 4.0, flash-attn 2.8, liger-kernel 0.6"


def test_operands_given_by_name_have_gradients_too(monkeypatch):
    Gpu(monkeypatch)
    seen = []

    def function(x, weight):
        out = x * weight
        out.register_hook(lambda gradient: seen.append(1))
        return out

    x, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    monkeypatch.setattr(operators, "_SUSTAINED", -1.0)
    assert operators._forward_and_backward(function, False, (x,), {"weight": weight}) == [0.0, 0.0]
    assert seen


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


class Gpu:
    """A GPU whose clock goes on with what is asked of it; events write down its time, in milliseconds."""

    def __init__(self, monkeypatch) -> None:
        self.now, gpu = 0.0, self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(operators, "time", SimpleNamespace(perf_counter=lambda: self.now / 1e3))


@pytest.mark.parametrize("all_at_once", [False, True])
def test_times_are_those_that_a_device_sustains(all_at_once, monkeypatch):
    """Forward takes 20 ms and backward 40, and twice as long once the clock has fallen, in the later half of 10 runs.
    The first run, which compiles, does not count."""
    gpu, gradients, calls = Gpu(monkeypatch), [], []

    def takes(milliseconds: float) -> None:
        gpu.now += milliseconds * (100 if len(calls) == 1 else 2 if len(calls) > 2 + 5 else 1)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            calls.append(factor)
            takes(20)
            return x * factor, x.clone()

        @staticmethod
        def backward(ctx, *given):
            gradients.append(given)
            takes(40)
            return given[0], None

    x = torch.ones(3, 2, requires_grad=True)
    found = operators._forward_and_backward(Product.apply, all_at_once, (x, 5.0), {})
    assert found == pytest.approx([0.040, 0.080])
    assert calls == [5.0] * (2 + 10), "0.6 s of calls that take 60 ms"
    assert len(gradients) == len(calls)
    for given in gradients:
        assert [one.shape for one in given] == [x.shape] * 2
        assert all((one == 1).all() for one in given) == all_at_once
        assert all(torch.equal(one, first) for one, first in zip(given, gradients[0]))


def test_of_what_has_no_gradient_forward_alone_is_timed(monkeypatch):
    gpu, calls = Gpu(monkeypatch), []

    def function(x, scale):
        gpu.now += 400
        calls.append(scale)
        return x * scale

    assert operators._forward_and_backward(function, False, (torch.ones(2),), {"scale": 3}) == [0.4, 0.0]
    assert calls == [3] * 4, "two at least that count"


def test_an_operator_whose_backward_only_scales_is_timed_with_equal_gradients(monkeypatch):
    asked = []
    monkeypatch.setattr(operators, "_DEVICE", "cpu")
    monkeypatch.setattr(operators, "_forward_and_backward", lambda function, at_once, *rest: asked.append(at_once))
    for backward in (None, 0.0, 1.0):
        own = replace(operator_of(LINEAR), backward=backward)
        monkeypatch.setattr(operators, "operator_of", lambda node, own=own: own)
        operators._measure(LINEAR, OPERANDS)
    assert asked == [False, True, False]
