"""Gradients that lie on the host.

Only a few of them are on the device at a time, in slots that they take turns in. A gradient comes when backward is to
add to it, and goes back once it has got all that a micro-batch gives it. In a step's first micro-batch none comes, for
there is nothing to add to. In the others they come early, in the order in which the micro-batch before asked for them.
They come once more for the update.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import torch
from torch import Tensor

from nnscaler.runtime.host import HostPool
from nnscaler.sizes import GRADIENT_SLOTS


class GradientOnHost:
    """A gradient that lies on the host, and comes to a slot on the device to be worked on.

    size   bytes of it, of the type `dtype`
    there  the gradient on the host
    norm   its 2-norm, once it is complete: fp32, on the device
    """

    def __init__(self, slots: GradientSlots, size: int, dtype: torch.dtype) -> None:
        self.slots, self.size, self.dtype = slots, size, dtype
        self.buffer = slots.pool.take(size)
        self.there = self.buffer.bytes.view(dtype)
        self.norm: Tensor | None = None

    def fetch(self) -> None:
        """Starts bringing it to the device, if it is not there, and a slot is free."""
        self.slots.fetch(self)

    def take(self, fresh: bool = False) -> Tensor:
        """The gradient on the device, ready for what is computed next. `send` or `leave` ends its stay.

        fresh  it has no value yet
        """
        return self.slots.take(self, fresh)

    def send(self) -> None:
        """Starts copying it back to the host, after what is computed now. The next one may come."""
        self.slots.send(self)

    def leave(self) -> None:
        """Ends its stay, after what is computed now. On the host it is as it was before."""
        self.slots.leave(self)


class GradientSlots:
    """Memory on the device that gradients from the host take turns in.

    size   bytes of the largest of them
    count  how many there are
    pool   the host's memory that they lie in
    """

    def __init__(self, size: int, count: int, device: torch.device) -> None:
        self.pool = HostPool(device)
        self._free = deque(_Slot(size, self.pool) for _ in range(min(GRADIENT_SLOTS, count)))
        self._here: OrderedDict[GradientOnHost, _Slot] = OrderedDict()  # what was taken last is last
        self._taken: dict[GradientOnHost, None] = {}  # in this micro-batch, in order
        self._coming: deque[GradientOnHost] = deque()  # what this micro-batch is expected to take

    def fetch(self, one: GradientOnHost) -> None:
        """See `GradientOnHost.fetch`; likewise `take`, `send` and `leave`."""
        if one not in self._here and self._free:
            slot = self._here[one] = self._free.popleft()
            self.pool.read(one.buffer, slot.bytes[: one.size], slot.left, now=False)

    def take(self, one: GradientOnHost, fresh: bool) -> Tensor:
        if one not in self._here and not self._free:
            self._send(next(iter(self._here)))
        if fresh and one not in self._here:
            self._here[one] = self._free.popleft()
        self.fetch(one)
        self._here.move_to_end(one)
        self._taken[one] = None
        slot = self._here[one]
        self.pool.wait(slot.left)
        self.pool.wait(one.buffer.read)
        return slot.bytes[: one.size].view(one.dtype)

    def send(self, one: GradientOnHost) -> None:
        self._send(one)
        self._bring()

    def leave(self, one: GradientOnHost) -> None:
        slot = self._here.pop(one)
        self._taken.pop(one, None)  # it says nothing of the order of backward
        slot.left = self.pool.moment()
        self._free.append(slot)

    def end_micro_batch(self, last: bool) -> None:
        """Sends back whatever is still here. Where that was not the step's last micro-batch, the first gradients come
        for the next."""
        while self._here:
            self._send(next(iter(self._here)))
        self._coming = deque(() if last else self._taken)
        self._taken.clear()
        self._bring()

    def _send(self, one: GradientOnHost) -> None:
        slot = self._here.pop(one)
        self.pool.write(one.buffer, slot.bytes[: one.size])
        slot.left = one.buffer.written
        self._free.append(slot)

    def _bring(self) -> None:
        while self._coming and self._free:
            one = self._coming.popleft()
            if one not in self._taken:
                self.fetch(one)


class _Slot:
    """Memory on the device, and the event after which what lay in it last has left."""

    def __init__(self, size: int, pool: HostPool) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=pool.device)
        self.left = pool.moment()
