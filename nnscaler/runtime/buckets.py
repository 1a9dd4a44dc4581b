"""Parameters in flat buffers, whose gradients are reduced and whose optimizer state is sharded together (ZeRO-1)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler.runtime.axes import Axes, Axis
from nnscaler.runtime.collectives import all_gather_single, reduce_scatter_single
from nnscaler.runtime.shards import Box, ParameterSpec, flat_range_boxes

BUCKET_ELEMENTS = 2**25  # a bucket is exchanged as one: large enough for full bandwidth, small beside the model
MOST_IN_FLIGHT = 6  # buckets whose exchange goes on beside backward: what one layer's backward gives at once
MOST_DEFERRED = 2  # gathered weights whose gradients are on their way to their shards
_ALIGNMENT = 64  # elements; keeps every parameter's first byte where kernels like it


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket: the local shard's box in the whole tensor, and where its elements begin and end.

    A bucket is cut anywhere: `start` is below 0 where the parameter begins in the bucket before.
    """

    name: str
    spec: ParameterSpec
    box: Box
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.box.sizes)

    def within(self, size: int) -> tuple[slice, slice]:
        """The elements that a bucket of `size` has of the parameter: in the bucket, and in the parameter."""
        start, stop = max(self.start, 0), min(self.stop, size)
        return slice(start, stop), slice(start - self.start, stop - self.start)


@dataclass(frozen=True)
class OwnedPart:
    """A box of a whole parameter that this rank owns, as a range of its bucket's owned elements."""

    name: str
    spec: ParameterSpec
    box: Box
    start: int
    stop: int


class Bucket:
    """A range of the buffer in which parameters of equal owners and type lie one after the other.

    flat      [n] the parameters, on every owner
    owned     [n / owners] the slice of `flat` that this rank updates
    gradient  [n / owners] fp32: the sum over owners and micro-batches of that slice's gradient
    is_copy   whether another pipeline stage has the same parameters, and counts them as its own
    """

    def __init__(self, flat: Tensor, slots: list[Slot], owners: Axis) -> None:
        self.flat = flat
        self.is_copy = False
        self.slots = slots
        self.owners = owners
        self.device = flat.device
        self.owned = self.flat.chunk(owners.size)[owners.rank]
        self.gradient = torch.zeros(self.owned.shape, dtype=torch.float32, device=self.device)

    @property
    def owned_range(self) -> range:
        """Elements of `flat` that `owned` is."""
        size = self.owned.numel()
        return range(self.owners.rank * size, (self.owners.rank + 1) * size)

    def owned_parts(self) -> Iterator[OwnedPart]:
        """What this rank owns of each parameter. Over all ranks they cover every parameter exactly once."""
        owned = self.owned_range
        for slot in self.slots:
            start, stop = max(slot.start, owned.start), min(slot.stop, owned.stop)
            for at, box in flat_range_boxes(slot.box.sizes, start - slot.start, stop - slot.start):
                begin = slot.start + at - owned.start
                whole = box.shifted(slot.box.offsets)
                yield OwnedPart(slot.name, slot.spec, whole, begin, begin + prod(box.sizes))

    def without(self, names: set[str]) -> list[slice]:
        """The ranges of `flat` that none of the parameters called so lies in."""
        at, ranges = 0, []
        for slot in self.slots:
            if slot.name in names:
                part = slot.within(len(self.flat))[0]
                ranges.append(slice(at, part.start))
                at = part.stop
        ranges.append(slice(at, len(self.flat)))
        return [part for part in ranges if part.start < part.stop]

    def publish(self) -> dist.Work | None:
        """Starts sending every owner's slice of `flat` to all owners."""
        if self.owners.group is None:
            return None
        return all_gather_single(self.flat, self.owned, group=self.owners.group, async_op=True)


def make_buckets(
    specs: Mapping[str, ParameterSpec],
    axes: Axes,
    decays: Mapping[str, bool],
    elements: int = BUCKET_ELEMENTS,
    alone: Collection[str] = (),
) -> tuple[list[Bucket], dict[str, nn.Parameter]]:
    """Lays trained parameters into buffers, cut into buckets of about `elements`; and the parameters as views of them.

    Parameters come in the order given, but those with weight decay first, so that the two kinds are ranges. Each of
    `alone` gets buckets of its own.
    """
    groups: dict[object, tuple[Axis, list[str]]] = {}
    for name in sorted((name for name, spec in specs.items() if spec.trained), key=lambda name: not decays[name]):
        owners = axes.owners(specs[name].layout)
        key = (id(owners.group), specs[name].dtype, name if name in alone else None)
        groups.setdefault(key, (owners, []))[1].append(name)
    buckets: list[Bucket] = []
    parameters: dict[str, nn.Parameter] = {}
    for owners, names in groups.values():
        slots, at = [], 0
        for name in names:
            slots.append(Slot(name, specs[name], specs[name].box(axes.mesh, axes.place), at))
            at = _round_up(slots[-1].stop, _ALIGNMENT)
        size = _round_up(min(elements, at), _ALIGNMENT * owners.size)
        flat = torch.zeros(_round_up(at, _ALIGNMENT * owners.size), dtype=specs[names[0]].dtype, device=axes.device)
        for start in range(0, len(flat), size):
            stop = min(start + size, len(flat))
            inside = [
                replace(slot, start=slot.start - start) for slot in slots if slot.start < stop and slot.stop > start
            ]
            buckets.append(Bucket(flat[start:stop], inside, owners))
        for slot in slots:
            parameters[slot.name] = nn.Parameter(flat[slot.start : slot.stop].view(slot.box.sizes))
    return buckets, {name: parameters[name] for name in specs if name in parameters}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class GradientReducer:
    """Sums gradients over owners while backward goes on: a bucket is sent when its last gradient has arrived."""

    def __init__(self, buckets: Iterable[Bucket], parameters: Mapping[str, nn.Parameter]) -> None:
        self._buckets = list(buckets)
        self._arrived: dict[int, set[str]] = {}
        self._buffers: dict[int, Tensor] = {}
        self._in_flight: deque[tuple[dist.Work | None, int, Tensor, Tensor]] = deque()
        pieces: dict[str, list[tuple[int, Slot]]] = defaultdict(list)
        for index, bucket in enumerate(self._buckets):
            for slot in bucket.slots:
                pieces[slot.name].append((index, slot))
        self._pieces = {id(parameter): pieces[name] for name, parameter in parameters.items()}
        self._deferred: deque[tuple[Tensor, dist.Work | None, Tensor]] = deque()
        self._parameters = list(parameters.values())
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._take_own)

    def take_gradients(self) -> None:
        """Takes the gradients that were set without a hook being called, as torch's split backward does."""
        for parameter in self._parameters:
            self._take_own(parameter)

    def _take_own(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # else it was deferred
            self._take(parameter, gradient)

    def defer(self, parameter: Tensor, work: dist.Work | None, gradient: Tensor) -> None:
        """A gradient that will have arrived when `work` is complete."""
        self._deferred.append((parameter, work, gradient))
        if len(self._deferred) > MOST_DEFERRED:
            self._take_deferred()

    def _take_deferred(self) -> None:
        parameter, work, gradient = self._deferred.popleft()
        if work is not None:
            work.wait()
        self._take(parameter, gradient)

    def _take(self, parameter: Tensor, gradient: Tensor) -> None:
        """A gradient that has arrived goes to its buckets."""
        gradient = gradient.reshape(-1)
        for index, slot in self._pieces[id(parameter)]:
            bucket = self._buckets[index]
            if index not in self._buffers:
                self._buffers[index] = torch.empty(bucket.flat.shape, dtype=torch.float32, device=bucket.device)
                self._arrived[index] = set()
            there, here = slot.within(len(bucket.flat))
            # A tied weight's gradient may come in two parts: from where it is gathered, and where it is used as stored.
            second = slot.name in self._arrived[index]
            target, part = self._buffers[index][there], gradient[here]
            if second:
                target += part
            else:  # of several tensors at once: for another type that is several times as fast as for one
                torch._foreach_copy_([target], [part])
            self._arrived[index].add(slot.name)
            if len(self._arrived[index]) == len(bucket.slots):
                self._send(index)

    def _send(self, index: int) -> None:
        bucket, buffer = self._buckets[index], self._buffers.pop(index)
        for unused in bucket.without(self._arrived.pop(index)):
            buffer[unused].zero_()
        if bucket.owners.group is None:
            bucket.gradient += buffer
            return
        while len(self._in_flight) >= MOST_IN_FLIGHT:  # bounds the buffers alive
            self._receive()
        mine = torch.empty_like(bucket.gradient)
        work = reduce_scatter_single(mine, buffer, group=bucket.owners.group, async_op=True)
        self._in_flight.append((work, index, mine, buffer))

    def _receive(self) -> None:
        work, index, mine, _ = self._in_flight.popleft()
        if work is not None:
            work.wait()
        self._buckets[index].gradient += mine

    def end_micro_batch(self) -> None:
        """Sends the buckets of which some parameter had no gradient in this micro-batch."""
        while self._deferred:
            self._take_deferred()
        for index in sorted(self._buffers):
            self._send(index)

    def finish(self) -> None:
        """Waits until every `Bucket.gradient` is complete."""
        while self._in_flight:
            self._receive()
