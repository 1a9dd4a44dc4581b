"""The experts of a mixture: each token's row goes through a few of many small MLPs, which its router has chosen.

Rows are sorted by their experts, so that those of each expert lie together. The products of all experts are then one
call: `torch._grouped_mm` where the device has it, or one product after the other. For backward, only the inputs and the
result of the first product are kept; backward gathers the rows, and computes the gate, again.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNED = 16  # bytes: what the grouped product wants rows to be a multiple of
_ONES = 8  # columns of ones, as many as make such a row


counting: ContextVar[Callable[[Tensor, int], None] | None] = ContextVar("counting", default=None)
"""Set while somebody wants to know which experts are chosen."""


def note_choice(chosen: Tensor, experts: int) -> None:
    """Says that of so many experts those at [t, k] are chosen."""
    if (count := counting.get()) is not None:
        count(chosen, experts)


def mix(
    hidden: Tensor,
    chosen: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    gate: Callable[[Tensor], Tensor],
    present: int | None = None,
) -> Tensor:
    """The weighted sum of each token's chosen experts:

        y[t] = sum_j scores[t, j] gate(hidden[t] up[e] + up_bias[e]) down[e]    with e = chosen[t, j]

    hidden   [t, d]
    chosen   [t, k] int64; an expert that is not among the n given counts for nothing: it is written as n
    scores   [t, k], of any float type
    up       [n, d, i], up_bias [n, i] or None, down [n, f, d], in any order of memory
    gate     [rows, i] -> [rows, f], row by row
    present  how many of `chosen` are among the n experts; None: all

    Returns [t, d] in the type of `hidden`; products are summed over j in fp32.
    """
    return _Mixture.apply(hidden, chosen, scores, up, down, up_bias, gate, present)


def kept_bytes(tokens: int, choices: int, width: int, itemsize: int) -> int:
    """Bytes that backward keeps of `mix` besides its inputs: the result of the first product, and the order of rows."""
    return tokens * choices * (width * itemsize + 2 * 8)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor, bias: Tensor | None,
        gate: Callable[[Tensor], Tensor], present: int | None,
    ) -> Tensor:  # fmt: skip
        if hidden.is_meta:
            return torch.empty_like(hidden)
        choices = chosen.shape[1]
        experts, order = chosen.flatten().sort(stable=True)
        rows = len(order) if present is None else present
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        experts, order = experts[:rows], order[:rows]
        numbers = torch.arange(len(up), device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        before = products(hidden[order // choices], up, ends)
        if bias is not None:
            before += bias[experts]
        after = products(gate(before), down, ends) * scores.flatten()[order].unsqueeze(1)
        ctx.save_for_backward(hidden, scores, up, down, bias, before, order, place.view(chosen.shape), ends)
        ctx.gate = gate
        return sum_of_rows(after, place.view(chosen.shape)).to(hidden.dtype)  # rounded once, as transformers does

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, scores, up, down, bias, before, order, place, ends = ctx.saved_tensors
        of_hidden, _, of_scores, of_up, of_down, of_bias, _, _ = ctx.needs_input_grad
        token = order // place.shape[1]
        incoming = gradient[token]
        score = scores.flatten()[order].unsqueeze(1)
        before = before.detach().requires_grad_()
        with torch.enable_grad():
            gated = ctx.gate(before.view_as(before))  # hooks of modules want no leaf
        found: list[Tensor | None] = [None] * 8
        if of_down:
            weighted = (gated.detach() * score).to(gated.dtype)
            found[4] = outer_products(weighted, incoming, ends, like=down)
        if not (of_hidden or of_scores or of_up or of_bias):
            return tuple(found)
        unweighted = products(incoming, down.transpose(1, 2), ends)
        if of_scores:
            each = (unweighted.to(_wide(unweighted)) * gated.detach()).sum(1).to(scores.dtype)
            found[2] = scores.new_zeros(scores.numel()).index_put((order,), each).view(scores.shape)
        if of_hidden or of_up or of_bias:
            (inner,) = torch.autograd.grad(gated, before, (unweighted * score).to(gated.dtype))
            if of_up:
                found[3] = outer_products(hidden[token], inner, ends, like=up)
            if of_bias:
                found[5] = _sums(inner, ends).to(bias.dtype)
            if of_hidden:
                found[0] = sum_of_rows(products(inner, up.transpose(1, 2), ends), place)
        return tuple(found)


def products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[r, i] x [n, i, o] -> [r, o]: rows ends[m - 1] .. ends[m] (int32 [n]) by the m-th matrix."""
    if _grouped(rows, weights, rows.stride(0), rows.shape[1], weights.shape[2]):
        return torch._grouped_mm(rows, weights, offs=ends)
    result = rows.new_empty(len(rows), weights.shape[2])
    for number, (begin, end) in enumerate(_ranges(ends)):
        torch.mm(rows[begin:end], weights[number], out=result[begin:end])
    return result


def outer_products(left: Tensor, right: Tensor, ends: Tensor, like: Tensor) -> Tensor:
    """[r, i] x [r, o] -> [n, i, o]: the m-th matrix is that of rows ends[m - 1] .. ends[m], transposed, by the same
    rows of `right`. It lies in memory in the order of `like`."""
    if like.stride(2) != 1:
        return outer_products(right, left, ends, like.transpose(1, 2)).transpose(1, 2)
    if _grouped(left, right, left.shape[1], right.shape[1]):
        result = torch._grouped_mm(left.t(), right, offs=ends)
        # Of no rows the sum is zero, which the kernel need not write.
        return result.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1), 0)
    result = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for number, (begin, end) in enumerate(_ranges(ends)):
        torch.mm(left[begin:end].t(), right[begin:end], out=result[number])
    return result


def _grouped(left: Tensor, right: Tensor, *widths: int) -> bool:
    """Whether the device has a grouped product for these tensors."""
    if not (left.is_cuda and left.dtype == right.dtype == torch.bfloat16 and len(left)):
        return False
    return all(width * left.itemsize % _ALIGNED == 0 for width in widths)


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    """Where the rows of each expert begin and end."""
    last = ends.tolist()
    return list(zip([0, *last], last))


def sum_of_rows(rows: Tensor, place: Tensor) -> Tensor:
    """[r, d] -> [t, d]: row t is the sum of rows place[t, 0], place[t, 1], ...; a place of r or more is empty.

    One choice is added after the other, so that the order of the sum is always the same.
    """
    total = torch.zeros(len(place), rows.shape[1], dtype=_wide(rows), device=rows.device)
    if not len(rows):
        return total.to(rows.dtype)
    for at in place.unbind(1):
        if len(rows) == place.numel():
            total += rows[at]
        else:
            total += torch.where((at < len(rows)).unsqueeze(1), rows[at.clamp(max=len(rows) - 1)], 0)
    return total.to(rows.dtype)


def _sums(rows: Tensor, ends: Tensor) -> Tensor:
    """[r, i] -> [n, i]: the sum of each expert's rows."""
    if rows.is_cuda:  # a product, for adding rows up by index gives another rounding each time
        ones = rows.new_ones(len(rows), _ONES)
        return outer_products(ones, rows, ends, like=rows.new_empty(1, _ONES, rows.shape[1]))[:, 0]
    return torch.stack([rows[begin:end].sum(0) for begin, end in _ranges(ends)])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def gate_named(name: str, constants: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The gate of this name: a method `(self, [rows, i]) -> [rows, f]` of a model's class, or a function.

    name       `module:Class.method` or `module:function`
    constants  what the gate reads of `self`: numbers, activations by their names in transformers, and modules without
               tensors. Such a module is what it holds, and its class, which is called `class`
    """
    return _gate(name, _frozen(constants))


@functools.cache
def _gate(name: str, constants: tuple[tuple[str, Any], ...]) -> Callable[[Tensor], Tensor]:
    return functools.partial(_named(name), SimpleNamespace(**{key: _made(value) for key, value in constants}))


def _frozen(constants: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, _frozen(value) if isinstance(value, Mapping) else value) for key, value in constants.items())


def _made(value: Any) -> Any:
    """What stands for a constant: an activation, a module, or itself."""
    from transformers.activations import ACT2FN

    if isinstance(value, str):
        return ACT2FN[value]
    if not isinstance(value, tuple):
        return value
    held = dict(value)
    kind = _named(held.pop("class"))
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, item in held.items():
        setattr(module, name, _made(item))
    return module


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))
