"""Parameters in flat buffers, cut into buckets. A bucket is the unit in which gradients are exchanged and state is
sharded.

All parameters with the same owners (the ranks that hold the same shards) lie one after the other in one flat buffer.
Each owner has an equal slice of every bucket, which it updates: the optimizer's state is sharded (ZeRO-1).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler.kernels import add_gradient
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.collectives import Waited, all_gather_single, start_gradient_sum
from nnscaler.runtime.gradients import GradientOnHost, GradientSlots
from nnscaler.runtime.scales import Scales
from nnscaler.shards import Box, ParameterSpec, flat_range_boxes
from nnscaler.sizes import BUCKET_ELEMENTS, MOST_DEFERRED, MOST_IN_FLIGHT
from nnscaler.sums import IN_FP32, GradientSum

_ALIGNMENT = 64  # elements; keeps every parameter's first byte where kernels like it


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in a bucket.

    name   of the parameter
    box    the part of the whole tensor that this rank holds
    start  where its elements begin in the bucket; below 0 where it begins in the bucket before, for a bucket may be cut
           anywhere
    """

    name: str
    spec: ParameterSpec
    box: Box
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.box.sizes)

    def within(self, size: int) -> tuple[slice, slice]:
        """The elements of the parameter that a bucket of `size` has: (in the bucket, in the parameter)."""
        start, stop = max(self.start, 0), min(self.stop, size)
        return slice(start, stop), slice(start - self.start, stop - self.start)


@dataclass(frozen=True)
class OwnedPart:
    """A box of a whole parameter that this rank owns.

    start, stop  its range among the owned elements of its bucket
    """

    name: str
    spec: ParameterSpec
    box: Box
    start: int
    stop: int


class Bucket:
    """A range of a flat buffer of parameters.

    flat      [n]: the parameters, on every owner
    owned     [n / owners]: the slice of `flat` that this rank updates
    gradient  [n / owners]: the gradient of `owned`, summed over owners and micro-batches of the last whole step, in
              fp32; or in the type of `flat` where there is nothing to sum
    summed    [n]: the gradient of `flat`, summed over micro-batches, where it is exchanged once a step.
              `gradient` is a slice of it, to which the other owners' are added at the end of the step. None: the
              gradient is exchanged in each micro-batch.
    first     the place of its first parameter among all parameters of the model
    is_copy   whether another pipeline stage has the same parameters, and counts them as its own
    on_host   brings its gradient, which lies on the host, to the device; None: it lies on the device
    scales    finds the scales of what is gathered in fp8; None: nothing is
    version   how often `flat` has been updated, or changed otherwise

    An update may still be under way when the next forward begins: whatever reads `flat` must call `wait` first.
    """

    def __init__(
        self, flat: Tensor, slots: list[Slot], owners: Axis, first: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.flat, self.first, self.gradient_dtype = flat, first, dtype
        self.is_copy = False
        self.on_host: GradientOnHost | None = None
        self.scales: Scales | None = None
        self.version = 0
        self._updated: dist.Work | torch.cuda.Event | None = None
        self.slots = slots
        self.owners = owners
        self.device = flat.device
        self.owned = self.flat.chunk(owners.size)[owners.rank]
        self._sums = owners.group is None or slots[0].spec.exchanged_once

    @property
    def gradient_bytes(self) -> int:
        """Of all that is kept of its gradient between micro-batches."""
        return (self.flat if self._sums else self.owned).numel() * self.gradient_dtype.itemsize

    @property
    def may_be_on_host(self) -> bool:
        """Whether its gradient may lie on the host: not where it waits for the exchange with other owners."""
        return self.owners.group is None or not self._sums

    def place_gradient(self, slots: GradientSlots | None) -> None:
        """Makes room for the gradient: on the host, from where it comes to these slots; None: on the device."""
        if slots is None:
            size = self.gradient_bytes // self.gradient_dtype.itemsize
            memory = torch.zeros(size, dtype=self.gradient_dtype, device=self.device)
        else:
            self.on_host = GradientOnHost(slots, self.gradient_bytes, self.gradient_dtype)
            memory = self.on_host.there
        self.summed = memory if self._sums else None
        self.gradient = memory.chunk(self.owners.size)[self.owners.rank] if self._sums else memory

    def gradient_here(self, fresh: bool = False) -> Tensor:
        """`summed`, or where that is None, `gradient`, on the device. `fresh`: it has no value yet"""
        if self.on_host is not None:
            return self.on_host.take(fresh)
        return self.gradient if self.summed is None else self.summed

    @property
    def owned_range(self) -> range:
        """The range of `flat` that `owned` is."""
        size = self.owned.numel()
        return range(self.owners.rank * size, (self.owners.rank + 1) * size)

    def owned_parts(self) -> Iterator[OwnedPart]:
        """What this rank owns of each parameter. All ranks together cover every parameter exactly once."""
        owned = self.owned_range
        for slot in self.slots:
            start, stop = max(slot.start, owned.start), min(slot.stop, owned.stop)
            for at, box in flat_range_boxes(slot.box.sizes, start - slot.start, stop - slot.start):
                begin = slot.start + at - owned.start
                whole = box.shifted(slot.box.offsets)
                yield OwnedPart(slot.name, slot.spec, whole, begin, begin + prod(box.sizes))

    def without(self, names: set[str]) -> list[slice]:
        """The ranges of `flat` in which none of these parameters lies."""
        at, ranges = 0, []
        for slot in self.slots:
            if slot.name in names:
                part = slot.within(len(self.flat))[0]
                ranges.append(slice(at, part.start))
                at = part.stop
        ranges.append(slice(at, len(self.flat)))
        return [part for part in ranges if part.start < part.stop]

    def changed(self) -> None:
        """To be called when `flat` has changed in another way than by an update. All ranks must."""
        self.version += 1
        if self.scales is not None:
            self.scales.forget()

    def publish(self) -> None:
        """Starts what follows what is computed now: sending every owner's slice of `flat` to all; finding scales."""
        self.version += 1
        if self.owners.group is not None:
            self._updated = all_gather_single(self.flat, self.owned, group=self.owners.group, async_op=True)
        elif self.device.type == "cuda":
            self._updated = torch.cuda.current_stream(self.device).record_event()
        if self.scales is not None:
            self.scales.find()

    def owned_of(self, slot: Slot) -> Tensor:
        """What this rank owns of a parameter, maybe nothing: flat."""
        start, stop = (min(max(at - self.owned_range.start, 0), len(self.owned)) for at in (slot.start, slot.stop))
        return self.owned[start:stop]

    def wait(self) -> None:
        """Makes what is computed next come after the bucket's update."""
        if self._updated is not None:
            self._updated.wait()
            self._updated = None


def norm_of(gradient: Tensor) -> Tensor:
    """The 2-norm of a gradient, in fp32."""
    return _norms_of([gradient])[0]


def _norms_of(gradients: list[Tensor]) -> Sequence[Tensor]:
    """The 2-norm of each, in fp32.

    Torch's kernel for CPUs adds up squares one by one in fp32: with as many as a bucket has, the norm is off by 2e-3.
    There, those of short rows are added up so, and then the rows in fp64.
    """
    if gradients and gradients[0].device.type == "cpu":
        rows = (gradient.view(-1, gcd(gradient.numel(), _ALIGNMENT)) for gradient in gradients)
        return [torch.linalg.vector_norm(each, dim=1, dtype=torch.float32).double().norm().float() for each in rows]
    return torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()


def norms(buckets: Sequence[Bucket]) -> Tensor:
    """The 2-norm of the gradient of each bucket, once these are complete. fp32 [buckets], on the device"""
    found = iter(_norms_of([bucket.gradient for bucket in buckets if bucket.on_host is None]))
    every: list[Tensor] = []
    for bucket in buckets:
        norm = next(found) if bucket.on_host is None else bucket.on_host.norm
        assert norm is not None, "the step is over"
        every.append(norm)
    return torch.stack(every)


def make_buckets(
    specs: Mapping[str, ParameterSpec],
    axes: Axes,
    decays: Mapping[str, bool],
    elements: int = BUCKET_ELEMENTS,
    alone: Collection[str] = (),
    summed: bool = True,
    gradients_on_host: float = 0.0,
) -> tuple[list[Bucket], dict[str, nn.Parameter]]:
    """Lays the trained parameters into flat buffers: (buckets, name -> the parameter as a view of its buffer).

    decays             name -> whether weight decay applies; such parameters come first, so that both kinds are ranges
    elements           how many a bucket has, about
    alone              names of parameters that get buckets of their own, and whose gradients stay on the device
    summed             whether a step has several gradients of a parameter, which are summed
    gradients_on_host  bytes of gradients that are to lie on the host; as many as may, where that are fewer
    """
    groups: dict[object, tuple[Axis, list[str]]] = {}
    for name in sorted((name for name, spec in specs.items() if spec.trained), key=lambda name: not decays[name]):
        owners = axes.owners(specs[name].layout)
        key = (id(owners.group), specs[name].stored_dtype, specs[name].exchanged_once, name if name in alone else None)
        groups.setdefault(key, (owners, []))[1].append(name)
    places = {name: place for place, name in enumerate(specs)}
    buckets: list[Bucket] = []
    parameters: dict[str, nn.Parameter] = {}
    for owners, names in groups.values():
        slots, at = [], 0
        for name in names:
            slots.append(Slot(name, specs[name], specs[name].box(axes.mesh, axes.place), at))
            at = _round_up(slots[-1].stop, _ALIGNMENT)
        size = _round_up(min(elements, at), _ALIGNMENT * owners.size)
        flat = torch.zeros(
            _round_up(at, _ALIGNMENT * owners.size), dtype=specs[names[0]].stored_dtype, device=axes.device
        )
        for start in range(0, len(flat), size):
            stop = min(start + size, len(flat))
            inside = [
                replace(slot, start=slot.start - start) for slot in slots if slot.start < stop and slot.stop > start
            ]
            first = min(places[slot.name] for slot in inside)
            dtype = torch.float32 if summed or names[0] in alone else flat.dtype
            buckets.append(Bucket(flat[start:stop], inside, owners, first, dtype))
        for slot in slots:
            parameters[slot.name] = nn.Parameter(flat[slot.start : slot.stop].view(slot.box.sizes))
    _place_gradients(buckets, alone, gradients_on_host)
    return buckets, {name: parameters[name] for name in specs if name in parameters}


def _place_gradients(buckets: Sequence[Bucket], alone: Collection[str], on_host: float) -> None:
    """Makes room for all gradients: on the host, where `make_buckets` says so."""
    may = [bucket for bucket in buckets if bucket.may_be_on_host and bucket.slots[0].name not in alone]
    away = [may[index] for index in needed_last(may, on_host, lambda bucket: bucket.gradient_bytes)]
    slots = None
    if away:
        slots = GradientSlots(max(bucket.gradient_bytes for bucket in away), len(away), away[0].device)
    for bucket in buckets:
        bucket.place_gradient(slots if bucket in away else None)


def needed_last(buckets: Sequence[Bucket], size: float, bytes_of: Callable[[Bucket], int]) -> list[int]:
    """Indices of the buckets that forward needs last, as many as have `size` bytes together, or all."""
    found = []
    for index in sorted(range(len(buckets)), key=lambda index: -buckets[index].first):
        if size <= 0:
            break
        size -= bytes_of(buckets[index])
        found.append(index)
    return found


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class GradientReducer:
    """Sums gradients over owners and micro-batches, while backward goes on.

    A bucket is exchanged once its last gradient has arrived: in each micro-batch, or, where it is `summed`, in the last
    one of a step. How many gradients a summed bucket gets is learned in the first micro-batch; where the next one's
    backward may begin before that of a micro-batch ends, in the first step.

    sums      how owners add up their gradients
    overlaps  whether backward of a micro-batch may begin before that of another one ends
    """

    def __init__(
        self,
        buckets: Iterable[Bucket],
        parameters: Mapping[str, nn.Parameter],
        micro_batches: int,
        sums: GradientSum = IN_FP32,
        overlaps: bool = False,
    ) -> None:
        self._overlaps = overlaps
        self._buckets = list(buckets)
        self._micro_batches, self._sums = micro_batches, sums
        self._left = micro_batches  # of this step
        self._arrived: dict[int, set[str]] = defaultdict(set)  # bucket to be sent -> parameters with a gradient in it
        self._counts: dict[int, int] = defaultdict(int)  # summed bucket -> gradients that it got in this step
        self._expected: dict[int, int] = {}  # summed bucket -> how many it gets in a step
        self._begun: dict[int, set[str]] = defaultdict(set)  # bucket -> parameters that had a gradient, in this step
        self._buffers: dict[int, Tensor] = {}
        self._in_flight: deque[tuple[Waited | None, int, Tensor, Tensor, bool]] = deque()
        self._summing: dict[int, Waited | None] = {}  # summed buckets that have been sent; None: nothing is under way
        self._slots = next((bucket.on_host.slots for bucket in self._buckets if bucket.on_host is not None), None)
        pieces: dict[str, list[tuple[int, Slot]]] = defaultdict(list)
        for index, bucket in enumerate(self._buckets):
            for slot in bucket.slots:
                pieces[slot.name].append((index, slot))
        self._pieces = {id(parameter): pieces[name] for name, parameter in parameters.items()}
        self._deferred: deque[tuple[Tensor, Waited | None, Tensor]] = deque()
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(self._take_own)

    def _take_own(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # else it was deferred
            self.take(parameter, gradient)

    def defer(self, parameter: Tensor, work: Waited | None, gradient: Tensor) -> None:
        """Takes a gradient that is complete once `work` is."""
        self._deferred.append((parameter, work, gradient))
        if len(self._deferred) > MOST_DEFERRED:
            self._take_deferred()

    def settle(self) -> None:
        """Takes all gradients that were deferred."""
        while self._deferred:
            self._take_deferred()

    def _take_deferred(self) -> None:
        parameter, work, gradient = self._deferred.popleft()
        if work is not None:
            work.wait()
        self.take(parameter, gradient)

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds a gradient that has arrived to its buckets.

        That of a tied weight comes in two parts: from where the weight is gathered, and from where it is used as it is
        stored.
        """
        gradient = gradient.reshape(-1)
        for index, slot in self._pieces[id(parameter)]:
            bucket = self._buckets[index]
            bucket.wait()  # its update reads the gradient of the step before
            there, here = slot.within(len(bucket.flat))
            if bucket.summed is not None:
                assert index not in self._summing, "a gradient came after the last"
                summed = bucket.gradient_here(fresh=not self._begun[index])
                add_gradient(summed[there], gradient[here], first=slot.name not in self._begun[index])
                self._begun[index].add(slot.name)
                self._counts[index] += 1
                expected = self._expected.get(index, 0)
                if self._counts[index] == expected:
                    self._send_summed(index)
                elif expected and self._counts[index] % (expected // self._micro_batches) == 0:
                    self._end_stay(bucket, summed)
            else:
                if index not in self._buffers:
                    dtype = self._sums.dtype(torch.float32)
                    self._buffers[index] = torch.empty(bucket.flat.shape, dtype=dtype, device=bucket.device)
                add_gradient(self._buffers[index][there], gradient[here], first=slot.name not in self._arrived[index])
                self._arrived[index].add(slot.name)
                if len(self._arrived[index]) == len(bucket.slots):
                    self._send(index)

    def _send(self, index: int) -> None:
        bucket, buffer = self._buckets[index], self._buffers.pop(index)
        for unused in bucket.without(self._arrived.pop(index)):
            buffer[unused].zero_()
        while len(self._in_flight) >= MOST_IN_FLIGHT:  # bounds the buffers alive
            self._receive()
        first = not self._begun[index]
        here = first and bucket.on_host is None
        mine = bucket.gradient if here else torch.empty(bucket.owned.shape, dtype=torch.float32, device=bucket.device)
        self._begun[index].update(slot.name for slot in bucket.slots)
        work = start_gradient_sum(mine, buffer, bucket.owners.group, self._sums)
        self._in_flight.append((work, index, mine, buffer, first))

    def _receive(self) -> None:
        work, index, mine, _, first = self._in_flight.popleft()
        bucket = self._buckets[index]
        if work is not None:
            work.wait()
        if mine is not bucket.gradient:
            gradient = bucket.gradient_here(first)
            add_gradient(gradient, mine, first)
            self._end_stay(bucket, gradient)

    def _send_summed(self, index: int) -> None:
        bucket = self._buckets[index]
        assert bucket.summed is not None
        summed = bucket.gradient_here(fresh=not self._begun[index])
        for unused in bucket.without(self._begun[index]):
            summed[unused].zero_()
        under_way = [one for one, work in self._summing.items() if work is not None]
        if self._sums != IN_FP32 and len(under_way) >= MOST_IN_FLIGHT:  # bounds the copies alive
            self._finish_sum(under_way[0])
        self._summing[index] = None
        if bucket.owners.group is not None:
            self._summing[index] = start_gradient_sum(bucket.gradient, bucket.summed, bucket.owners.group, self._sums)
        self._end_stay(bucket, summed)

    def _finish_sum(self, index: int) -> None:
        work, self._summing[index] = self._summing[index], None
        if work is not None:
            work.wait()

    def _end_stay(self, bucket: Bucket, gradient: Tensor) -> None:
        """Where the gradient is here from the host: it has got all of this micro-batch, and goes back."""
        if bucket.on_host is not None:
            bucket.on_host.norm = norm_of(gradient) if self._left <= 1 else None
            bucket.on_host.send()

    def end_micro_batch(self) -> None:
        """Exchanges the buckets that got no gradient for some parameter in this micro-batch."""
        self.settle()
        for index in sorted(self._buffers):
            self._send(index)
        if not self._overlaps:
            self._learn(self._micro_batches)
        self._left -= 1
        if self._slots is not None:
            self._slots.end_micro_batch(last=self._left == 0)

    def _learn(self, times: int) -> None:
        """How many gradients a summed bucket gets in a step: so many times as many as it has got."""
        self._expected = self._expected or {index: count * times for index, count in self._counts.items()}

    def finish(self) -> None:
        """Ends a step: waits until every `Bucket.gradient` is complete."""
        self._learn(1)
        self._counts.clear()
        while self._in_flight:
            self._receive()
        for index, bucket in enumerate(self._buckets):
            bucket.wait()
            if bucket.summed is not None and index not in self._summing:
                self._send_summed(index)
            elif bucket.summed is None and not self._begun[index]:
                self._end_stay(bucket, bucket.gradient_here(fresh=True).zero_())
            elif bucket.on_host is not None and bucket.on_host.norm is None:
                self._end_stay(bucket, bucket.gradient_here())  # which got nothing in the last micro-batch
        for index in self._summing:
            self._finish_sum(index)
        self._summing.clear()
        self._begun.clear()
        self._left = self._micro_batches
