"""Weights that are stored in shards, and gathered for use (ZeRO-3).

The weights of a block are gathered just before the block uses them. After the first micro-batch the order of the
gathers is known. From then on, the next ones are started early, and run beside the computation. Where the shard is the
fp32 master weight, it is cast into the buffer of its gather. A weight that only products in fp8 take is gathered in
fp8, half the bytes: each device rounds its shard, by the scale of the whole weight. Gradients are added up beside
backward, those of a shard where it is stored.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.kernels import fp8
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.collectives import Waited, finish_gather, start_gather, start_gradient_scatter
from nnscaler.sizes import PREFETCH_BYTES
from nnscaler.sums import IN_FP32, GradientSum

ShardedAlong = tuple[Axis, int]  # the mesh axis over which a tensor is sharded, and its sharded dimension
Defer = Callable[[Tensor, Waited | None, Tensor], None]  # defer(parameter, the exchange, its result)
AwaitUpdate = Callable[[Tensor], None]  # wait(parameter): what is computed next comes after its update


class Rounding(Protocol):
    """Rounds shards to fp8."""

    def scale(self, parameter: Tensor) -> Tensor:
        """The scale [] of the whole weight."""

    def rounded(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The shard in fp8, of a weight in this type."""


@dataclass(frozen=True, eq=False)
class _Sharded:
    """A weight that is gathered from shards.

    shard      this device's shard
    shardings  (axis, dimension), ..., in the order in which they are gathered
    dtype      of the whole weight, as it is used
    rounding   rounds it to fp8 for its gather; None: it is not
    """

    shard: Tensor
    shardings: Sequence[ShardedAlong]
    dtype: torch.dtype
    rounding: Rounding | None = None

    @property
    def bytes(self) -> int:
        """Of the whole weight, as it is gathered."""
        itemsize = self.dtype.itemsize if self.rounding is None else fp8.E4M3.itemsize
        return self.shard.numel() * itemsize * prod(axis.size for axis, _ in self.shardings)


@dataclass(eq=False)
class _Gather:
    """How a weight is gathered.

    wait     makes what is computed next come after the update of a parameter
    started  the result of the first gather, and its work, once it has been started
    """

    weight: _Sharded
    wait: AwaitUpdate
    started: tuple[Tensor, dist.Work | None] | None = None

    def start(self) -> None:
        self.wait(self.weight.shard)
        axis, _ = self.weight.shardings[0]
        shard, dtype, rounding = self.weight.shard, self.weight.dtype, self.weight.rounding
        if rounding is None:
            self.started = start_gather(shard.detach(), axis, dtype)
        else:  # as bytes, which every backend knows
            self.started = start_gather(rounding.rounded(shard, dtype).view(torch.uint8), axis)

    def finish(self) -> Tensor:
        if self.started is None:
            self.start()
        assert self.started is not None
        (_, dim), *others = self.weight.shardings
        whole = finish_gather(*self.started, dim)
        self.started = None
        for axis, dim in others:
            whole = finish_gather(*start_gather(whole, axis), dim)
        return whole if self.weight.rounding is None else whole.view(fp8.E4M3)


class Gathers:
    """The gathers of one model, in the order in which a micro-batch needs them.

    defer   takes the gradient of a shard, whose exchange may still be under way
    wait    makes what is computed next come after the update of a shard
    sums    how gradients are added up
    settle  makes what is computed next come after all exchanges under way, and lets go of what these hold
    rounding  rounds the shards of weights that are gathered in fp8
    """

    def __init__(
        self,
        defer: Defer,
        wait: AwaitUpdate = lambda parameter: None,
        sums: GradientSum = IN_FP32,
        settle: Callable[[], None] = lambda: None,
        rounding: Rounding | None = None,
    ) -> None:
        self.defer, self.wait, self.sums, self.settle, self.rounding = defer, wait, sums, settle, rounding
        self._order: list[_Sharded] = []  # what was gathered in the last micro-batch
        self._next = 0  # place in the order of the next one that is needed
        self._early: deque[_Gather] = deque()  # those started from there on
        # address -> gathered weight that lies there, and how backward gathers it again, if it does
        self._alive: dict[int, tuple[_Gather | None, weakref.ref[Tensor]]] = {}
        self._again: weakref.WeakKeyDictionary[_Gather, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()

    def begin(self) -> None:
        """To be called when a micro-batch begins."""
        self._forget(self._next)
        self._next = 0

    def weight(
        self, parameter: Tensor, *shardings: ShardedAlong, dtype: torch.dtype | None = None, again: bool = False
    ) -> Tensor:
        """The whole weight of which `parameter` is this device's shard.

        shardings  (axis, dimension), ..., over which the weight is sharded, in the order in which it is gathered
        dtype      the type in which it is used; None: that of the shard
        again      whether backward gathers it once more, rather than keep it
        """
        weight = _Sharded(parameter, shardings, dtype or parameter.dtype)
        whole = _GatheredWeight.apply(parameter, self, weight)
        self._remember(whole, _Gather(weight, self.wait) if again else None)
        return whole

    def weight_in_fp8(
        self, parameter: Tensor, *shardings: ShardedAlong, dtype: torch.dtype | None = None, again: bool = False
    ) -> fp8.Weight:
        """The same, gathered in fp8, for products in fp8. `dtype`: the type that it has before, and its gradient."""
        assert self.rounding is not None
        weight = _Sharded(parameter, shardings, dtype or parameter.dtype, self.rounding)
        rows = self.take(weight)
        self._remember(rows, _Gather(weight, self.wait) if again else None)
        place = _GatheredWeight.apply(parameter, self, weight, rows.shape)
        self._remember(place, None)
        return fp8.Weight(place, self.rounding.scale(parameter), rows)

    def _remember(self, whole: Tensor, gather: _Gather | None) -> None:
        """Notes what is gathered, while it lives, and how backward gathers it again, if it does."""
        address = whole.untyped_storage().data_ptr()
        forget = lambda _: self._alive.pop(address, None)  # noqa: E731
        self._alive[address] = (gather, weakref.ref(whole, forget))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of a gathered weight."""
        return tensor.untyped_storage().data_ptr() in self._alive

    def take(self, weight: _Sharded) -> Tensor:
        """Gathers a weight, or waits for it where its gather was started early. Then starts the next ones."""
        at = self._next
        self._next += 1
        if at < len(self._order) and self._order[at].shard is not weight.shard:
            self._forget(at)  # the order is another one than last time
        if at == len(self._order):
            self._order.append(weight)
        whole = (self._early.popleft() if self._early else _Gather(weight, self.wait)).finish()
        while (following := self._next + len(self._early)) < len(self._order):
            gather = _Gather(self._order[following], self.wait)
            if sum(early.weight.bytes for early in self._early) + gather.weight.bytes > PREFETCH_BYTES:
                break
            gather.start()
            self._early.append(gather)
        return whole

    def _forget(self, place: int) -> None:
        """Forgets the order from `place` on: it is not what was expected."""
        del self._order[place:]
        while self._early:
            self._early.popleft().finish()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, autograd keeps of a weight with `again` only how to gather it."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps of a tensor: the tensor, or how to gather the weight in whose memory it lies."""
        gather, whole = self._alive.get(tensor.untyped_storage().data_ptr(), (None, None))
        if gather is None or whole is None or whole() is None:
            return tensor
        return gather, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor of which `pack` gave this."""
        if isinstance(packed, Tensor):
            return packed
        gather, size, stride, offset = packed
        known = self._again.get(gather)
        whole = None if known is None else known()
        if whole is None:
            whole = self.take(gather.weight)
            self._again[gather] = weakref.ref(whole)
        return whole.as_strided(size, stride, offset)


class _GatheredWeight(torch.autograd.Function):
    """The whole weight; or, where its shape is given, a place for its gradient, without memory."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, gathers: Gathers, weight: _Sharded, shape: torch.Size | None = None
    ) -> Tensor:
        ctx.gathers, ctx.weight = gathers, weight
        return gathers.take(weight) if shape is None else parameter.new_zeros((), dtype=weight.dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        work = None
        for axis, dim in reversed(ctx.weight.shardings):
            if work is not None:
                work.wait()
            gradient, work = start_gradient_scatter(gradient, axis, dim, ctx.gathers.sums)
        ctx.gathers.defer(ctx.weight.shard, work, gradient)
        return None, None, None, None
