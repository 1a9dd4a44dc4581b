"""The host's memory as a second place for what backward needs, and for the optimizer's state.

What a call of a block keeps for backward is copied to page-locked host memory while forward goes on. It comes back
while backward goes on, one call before it is needed. Copies run on streams of their own, one for each direction, so
that they hide behind computation. The device never holds more than what two calls keep.

The optimizer's state comes to the device for its update, bucket by bucket, and goes back. For gradients that lie here,
see `nnscaler.runtime.gradients`.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nnscaler.errors import UserError
from nnscaler.runtime.locked import host_memory, lock, unlock

SMALL = 2**16  # bytes; what is smaller stays on an accelerator, where each copy costs a launch

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class HostMemory:
    """Keeps what the blocks of one model need for backward, in the order in which forward runs them.

    device        whose tensors are kept
    is_weight     tells whether a tensor lies in a weight's memory; such a tensor stays where it is
    pack, unpack  what else is done with tensors that autograd saves: where `pack` gives another object than the tensor,
                  that object is kept in the tensor's place, and `unpack` gives the tensor back
    """

    def __init__(
        self,
        device: torch.device,
        is_weight: Callable[[Tensor], bool],
        pack: Pack | None = None,
        unpack: Unpack | None = None,
    ) -> None:
        self._is_weight, self._pack, self._unpack = is_weight, pack, unpack
        self._small = SMALL if device.type == "cuda" else 0
        self.pool = HostPool(device)
        self._previous: _Kept | None = None  # what the call before keeps, while forward runs
        self._in_use: _Kept | None = None  # what the call keeps whose backward runs

    def clear(self) -> None:
        """To be called when a micro-batch begins, and when its backward is done. Others may still wait for theirs."""
        self._forward_is_done()
        self._in_use = None

    @contextmanager
    def keeping(self, *shared: Tensor) -> Iterator[None]:
        """Inside, one call of a block runs; what it keeps for backward goes to the host.

        shared  tensors that all calls of the block get; these stay on the device
        """
        kept = _Kept(self.pool, self._previous)
        stay = {tensor.untyped_storage().data_ptr() for tensor in shared}

        def keep(tensor: Tensor) -> Any:
            packed = tensor if self._pack is None else self._pack(tensor)
            if packed is not tensor or tensor.nbytes < self._small or self._is_weight(tensor):
                return packed
            return tensor if tensor.untyped_storage().data_ptr() in stay else kept.send(tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, self._give):
            yield
        self.free_sent()
        self._previous = kept

    def free_sent(self) -> None:
        """Frees on the device what the last call on the host keeps, once it is there. To be called when another call
        has run since: beside that, the copies run."""
        if self._previous is not None:
            self._previous.let_go()

    def _forward_is_done(self) -> None:
        self.free_sent()
        self._previous = None

    def _give(self, packed: Any) -> Tensor:
        if isinstance(packed, _Sent):
            return self._take(packed)
        return packed if self._unpack is None else self._unpack(packed)

    def _take(self, sent: _Sent) -> Tensor:
        if self._in_use is not sent.kept:
            # Nothing but what backward still needs holds on to what was kept: as that goes, so do the copies.
            self._forward_is_done()
            self._in_use = sent.kept
            sent.kept.fetch()
            if sent.kept.previous is not None:
                sent.kept.previous.fetch()
        return sent.take()


class HostPool:
    """Page-locked host memory, and the streams that copy to it and back.

    Memory is taken from the machine once, and reused for buffers of equal size.

    device  the device that copies
    bytes   how much has been taken from the machine so far
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0  # taken so far
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._on_accelerator = device.type == "cuda"
        self._locked: list[int] = []  # addresses
        if self._on_accelerator:
            self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
            weakref.finalize(self, _unlock, (self._out, self._back), self._locked).atexit = False

    def take(self, size: int) -> _Buffer:
        """A buffer of `size` bytes that nobody uses."""
        if self._free[size]:
            return self._free[size].pop()
        self.bytes += size
        if not self._on_accelerator:
            return _Buffer(torch.zeros(size, dtype=torch.uint8))
        memory = _page_locked(size)
        self._locked.append(memory.data_ptr())
        return _Buffer(memory)

    def give_back(self, buffer: _Buffer) -> None:
        """Makes a buffer free for others. It may still be read from: `write` waits for that."""
        self._free[buffer.bytes.numel()].append(buffer)

    def write(self, buffer: _Buffer, source: Tensor) -> None:
        """Copies bytes of the device to a buffer: after what is computed now, and beside what is computed next."""
        if not self._on_accelerator:
            buffer.bytes.copy_(source)
            return
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        if buffer.read is not None:
            self._out.wait_event(buffer.read)
        with torch.cuda.stream(self._out):
            buffer.bytes.copy_(source, non_blocking=True)
            buffer.written = self._out.record_event()

    def read(self, buffer: _Buffer, target: Tensor, after: torch.cuda.Event | None = None, now: bool = True) -> None:
        """Copies a buffer to bytes of the device: after the event, and beside what is computed next.

        now  whether also after what is computed now, which may still use the target's memory
        """
        if not self._on_accelerator:
            target.copy_(buffer.bytes)
            return
        self.wait(after, self._back)
        if now:
            self._back.wait_stream(torch.cuda.current_stream(self.device))
        self.wait(buffer.written, self._back)
        with torch.cuda.stream(self._back):
            target.copy_(buffer.bytes, non_blocking=True)
            buffer.read = self._back.record_event()

    def moment(self) -> torch.cuda.Event | None:
        """The event that follows what is computed now; None: that is done as soon as it is said."""
        return torch.cuda.current_stream(self.device).record_event() if self._on_accelerator else None

    def wait(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None = None) -> None:
        """Makes what is computed next, or what runs next on `stream`, come after the event."""
        if event is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_event(event)


class _Buffer:
    """Bytes of the host, and the events that follow their last writing and their last reading."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory
        self.written: torch.cuda.Event | None = None
        self.read: torch.cuda.Event | None = None


class StagingArea:
    """Memory on the device that tensors from the host take turns in.

    tensors      the memory, each of `size` fp32 elements
    copied_away  for each of them, the event after which its last tensor is on the host again
    """

    def __init__(self, size: int, tensors: int, device: torch.device) -> None:
        self.tensors = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(tensors)]
        self.copied_away: list[torch.cuda.Event | None] = [None] * tensors


class StagedTensors:
    """fp32 tensors that lie on the host, and come to a staging area on the device to be worked on.

    there  the tensors on the host
    here   the tensors on the device, valid between `wait_for_fetch` and `send_back`
    """

    def __init__(self, pool: HostPool, area: StagingArea, size: int, tensors: int) -> None:
        self._pool, self._area = pool, area
        self._taken = [pool.take(4 * size) for _ in range(tensors)]
        self.there = [buffer.bytes.view(torch.float32) for buffer in self._taken]
        self.here = [tensor[:size] for tensor in area.tensors[:tensors]]

    def fetch(self) -> None:
        """Starts copying to the device."""
        for buffer, tensor, copied_away in zip(self._taken, self.here, self._area.copied_away):
            self._pool.read(buffer, tensor.view(torch.uint8), after=copied_away)

    def wait_for_fetch(self) -> None:
        """Makes what is computed next come after the tensors are `here`."""
        for buffer in self._taken:
            self._pool.wait(buffer.read)

    def send_back(self) -> None:
        """Starts copying the tensors back to the host, after what is computed now."""
        for index, (buffer, tensor) in enumerate(zip(self._taken, self.here)):
            self._pool.write(buffer, tensor.view(torch.uint8))
            self._area.copied_away[index] = buffer.written

    def wait_for_host(self) -> None:
        """Waits, in this process, until the tensors are `there`."""
        for buffer in self._taken:
            if buffer.written is not None:
                buffer.written.synchronize()


class _Kept:
    """What one call of a block keeps on the host.

    previous  what the call before it keeps; backward needs that next
    """

    def __init__(self, pool: HostPool, previous: _Kept | None) -> None:
        self.pool, self.previous = pool, previous
        self._copies: dict[tuple[int, int], _Copy] = {}  # (address, bytes) on the device -> copy
        self._here: list[Tensor] = []  # what may still be copied from

    def send(self, tensor: Tensor) -> _Sent:
        """Sends a tensor to the host. Memory that has been sent already is not sent again."""
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        key = tensor.data_ptr(), tensor.nbytes
        if key not in self._copies:
            self._copies[key] = _Copy(self.pool, self.pool.take(tensor.nbytes), _bytes_of(tensor))
            self._here.append(tensor)
        return _Sent(self, self._copies[key], tensor)

    def let_go(self) -> None:
        """Frees the memory on the device, once the copies to the host are done."""
        if self._here:
            for copy in self._copies.values():
                self.pool.wait(copy.buffer.written)
            self._here.clear()

    def fetch(self) -> None:
        """Starts bringing everything back."""
        self.let_go()
        for copy in self._copies.values():
            copy.fetch()


class _Copy:
    """Bytes of the device that are on the host; once they are fetched, they are on the device again."""

    def __init__(self, pool: HostPool, buffer: _Buffer, source: Tensor) -> None:
        self.pool, self.buffer = pool, buffer
        self.fetched: Tensor | None = None
        pool.write(buffer, source)

    def fetch(self) -> None:
        if self.fetched is None:
            self.fetched = torch.empty(self.buffer.bytes.numel(), dtype=torch.uint8, device=self.pool.device)
            self.pool.read(self.buffer, self.fetched)

    def __del__(self) -> None:
        if self.fetched is not None:
            # Nobody may have asked for it: then the copy may still be under way to memory that is free now.
            self.pool.wait(self.buffer.read)
        self.pool.give_back(self.buffer)


class _Sent:
    """A tensor that was sent: in which copy its bytes are, and how they are to be seen."""

    def __init__(self, kept: _Kept, copy: _Copy, tensor: Tensor) -> None:
        self.kept, self._copy = kept, copy
        self._view = tensor.dtype, tensor.size(), tensor.stride()

    def take(self) -> Tensor:
        """The tensor, ready for what is computed next."""
        dtype, size, stride = self._view
        assert self._copy.fetched is not None
        self.kept.pool.wait(self._copy.buffer.read)
        return self._copy.fetched.view(dtype).as_strided(size, stride)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its range of memory, in any order of its dimensions."""
    filled = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride != filled:
            return False
        filled *= size
    return True


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, whatever the order of its dimensions."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def _page_locked(size: int) -> Tensor:
    """Bytes that the device may copy to and from by itself."""
    memory = host_memory(size)
    if not lock(memory):
        raise UserError(
            f"the machine gives no more page-locked memory: {size / 2**30:.2f} GiB refused; plan with less by "
            "--host_mem_constraint, or with none by --offload off"
        )
    return memory


def _unlock(streams: Sequence[torch.cuda.Stream], addresses: list[int]) -> None:
    """Before memory that copies may still be under way to is given back to the machine."""
    for stream in streams:
        stream.synchronize()
    for address in addresses:
        unlock(address)
