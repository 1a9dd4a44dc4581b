"""Computing in pieces: the same results and gradients, with one piece's inner tensors at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler.recompute.wrappers import recompute
from nnscaler.runtime.pieces import in_pieces

ROWS, WIDTH, INNER = 24, 8, 40


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    inner = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return x + F.linear(inner, down), inner.sum(-1)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, ROWS, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results[0].square().mean() + results[1].square().sum(), inputs)


def test_results_and_gradients_are_those_of_the_whole() -> None:
    inputs = tensors(torch.float32)
    inputs[2] = inputs[2].detach()  # a frozen weight
    trained = [inputs[0], inputs[1], inputs[3]]
    wanted = mlp(*inputs)
    for count in (1, 2, 3, 8):
        found = in_pieces(mlp, count, (1, None, None, None), (1, 1), None, *inputs)
        for ours, right in zip([*found, *gradients(found, trained)], [*wanted, *gradients(wanted, trained)]):
            assert (ours - right).norm() <= 1e-6 * right.norm()
        wanted = mlp(*inputs)


def test_arguments_that_are_no_tensors_and_results_in_another_order_of_dimensions() -> None:
    """A number, None and a text go to every piece; a result lies in memory as its pieces do."""
    x, w = torch.rand(6, 4, requires_grad=True), torch.rand(4, 5, requires_grad=True)

    def scaled(scale: float, x: Tensor, bias: Tensor | None, w: Tensor, how: str) -> tuple[Tensor, Tensor]:
        assert (bias, how) == (None, "transposed")
        return (scale * x @ w).t(), x.exp()

    found = in_pieces(scaled, 3, (None, 0, None, None, None), (1, 0), None, 2.5, x, None, w, "transposed")
    wanted = scaled(2.5, x, None, w, "transposed")
    for mine, right in zip(found, wanted):
        torch.testing.assert_close(mine, right)
        assert mine.stride() == right.stride()
    incoming = [torch.rand_like(one) for one in wanted]
    for mine, right in zip(torch.autograd.grad(found, (x, w), incoming), torch.autograd.grad(wanted, (x, w), incoming)):
        torch.testing.assert_close(mine, right)


def test_a_second_backward_gives_the_same_gradients() -> None:
    inputs = tensors(torch.float32)
    first, second = in_pieces(mlp, 3, (1, None, None, None), (1, 1), None, *inputs)
    loss = first.square().mean() + second.square().sum()
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, once, again))


HEADS = 4


def heads(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads that share the tokens, and have rows of weights of their own."""
    parts = (F.linear(x, weight).unflatten(2, (-1, WIDTH)).transpose(1, 2) for weight in (query, key, value))
    return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)


def heads_by_tokens(x: Tensor, *weights: Tensor) -> Tensor:
    def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight).unflatten(2, (-1, WIDTH)).transpose(1, 2) for weight in weights)

    parts = in_pieces(products, 3, (1, None, None, None), (2, 2, 2), None, x, *weights)
    return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)


def test_heads_at_a_time_and_of_these_some_tokens() -> None:
    x, first, second, _ = (tensor.detach() for tensor in tensors(torch.float32))
    weights = [weight[: HEADS * WIDTH] for weight in (0.2 * first, 0.2 * second, first + second)]
    inputs = [tensor.requires_grad_() for tensor in (x, *weights)]
    upstream = torch.randn(2, ROWS, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = heads(*inputs)
    right = torch.autograd.grad(wanted, inputs, upstream)
    for function in (heads, heads_by_tokens):
        for count in (2, HEADS):
            found = in_pieces(function, count, ("sum", 0, 0, 0), (2,), None, *inputs)
            for ours, theirs in zip([found, *torch.autograd.grad(found, inputs, upstream)], [wanted, *right]):
                assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("count", [2, 3])
def test_a_piece_has_a_part_of_each_block(count) -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(24, 8), torch.randn(24)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    seen: list[list[int]] = []

    def product(numbers: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append(numbers.tolist())
        return torch.tanh(F.linear(x, weight, bias)).t()  # joined along its first dimension, which lies last in memory

    numbers, upstream = torch.arange(24), torch.randn(24, 5)
    wanted = product(numbers, *inputs)
    right = torch.autograd.grad(wanted, inputs, upstream)
    seen.clear()
    found = in_pieces(product, count, ((0, 4), "sum", (0, 4), (0, 4)), ((0, 4),), None, numbers, *inputs)
    size = 6 // count
    assert seen == [[6 * block + place for block in range(4) for place in range(size * piece, size * (piece + 1))]
                    for piece in range(count)]  # fmt: skip
    assert found.stride() == wanted.stride()
    for ours, theirs in zip([found, *torch.autograd.grad(found, inputs, upstream)], [wanted, *right]):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_what_waits_is_settled_before_the_first_piece_of_backward() -> None:
    order: list[str] = []
    x = torch.randn(4, 2, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        order.append("piece")
        return x * 2

    found = in_pieces(function, 2, (0,), (0,), lambda: order.append("settle"), x)
    found.sum().backward()
    assert order == ["piece", "piece", "settle", "piece", "piece"]


def test_a_sum_in_its_own_type_changes_no_gradient_that_is_given() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    given = torch.randn(3, 8)
    kept = given.clone()
    in_pieces(lambda x: x.view(3, 4), 2, ("sum",), (1,), None, x).backward(given)
    assert torch.equal(given, kept)
    assert x.grad is not None
    assert torch.equal(x.grad, kept[:, :4] + kept[:, 4:])


def test_gradients_of_weights_are_added_up_in_fp32() -> None:
    inputs = tensors(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = gradients(mlp(*exact), exact)
    plain = gradients(mlp(*inputs), inputs)
    ours = gradients(in_pieces(mlp, ROWS, (1, None, None, None), (1, 1), None, *inputs), inputs)
    for index in (1, 2, 3):
        error, allowed = ((found[index] - right[index]).norm() for found in (ours, plain))
        assert error < 1.5 * allowed


def test_inner_tensors_are_as_large_as_a_piece() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and INNER in result.shape and WIDTH not in result.shape:
                self.size = max(self.size, result.numel())
            return result

    inputs = tensors(torch.float32)
    with Largest() as largest:
        gradients(in_pieces(mlp, 4, (1, None, None, None), (1, 1), None, *inputs), inputs)
    assert largest.size == 2 * ROWS * INNER // 4


def test_a_checkpoint_around_it_computes_no_piece_in_vain() -> None:
    calls = 0

    def counted(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return mlp(*inputs)

    def layer(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return in_pieces(counted, 4, (1, None, None, None), (1, 1), None, torch.tanh(x), *weights)

    inputs = tensors(torch.float32)
    wanted = gradients(mlp(torch.tanh(inputs[0]), *inputs[1:]), inputs)
    for ours, right in zip(gradients(recompute(layer, *inputs), inputs), wanted):
        assert (ours - right).norm() <= 1e-6 * right.norm()
    assert calls == 8, "four pieces in forward, and four for their gradients"


def test_what_needs_no_gradient_gets_none_and_what_backward_does_not_read_is_free() -> None:
    needed: list[bool] = []
    result: list[weakref.ref[Tensor]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            assert result[-1]() is None
            return gradient

    def rotated(x: Tensor, cosine: Tensor) -> Tensor:
        needed.append(cosine.requires_grad)
        made = Watched.apply(x) * cosine
        result.append(weakref.ref(made))
        return made

    x, cosine = torch.ones(8, 2, requires_grad=True), torch.ones(8, 2)
    recompute(lambda *inputs: in_pieces(rotated, 2, (0, 0), (0,), None, *inputs), x, cosine).sum().backward()
    assert len(needed) == 4
    assert not any(needed)


def test_more_terms_than_bf16_counts_are_added_up() -> None:
    rows = 1000  # a sum in bf16 stays at 256, to which 1 adds nothing
    x = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    in_pieces(F.linear, rows, (0, None), (0,), None, x, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == rows
