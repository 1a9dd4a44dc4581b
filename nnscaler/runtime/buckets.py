"""Parameters in flat buffers, whose gradients are reduced and whose optimizer state is sharded together (ZeRO-1)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler.runtime.axes import Axes, Axis
from nnscaler.runtime.collectives import all_gather_single, reduce_scatter_single
from nnscaler.runtime.shards import Box, ParameterSpec, flat_range_boxes

BUCKET_ELEMENTS = 2**26  # a bucket is exchanged as one: large enough for full bandwidth, small beside the model
_ALIGNMENT = 64  # elements; keeps every parameter's first byte where kernels like it


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its bucket: the local shard's box in the whole tensor, and where its elements begin."""

    name: str
    spec: ParameterSpec
    box: Box
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.box.sizes)


@dataclass(frozen=True)
class OwnedPart:
    """A box of a whole parameter that this rank owns, as a range of its bucket's owned elements."""

    name: str
    spec: ParameterSpec
    box: Box
    start: int
    stop: int


class Bucket:
    """Local shards of parameters with equal owners and type, one after the other in one buffer.

    flat      [n] the parameters, on every owner; each parameter is a view of it
    owned     [n / owners] the slice of `flat` that this rank updates
    gradient  [n / owners] fp32: the sum over owners and micro-batches of that slice's gradient
    """

    def __init__(self, slots: list[Slot], owners: Axis, device: torch.device) -> None:
        self.slots = slots
        self.owners = owners
        self.device = device
        padded = _round_up(slots[-1].stop, _ALIGNMENT * owners.size)
        self.flat = torch.zeros(padded, dtype=slots[0].spec.dtype, device=device)
        self.owned = self.flat.chunk(owners.size)[owners.rank]
        self.gradient = torch.zeros(self.owned.shape, dtype=torch.float32, device=device)
        self.parameters = {
            slot.name: nn.Parameter(self.flat[slot.start : slot.stop].view(slot.box.sizes)) for slot in slots
        }

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

    def publish(self) -> dist.Work | None:
        """Starts sending every owner's slice of `flat` to all owners."""
        if self.owners.group is None:
            return None
        return all_gather_single(self.flat, self.owned, group=self.owners.group, async_op=True)


def make_buckets(
    specs: Mapping[str, ParameterSpec], axes: Axes, decays: Mapping[str, bool], elements: int = BUCKET_ELEMENTS
) -> list[Bucket]:
    """Puts trained parameters into buckets of about `elements`, in the order given.

    Within a bucket the parameters with weight decay come first, so that the two kinds are ranges.
    """
    open_groups: dict[object, list[str]] = {}
    groups: list[tuple[Axis, list[str]]] = []
    for name, spec in specs.items():
        if not spec.trained:
            continue
        owners = axes.owners(spec.layout)
        key = (id(owners.group), spec.dtype)
        group = open_groups.get(key)
        if group is None or sum(_local_size(specs[other], axes) for other in group) >= elements:
            group = open_groups[key] = []
            groups.append((owners, group))
        group.append(name)
    buckets = []
    for owners, names in groups:
        slots, at = [], 0
        for name in sorted(names, key=lambda name: not decays[name]):
            slots.append(Slot(name, specs[name], specs[name].box(axes.mesh, axes.place), at))
            at = _round_up(slots[-1].stop, _ALIGNMENT)
        buckets.append(Bucket(slots, owners, axes.device))
    return buckets


def _local_size(spec: ParameterSpec, axes: Axes) -> int:
    return prod(spec.box(axes.mesh, axes.place).sizes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class GradientReducer:
    """Sums gradients over owners while backward goes on: a bucket is sent when its last gradient has arrived."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self._buckets = list(buckets)
        self._arrived: dict[int, set[str]] = {}
        self._buffers: dict[int, Tensor] = {}
        self._in_flight: deque[tuple[dist.Work | None, int, Tensor, Tensor]] = deque()
        for index, bucket in enumerate(self._buckets):
            for slot in bucket.slots:
                bucket.parameters[slot.name].register_post_accumulate_grad_hook(self._hook(index, slot))

    def _hook(self, index: int, slot: Slot):  # type: ignore[no-untyped-def]
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if index not in self._buffers:
                bucket = self._buckets[index]
                self._buffers[index] = torch.zeros(bucket.flat.shape, dtype=torch.float32, device=bucket.device)
                self._arrived[index] = set()
            self._buffers[index][slot.start : slot.stop].copy_(parameter.grad.view(-1))
            parameter.grad = None
            self._arrived[index].add(slot.name)
            if len(self._arrived[index]) == len(self._buckets[index].slots):
                self._send(index)

        return take

    def _send(self, index: int) -> None:
        bucket, buffer = self._buckets[index], self._buffers.pop(index)
        del self._arrived[index]
        if bucket.owners.group is None:
            bucket.gradient += buffer
            return
        while len(self._in_flight) > 1:  # bounds the buffers alive
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
        for index in sorted(self._buffers):
            self._send(index)

    def finish(self) -> None:
        """Waits until every `Bucket.gradient` is complete."""
        while self._in_flight:
            self._receive()
