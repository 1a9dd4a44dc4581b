"""Computing a function piece by piece along a dimension, so that what it makes inside exists only a piece at a time.

Backward computes each piece again. A tensor that all pieces use whole, such as a weight, gets the sum of their
gradients. It is added up in fp32; or, where memory matters more, in the gradient's own type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Along = int | tuple[int, int]  # a dimension; or that, and a number of blocks
Split = Along | Literal["sum"] | None


def in_pieces(
    function: Callable[..., Any],
    count: int,
    split: Sequence[Split],
    joined: Sequence[Along],
    settle: Callable[[], None] | None,
    *args: Any,
) -> Any:
    """`function(*args)`, computed in `count` pieces, one after the other.

    split   for each argument, the dimension along which it is divided. With a number of blocks beside it, the dimension
            has so many equal blocks, and each piece gets its part of each of them. None: each piece gets the whole, and
            gradients of pieces are added up in fp32; "sum": likewise, and added up in their own type
    joined  for each result, the dimension along which the pieces' results are joined, or that and a number of blocks
    settle  called when backward begins, before its first piece, so that what waits takes no memory beside them

    Example: `in_pieces(torch.mm, 4, (0, None), (0,), None, x, w)` is `torch.mm(x, w)`, a quarter of the rows at a time.
    """
    kept: list[Any] = []
    arguments = _KeptArguments.apply(kept, *args)
    results = _Pieces.apply(function, count, tuple(split), tuple(joined), settle, kept, *arguments)
    return results if len(joined) > 1 else results[0]


class _KeptArguments(torch.autograd.Function):
    """Keeps the arguments for backward, before anything is computed from them.

    A checkpoint around all this computes again only until it has what was kept: so it stops here.
    """

    @staticmethod
    def forward(ctx: Any, kept: list[Any], *args: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(arg for arg in args if isinstance(arg, Tensor) and not arg.requires_grad))
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in args))
        kept.append(ctx)
        return args

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *gradients)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Any,
        count: int,
        split: tuple[Split, ...],
        joined: tuple[Along, ...],
        settle: Callable[[], None] | None,
        kept: list[Any],
        *args: Any,
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.count, ctx.split, ctx.joined, ctx.kept = function, count, split, joined, kept
        ctx.settle = settle
        results: list[Tensor] = []
        for piece in range(count):
            made = _tuple(function(*_parts(args, split, count, piece)))
            results = results or [_whole(part, dim, count) for part, dim in zip(made, joined, strict=True)]
            for result, part, dim in zip(results, made, joined):
                _put(part, result, dim, count, piece)
            del made
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if ctx.settle is not None:
            ctx.settle()
        (kept,) = ctx.kept
        args = [other if saved is None else saved for saved, other in zip(kept.saved_tensors, kept.others, strict=True)]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[6:]) if needed]
        sums: list[Tensor | None] = [None] * len(args)
        for piece in range(ctx.count):
            given = [_part(gradient, dim, ctx.count, piece) for gradient, dim in zip(gradients, ctx.joined)]
            found = _gradients(ctx.function, _parts(args, ctx.split, ctx.count, piece), wanted, given)
            for index in reversed(wanted):
                sums[index] = _add(sums[index], found.pop(), ctx.split[index], ctx.count, piece)
        return (None, None, None, None, None, None, *sums)


def _gradients(function: Any, inputs: list[Any], wanted: list[int], given: list[Tensor]) -> list[Tensor]:
    """The gradients of some inputs, where `given` are those of the results."""
    for index in wanted:
        inputs[index] = inputs[index].detach().requires_grad_()
    with torch.enable_grad():
        made = _tuple(function(*inputs))
    outputs, gradients = zip(*((get_gradient_edge(part), one) for part, one in zip(made, given) if part.requires_grad))
    del made  # what backward does not read is free
    return list(torch.autograd.grad(outputs, [inputs[index] for index in wanted], gradients))


def _add(total: Tensor | None, gradient: Tensor, how: Split, count: int, piece: int) -> Tensor:
    """The gradient of a whole argument, after that of one more piece has been added."""
    if isinstance(how, (int, tuple)):
        total = _whole(gradient, how, count) if total is None else total
        _put(gradient, total, how, count, piece)
        return total
    if total is None:
        dtype = gradient.dtype if how == "sum" else torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(dtype, copy=True)  # what is given may be a part of another gradient
    return total.add_(gradient)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _parts(args: Sequence[Any], split: Sequence[Split], count: int, piece: int) -> list[Any]:
    return [
        _part(arg, how, count, piece) if isinstance(how, (int, tuple)) else arg
        for arg, how in zip(args, split, strict=True)
    ]


def _part(whole: Tensor, along: Along, count: int, piece: int) -> Tensor:
    """A piece of a tensor: a view, or, of several blocks, a copy."""
    dim, _ = _dim_and_blocks(along)
    return _in_blocks(whole, along, count, piece).flatten(dim, dim + 1)


def _put(part: Tensor, whole: Tensor, along: Along, count: int, piece: int) -> None:
    """Writes a piece of a tensor to its place."""
    dim, blocks = _dim_and_blocks(along)
    _in_blocks(whole, along, count, piece).copy_(part.unflatten(dim, (blocks, -1)))


def _in_blocks(whole: Tensor, along: Along, count: int, piece: int) -> Tensor:
    """A view of a piece, with a dimension for blocks before the divided one."""
    dim, blocks = _dim_and_blocks(along)
    return whole.unflatten(dim, (blocks, count, -1)).select(dim + 1, piece)


def _dim_and_blocks(along: Along) -> tuple[int, int]:
    return along if isinstance(along, tuple) else (along, 1)


def _whole(part: Tensor, along: Along, count: int) -> Tensor:
    """An empty tensor with room for all pieces. Its dimensions lie in memory in the same order as those of a piece."""
    dim, _ = _dim_and_blocks(along)
    shape = list(part.shape)
    shape[dim] *= count
    order = sorted(range(part.dim()), key=part.stride, reverse=True)
    return torch.empty_permuted(shape, order, dtype=part.dtype, device=part.device)
