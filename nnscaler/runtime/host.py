"""Host memory as a second place for what backward needs.

What a call of a block keeps for backward is sent to page-locked host memory while forward goes on, and brought back
while backward does, one call ahead of its use. Copies run on streams of their own, one each way, so that they hide
behind computation. On the device there is never more than what two calls keep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMALL = 2**16  # bytes; what is smaller stays on an accelerator, where each copy costs a launch

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class HostMemory:
    """Where the blocks of one model keep what backward needs, in the order in which forward runs them.

    device        whose tensors are kept
    is_weight     whether a tensor lies in a weight's memory: that stays where it is
    pack, unpack  what else is done with saved tensors: where `pack` gives another object than the tensor, that is kept
                  in its place
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
        self.buffers = Buffers(device)
        self._last: _Kept | None = None  # by the call before, in the micro-batch whose forward runs
        self._used: _Kept | None = None  # what backward uses now

    def clear(self) -> None:
        """A micro-batch begins, or its backward is done."""
        self._last = self._used = None

    @contextmanager
    def keeping(self, *shared: Tensor) -> Iterator[None]:
        """Inside, one call of a block: what it keeps for backward goes to the host.

        shared  tensors that all calls get, which stay on the device
        """
        kept = _Kept(self.buffers, self._last)
        stay = {tensor.untyped_storage().data_ptr() for tensor in shared}

        def keep(tensor: Tensor) -> Any:
            packed = tensor if self._pack is None else self._pack(tensor)
            if packed is not tensor or tensor.nbytes < self._small or self._is_weight(tensor):
                return packed
            return tensor if tensor.untyped_storage().data_ptr() in stay else kept.send(tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, self._give):
            yield
        if self._last is not None:
            self._last.let_go()
        self._last = kept

    def _give(self, packed: Any) -> Tensor:
        if isinstance(packed, _Sent):
            return self._take(packed)
        return packed if self._unpack is None else self._unpack(packed)

    def _take(self, sent: _Sent) -> Tensor:
        if self._used is not sent.kept:
            # Nothing but what backward still needs holds on to what was kept: as that goes, so do the copies.
            self._used, self._last = sent.kept, None
            sent.kept.fetch()
            if sent.kept.previous is not None:
                sent.kept.previous.fetch()
        return sent.take()


class Buffers:
    """Page-locked host memory, taken once and used again, and the streams that copy to it and from it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0  # taken so far
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._on_accelerator = device.type == "cuda"
        if self._on_accelerator:
            self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def take(self, size: int) -> _Buffer:
        """A buffer of `size` bytes that nobody uses."""
        if self._free[size]:
            return self._free[size].pop()
        self.bytes += size
        return _Buffer(_page_locked(size) if self._on_accelerator else torch.zeros(size, dtype=torch.uint8))

    def give_back(self, buffer: _Buffer) -> None:
        """Nobody uses a buffer any more, though it may still be read from."""
        self._free[buffer.bytes.numel()].append(buffer)

    def write(self, buffer: _Buffer, source: Tensor) -> None:
        """Copies bytes of the device to a buffer, after what is computed now, beside what is computed next."""
        if not self._on_accelerator:
            buffer.bytes.copy_(source)
            return
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        if buffer.read is not None:
            self._out.wait_event(buffer.read)
        with torch.cuda.stream(self._out):
            buffer.bytes.copy_(source, non_blocking=True)
            buffer.written = self._out.record_event()

    def read(self, buffer: _Buffer, target: Tensor, after: torch.cuda.Event | None = None) -> None:
        """Copies a buffer to bytes of the device, after the event, beside what is computed next."""
        if not self._on_accelerator:
            target.copy_(buffer.bytes)
            return
        self.wait(after, self._back)
        # The target's memory may still be in use by what is computed now.
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        self.wait(buffer.written, self._back)
        with torch.cuda.stream(self._back):
            target.copy_(buffer.bytes, non_blocking=True)
            buffer.read = self._back.record_event()

    def wait(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None = None) -> None:
        """What is computed next (or runs next on `stream`) comes after `event`."""
        if event is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_event(event)


class _Buffer:
    """Host bytes, and the events after they were last written and last read."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory
        self.written: torch.cuda.Event | None = None
        self.read: torch.cuda.Event | None = None


class Place:
    """Memory on the device for tensors of up to `size` fp32 elements, which others take their turn in."""

    def __init__(self, size: int, tensors: int, device: torch.device) -> None:
        self.tensors = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(tensors)]
        self.left: list[torch.cuda.Event | None] = [None] * tensors  # events after the last of them was copied away


class Traveller:
    """fp32 tensors that lie on the host (`there`), and come to a place on the device (`here`) to be worked on."""

    def __init__(self, buffers: Buffers, place: Place, size: int, tensors: int) -> None:
        self._buffers, self._place = buffers, place
        self._taken = [buffers.take(4 * size) for _ in range(tensors)]
        self.there = [buffer.bytes.view(torch.float32) for buffer in self._taken]
        self.here = [tensor[:size] for tensor in place.tensors[:tensors]]

    def bring(self) -> None:
        """Starts copying to the device."""
        for buffer, tensor, left in zip(self._taken, self.here, self._place.left):
            self._buffers.read(buffer, tensor.view(torch.uint8), after=left)

    def arrive(self) -> None:
        """What is computed next finds the tensors `here`."""
        for buffer in self._taken:
            self._buffers.wait(buffer.read)

    def leave(self) -> None:
        """Starts copying back to the host what is computed now."""
        for index, (buffer, tensor) in enumerate(zip(self._taken, self.here)):
            self._buffers.write(buffer, tensor.view(torch.uint8))
            self._place.left[index] = buffer.written

    def settle(self) -> None:
        """Waits until the tensors are `there`."""
        for buffer in self._taken:
            if buffer.written is not None:
                buffer.written.synchronize()


class _Kept:
    """What one call of a block keeps on the host.

    previous  what the call before it keeps, which backward needs next
    """

    def __init__(self, buffers: Buffers, previous: _Kept | None) -> None:
        self.buffers, self.previous = buffers, previous
        self._copies: dict[tuple[int, int], _Copy] = {}  # (address, bytes) on the device -> copy
        self._here: list[Tensor] = []  # what may still be copied from

    def send(self, tensor: Tensor) -> _Sent:
        """Sends a tensor; what lies in the same memory as one that was sent is not sent again."""
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        key = tensor.data_ptr(), tensor.nbytes
        if key not in self._copies:
            self._copies[key] = _Copy(self.buffers, _bytes_of(tensor))
            self._here.append(tensor)
        return _Sent(self, self._copies[key], tensor)

    def let_go(self) -> None:
        """Frees the device's memory for what is computed after the copies."""
        if self._here:
            for copy in self._copies.values():
                self.buffers.wait(copy.buffer.written)
            self._here.clear()

    def fetch(self) -> None:
        """Starts bringing everything back."""
        self.let_go()
        for copy in self._copies.values():
            copy.fetch()


class _Copy:
    """Bytes of the device that are on the host, and on the device again once they are fetched."""

    def __init__(self, buffers: Buffers, source: Tensor) -> None:
        self.buffers = buffers
        self.buffer = buffers.take(source.numel())
        buffers.write(self.buffer, source)
        self.fetched: Tensor | None = None

    def fetch(self) -> None:
        if self.fetched is None:
            self.fetched = torch.empty(self.buffer.bytes.numel(), dtype=torch.uint8, device=self.buffers.device)
            self.buffers.read(self.buffer, self.fetched)

    def __del__(self) -> None:
        self.buffers.give_back(self.buffer)


class _Sent:
    """A tensor that was sent: which bytes it has, and how they are to be seen."""

    def __init__(self, kept: _Kept, copy: _Copy, tensor: Tensor) -> None:
        self.kept, self._copy = kept, copy
        self._view = tensor.dtype, tensor.size(), tensor.stride()

    def take(self) -> Tensor:
        """The tensor, for what is computed next."""
        dtype, size, stride = self._view
        assert self._copy.fetched is not None
        self.kept.buffers.wait(self._copy.buffer.read)
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
    """Page-locked bytes. torch's own allocator rounds sizes up to a power of two."""
    memory = torch.zeros(size, dtype=torch.uint8)
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
    if int(code):
        raise RuntimeError(f"the machine gives no more page-locked memory: {size / 2**30:.2f} GiB refused")
    return memory
