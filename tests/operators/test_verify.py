"""`verify_op` finds annotations that are false, and says in one line each what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler import UserError, register_op, verify_op
from nnscaler.operators import verify
from nnscaler.operators.attention import attention
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard

X, SQUARE = torch.randn(4, 6), torch.randn(6, 6)


def registered(annotation: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
    return register_op(annotation, name=f"verified_{len(_names)}{_names.append(0) or ''}")(function)


_names: list[int] = []


class Mean(torch.autograd.Function):
    """The mean of each row. Its forward may be split along rows, but its backward divides by their number."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.mean(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient[:, None].expand_as(x) / len(x)


@pytest.mark.parametrize(
    ("annotation", "function", "args", "kwargs", "names"),
    [
        ("row column^ -> row column^", lambda x: x.softmax(1), (X,), {}, ["row"]),
        ("m k+, k n -> m n", lambda a, b: a @ b, (X, SQUARE), {}, ["m", "k", "n"]),
        ("m k+, k n -> m n", lambda a, b: a @ b, (X.bfloat16(), SQUARE.bfloat16()), {}, ["m", "k", "n"]),
        ("(h d^) -> h d^", lambda x: x.view(-1, 2), (torch.randn(6),), {}, ["h"]),  # over three devices
        ("row+ column -> column, row column", lambda x: (x.sum(0), -x), (X,), {}, ["row", "column"]),
        ("row column, row -> row column", lambda x, *, y=None: x * y[:, None], (X,), {"y": X[:, 0]}, ["row", "column"]),
        ("row column, row -> row column", lambda x, y=None: x, (X,), {}, ["row", "column"]),
        ("row+, other -> other", lambda x, i: x.sum() * i, (torch.arange(4), X[0]), {}, ["row", "other"]),
        ("all^ -> all^", lambda x: x.softmax(0), (X[0],), {}, []),
    ],
)
def test_what_is_true_is_found_true(annotation, function, args, kwargs, names):
    assert verify_op(registered(annotation, function), args, kwargs) == names


@pytest.mark.parametrize(
    ("annotation", "function", "args", "wrong"),
    [
        ("row column -> row column", lambda x: x.softmax(1), (X,),
         "split along 'column' over 2 devices: output 0 differs from that of the whole by .* of its largest element"),
        ("row+ -> ()", lambda x: x.mean(), (torch.randn(6),), "split along 'row' over 2 devices: output 0 differs"),
        ("row column+ -> row", Mean.apply, (X,), "split along 'row' over 2 devices: the gradient of input 0 differs"),
        ("row -> row", lambda x: x.detach() + (x - x.detach()).sum(), (X[0],), "the gradient of input 0 differs"),
        ("(h d^) -> h d^", lambda x: x.view(3, 2), (torch.randn(6),),
         r"split along 'h' over 3 devices: device 0 raises RuntimeError: shape '\[3, 2\]' is invalid"),
        ("row column -> row column", lambda x: torch.ones(4, 6) * x[:1, :1], (X,),
         r"split along 'row' over 2 devices: device 0 gives \[4, 6\]; by the annotation it is \[2, 6\]"),
        ("row column -> row column", lambda x: x * 2, (X[:1],), "'row' has size 1 in the example"),
        ("row -> row", lambda x: torch.rand_like(x), (X[0],), "gives something else when it is called again"),
        ("row -> row", lambda x: x.add_(1), (torch.arange(4),), "writes into its input 0"),
        ("row -> row", lambda x: {"a": x}, (X[0],), "returns a dict; it must return a tensor"),
        ("row -> row", lambda x: x, (X,), "input 0 has 2 dimensions"),
        (lambda y: "row -> row", lambda x, y: x, (X[0], 2), "does not take the operator's arguments: too many"),
        (lambda x: None, lambda x: x, (X[0],), "the annotation's function gives None; it must give a text"),
    ],
)  # fmt: skip
def test_what_is_false_is_one_line_each(annotation, function, args, wrong):
    with pytest.raises(UserError, match=wrong) as found:
        verify_op(registered(annotation, function), args)
    assert all(line.startswith("operator ") for line in str(found.value).splitlines())


def test_each_split_that_fails_has_its_line_and_those_that_hold_have_none():
    softmax = registered("row column depth -> row column depth", lambda x: x.flatten(1).softmax(1).view_as(x))
    with pytest.raises(UserError) as found:
        verify_op(softmax, (torch.randn(2, 4, 6),))
    failing = [line.split("'")[3] for line in str(found.value).splitlines() if "output" in line]
    assert failing == ["column", "depth"]


def test_ways_with_communication_are_not_tried():
    query, key = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 4, 4)
    with pytest.raises(UserError, match="'b' has size 1 in the example"):
        verify_op(attention, (query, key, key))
    assert verify_op(attention, (query.repeat(2, 1, 1, 1), *[key.repeat(2, 1, 1, 1)] * 2)) == ["b", "k"]


def test_only_what_is_registered_can_be_tried():
    with pytest.raises(UserError, match="relu is no registered operator"):
        verify_op(torch.relu, (X,))


@pytest.mark.parametrize("seed", [9, 10])  # with which the sum of products nearly vanishes
def test_a_gradient_in_fp64_that_is_summed_in_fp32_is_as_exact_as_fp32(seed):
    scaled = registered("row, () -> row", lambda x, scale: x * scale)
    torch.manual_seed(seed)
    assert verify_op(scaled, (torch.randn(4096), torch.tensor(2.0, dtype=torch.float64))) == ["row"]


def test_parts_are_compared_with_the_whole_by_hand():
    x, number = torch.tensor([4.0, 2.0]), torch.tensor([3, 5], dtype=torch.int32)
    distance = verify._distance
    assert distance([x[:1], x[1:] + 1], Shard(0), x) == 0.25, "of the largest element"
    assert distance([x / 4, x / 4], PARTIAL, x) == distance([x / 4, x / 4], SHARED, x) == 0.5
    assert distance([x, x + 2], REPLICATE, x) == 0.5, "the farthest"
    assert distance([number - 1, number * 0 + 1], PARTIAL, number) == 0, "sums stay in their type"
    assert distance([x.double()], REPLICATE, x) == distance([x[:1]], REPLICATE, x) == float("inf")
    small, nan = torch.tensor([1e-3, float("nan")]), float("nan")
    assert distance([torch.tensor([2e-3, nan])], REPLICATE, small) == pytest.approx(1), "what is no number is not large"
    assert distance([torch.tensor([nan, nan])], REPLICATE, small) == float("inf")
    assert distance([x * 0 + 1], REPLICATE, x * 0) == 1, "of zeros, the difference itself"

    def said(parts: list[Tensor | None], whole: Tensor | None) -> list[str]:
        return list(verify._compared("it", parts, REPLICATE, whole, 1e-4))

    assert said([x, None], x) == said([None, None], x) == ["it is missing on a device"]
    assert said([x, x], None) == said([x, None], None) == ["it is missing for the whole"]
    assert said([None, None], None) == said([x, x + 1e-4], x) == []
    assert said([x, x + 1], x) == ["it differs from that of the whole by 0.25 of its largest element"]
