"""Experts that are divided over devices: tokens are sent to the devices of the experts that they chose, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.kernels import gate_named, mix, note_choice, sum_of_rows
from nnscaler.operators.experts import as_matrices
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.collectives import exchange_rows


def experts_along_t_n(
    axis: Axis,
    hidden: Tensor,
    chosen: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gate: str,
    constants: Mapping[str, Any],
) -> Tensor:
    """`experts` of this device's tokens. Each device has an equal part of all experts, in order.

    A token's row is sent once to each device that has experts of its choice, with their numbers and scores. What comes
    back is the sum of these experts. As much is sent as there is: no token is dropped, and no row is padded.
    """
    here = len(up)
    note_choice(chosen, here * axis.size)
    owner = chosen // here
    reached = torch.zeros(len(hidden), axis.size, dtype=torch.bool, device=hidden.device).scatter_(1, owner, True)
    device, token = reached.t().nonzero(as_tuple=True)  # the rows that are sent, by where they go
    place = torch.full(reached.shape, len(token), device=token.device)
    place[token, device] = torch.arange(len(token), device=token.device)
    there = owner[token] == device.unsqueeze(1)  # of the choices of a row that is sent, those of experts there
    counts = torch.stack([reached.sum(0), _occurrences(owner, axis.size)], 1)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=axis.group)
    (sent, _), (received, present) = torch.stack([counts, theirs]).transpose(1, 2).tolist()
    found = mix(
        exchange_rows(_Rows.apply(hidden, token, place, True), axis, sent, received),
        exchange_rows(torch.where(there, chosen[token] % here, here), axis, sent, received),
        exchange_rows(torch.where(there, scores[token], 0), axis, sent, received),
        *as_matrices(up, down, transposed),
        None if up_bias is None else up_bias.flatten(1),
        gate_named(gate, constants),
        sum(present),
    )
    return _Rows.apply(exchange_rows(found, axis, received, sent), token, place, False)


def _occurrences(numbers: Tensor, count: int) -> Tensor:
    """How often each of 0 ... count - 1 occurs."""
    flat = numbers.flatten()
    return torch.zeros(count, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


class _Rows(torch.autograd.Function):
    """Rows of tokens: the r-th is that of token[r]. Or, the other way, each token's sum of its rows, at `place`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, taken: bool) -> Tensor:
        ctx.save_for_backward(token, place)
        ctx.taken = taken
        return x[token] if taken else sum_of_rows(x, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        token, place = ctx.saved_tensors
        return sum_of_rows(gradient, place) if ctx.taken else gradient[token], None, None, None
