"""The collectives that generated code calls. Each is a function of a tensor, with the backward that belongs to it.

`axis` is the mesh axis whose devices take part, and `dim` a dimension of the tensor. Shards are equal, contiguous, and
in the order of the ranks on the axis. Placements are written as in `nnscaler.placement`: S(dim), R, R*, P. Where more
than one gradient is possible, `backward` names what backward does. It depends on whether a device has the whole
gradient of a whole tensor (R), or a term of it (R*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.kernels import note_copy
from nnscaler.runtime.axis import Axis
from nnscaler.sums import IN_FP32, GradientSum

# Renamed in torch 2.13; the old names still work there, with a warning.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, axis: Axis, backward: str) -> Tensor:
    """P -> R (`backward="identity"`) or P -> R* (`"all_reduce"`): the sum of the devices' terms."""
    return _Collective.apply(x, axis, _sum, _FUNCTIONS[backward], (), ())


def share(x: Tensor, axis: Axis) -> Tensor:
    """R -> R*: the same tensor; its gradient is the sum of the devices' terms."""
    return _Collective.apply(x, axis, _identity, _sum, (), ())


def divide(x: Tensor, axis: Axis) -> Tensor:
    """R* -> R: the same tensor; every device has the whole gradient, and divides it by their number."""
    return _Collective.apply(x, axis, _identity, _divided, (), ())


def all_gather(x: Tensor, axis: Axis, dim: int, backward: str) -> Tensor:
    """S(dim) -> R (`backward="slice"`) or S(dim) -> R* (`"reduce_scatter"`): the whole tensor."""
    return _Collective.apply(x, axis, _gathered, _FUNCTIONS[backward], (dim,), (dim,))


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """P -> S(dim): this device's slice of the sum of the devices' terms."""
    return _Collective.apply(x, axis, _scattered, _gathered, (dim,), (dim,))


def slice_(x: Tensor, axis: Axis, dim: int, backward: str) -> Tensor:
    """R -> S(dim) (`backward="all_gather"`) or R* -> S(dim) (`"pad"`): this device's slice."""
    return _Collective.apply(x, axis, _sliced, _FUNCTIONS[backward], (dim,), (dim,))


def all_to_all(x: Tensor, axis: Axis, source: int, target: int) -> Tensor:
    """S(source) -> S(target): whole along `source`, and this device's slice along `target`."""
    return _Collective.apply(x, axis, _exchanged, _exchanged, (source, target), (target, source))


def deal(x: Tensor, axis: Axis, dim: int, owners: Sequence[int]) -> Tensor:
    """The pieces along `dim` that this device owns, in order.

    All pieces are equally long, and `owners` names the device of each. Every device has as many of them in `x`, one
    after the other, as it owns.
    """
    return _Collective.apply(x, axis, _dealt, _collected, (dim, owners), (dim, owners))


def collect(x: Tensor, axis: Axis, dim: int, owners: Sequence[int]) -> Tensor:
    """The inverse of `deal`."""
    return _Collective.apply(x, axis, _collected, _dealt, (dim, owners), (dim, owners))


def exchange_rows(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    """The rows that the devices send to this one, in the order of the devices: `received` of each, of which the first
    dimension is made. `sent` says how many of its own rows, in order, a device sends to each."""
    if not x.is_floating_point():
        return _rows_exchanged(x, axis, sent, received)
    return _Collective.apply(x, axis, _rows_exchanged, _rows_exchanged, (sent, received), (received, sent))


class _Collective(torch.autograd.Function):
    """Runs one function in forward and another in backward, each over the axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, forward: Any, backward: Any, arguments: Any, backward_arguments: Any
    ) -> Tensor:
        ctx.backward_call = (backward, axis, backward_arguments)
        return forward(x, axis, *arguments) if axis.group is not None else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        function, axis, arguments = ctx.backward_call
        result = function(gradient, axis, *arguments) if axis.group is not None else gradient
        return (result, None, None, None, None, None)


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, axis: Axis) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=axis.group)
    return result


def _divided(x: Tensor, axis: Axis) -> Tensor:
    return x / axis.size


def start_gather(x: Tensor, axis: Axis, dtype: torch.dtype | None = None) -> tuple[Tensor, dist.Work | None]:
    """Starts gathering all shards: ([n, *shape], work); the tensor is complete once the work is.

    dtype  to which they are cast before; None: they are not
    """
    result = x.new_empty((axis.size, *x.shape), dtype=dtype)
    x = x.contiguous() if x.dtype == result.dtype else result[axis.rank].copy_(x)  # sent from where it belongs
    return result, all_gather_single(result.flatten(0, 1) if x.dim() else result, x, group=axis.group, async_op=True)


def finish_gather(shards: Tensor, work: dist.Work | None, dim: int) -> Tensor:
    """The whole tensor, from its shards along `dim` that were gathered."""
    if work is not None:
        work.wait()
    return _merge(shards, dim)


class Waited(Protocol):
    """What is under way, and done once it is waited for, by what is computed next."""

    def wait(self) -> Any: ...


def start_gradient_scatter(x: Tensor, axis: Axis, dim: int, sums: GradientSum) -> tuple[Tensor, Waited | None]:
    """Starts adding up the devices' terms of a gradient: (this device's slice of the sum along `dim`, what it waits
    for). The sum is in fp32, or a wider type that the terms have."""
    parts = _divide(x.to(sums.dtype(x.dtype)), axis.size, dim)
    result = parts.new_empty(parts.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    return result, start_gradient_sum(result.view(-1), parts.view(-1), axis.group, sums)


def start_gradient_sum(
    result: Tensor, terms: Tensor, group: dist.ProcessGroup | None, sums: GradientSum
) -> Waited | None:
    """Starts adding up the devices' terms [devices * n] of a gradient. Once waited for, `result` [n] is this device's
    slice of the sum."""
    terms = terms.to(sums.dtype(terms.dtype))
    if sums == IN_FP32:
        return reduce_scatter_single(result, terms, group=group, async_op=True)
    if sums.collective == "all_to_all":
        received = torch.empty_like(terms)
        work = dist.all_to_all_single(received, terms, group=group, async_op=True)
    else:
        received = terms.new_empty(len(result))
        work = reduce_scatter_single(received, terms, group=group, async_op=True)
    return _Received(result, received, terms, work)


@dataclass(frozen=True)
class _Received:
    """Terms on their way, of another type than their sum."""

    result: Tensor
    received: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        torch.sum(self.received.view(-1, len(self.result)), 0, dtype=self.result.dtype, out=self.result)


def _gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return finish_gather(*start_gather(x, axis), dim)


def _scattered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    parts = _divide(x, axis.size, dim)
    result = torch.empty_like(parts[0])
    reduce_scatter_single(result, parts.flatten(0, 1), group=axis.group)
    return result


def _sliced(x: Tensor, axis: Axis, dim: int) -> Tensor:
    # A copy: a view would keep the whole tensor alive.
    mine = x.chunk(axis.size, dim)[axis.rank]
    copy = mine.clone(memory_format=torch.contiguous_format)
    return copy if x.is_floating_point() else note_copy(copy, mine)


def _padded(x: Tensor, axis: Axis, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= axis.size
    result = x.new_zeros(shape)
    result.chunk(axis.size, dim)[axis.rank].copy_(x)
    return result


def _exchanged(x: Tensor, axis: Axis, source: int, target: int) -> Tensor:
    parts = _divide(x, axis.size, target)
    result = torch.empty_like(parts)
    dist.all_to_all_single(result, parts, group=axis.group)
    return _merge(result, source)


def _dealt(x: Tensor, axis: Axis, dim: int, owners: Sequence[int]) -> Tensor:
    return _exchange_pieces(x, axis, dim, *_ways(axis, owners))


def _collected(x: Tensor, axis: Axis, dim: int, owners: Sequence[int]) -> Tensor:
    targets, sources = _ways(axis, owners)
    return _exchange_pieces(x, axis, dim, sources, targets)


def _ways(axis: Axis, owners: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where the pieces go that lie here, and where those come from that this device owns."""
    each = len(owners) // axis.size
    here = owners[axis.rank * each : (axis.rank + 1) * each]
    return list(here), [piece // each for piece, owner in enumerate(owners) if owner == axis.rank]


def _exchange_pieces(x: Tensor, axis: Axis, dim: int, targets: list[int], sources: list[int]) -> Tensor:
    """Sends the equal pieces of `x` to the devices `targets`, and joins those that the devices `sources` send. What one
    device sends to another stays in order."""
    parts = _divide(x, len(targets), dim)
    # all_to_all takes what it sends, and gives what it receives, in the order of the devices.
    sent, received = (sorted(range(len(ranks)), key=lambda i: ranks[i]) for ranks in (targets, sources))
    result = torch.empty_like(parts)
    receives, sends = ([ranks.count(rank) for rank in range(axis.size)] for ranks in (sources, targets))
    dist.all_to_all_single(result, parts[sent], receives, sends, group=axis.group)
    return _merge(result[[received.index(i) for i in range(len(sources))]], dim)


def _rows_exchanged(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=axis.group)
    return result


def _divide(x: Tensor, count: int, dim: int) -> Tensor:
    """[count, *slice]: the equal slices of `x` along `dim`, contiguous in memory."""
    return x.unflatten(dim, (count, x.shape[dim] // count)).movedim(dim, 0).contiguous()


def _merge(parts: Tensor, dim: int) -> Tensor:
    """The tensor whose slices along `dim` are parts[0], parts[1], ..."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)


_FUNCTIONS = {
    "identity": _identity,
    "all_reduce": _sum,
    "slice": _sliced,
    "reduce_scatter": _scattered,
    "all_gather": _gathered,
    "pad": _padded,
}
