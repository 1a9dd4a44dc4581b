"""Runs a function on ranks that are threads of this process, with stand-ins for the collectives of a group.

It takes milliseconds where processes take seconds: so any number of ranks can be tried, such as three or eleven. What
really communicates is tested in `tests/distributed`.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from nnscaler.runtime.axis import Axis


class Ranks:
    """What the threads share: each puts down a value, and all get those of all."""

    def __init__(self, count: int) -> None:
        self.count, self._values = count, [None] * count
        self._barrier = threading.Barrier(count, timeout=60)
        self._sent: defaultdict[tuple[int, int, int], Queue[Tensor]] = defaultdict(Queue)
        self._numbers: Counter[tuple[str, int, int]] = Counter()  # of what was sent, or received, between two ranks
        self._lock = threading.Lock()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(axis, *args)` on each rank; what each gives. An error in one is raised here."""

        def on(rank: int) -> Any:
            try:
                return function(Axis(self.count, rank, Group(self, rank)), *args)  # type: ignore[arg-type]
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(on, rank) for rank in range(self.count)]
        errors = [future.exception() for future in futures]
        first = next(
            (error for error in errors if not isinstance(error, (threading.BrokenBarrierError, type(None)))), None
        )
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def run_on_grid(self, sizes: tuple[int, ...], function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(axes, *args)` on each rank: the groups along each axis of a grid, the last axis counted first."""
        lines: dict[tuple[int, tuple[int, ...]], Ranks] = {}
        for rank in range(self.count):
            for number, key in self._lines(rank, sizes):
                lines.setdefault((number, key), Ranks(sizes[number]))

        def on(every: Axis) -> Any:
            place = _place(every.rank, sizes)
            found = [lines[line] for line in self._lines(every.rank, sizes)]
            axes = [Axis(one.count, at, Group(one, at) if one.count > 1 else None) for one, at in zip(found, place)]  # type: ignore[arg-type]
            return function(axes, *args)

        return self.run(on)

    def _lines(self, rank: int, sizes: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        place = _place(rank, sizes)
        return [(number, (*place[:number], -1, *place[number + 1 :])) for number in range(len(sizes))]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def message(self, kind: str, source: int, target: int) -> Queue[Tensor]:
        """Where the next message from one rank to another is put down. `kind`: who asks, "isend" or "irecv\""""
        with self._lock:
            self._numbers[kind, source, target] += 1
            return self._sent[source, target, self._numbers[kind, source, target]]


def _place(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        rank, at = divmod(rank, size)
        place.append(at)
    return tuple(reversed(place))


class Group:
    """The group of all ranks, as one of them has it."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def all(self, tensor: Tensor) -> list[Tensor]:
        return self.ranks.exchange(self.rank, tensor.detach().clone())


class Later:
    """A result that is there once it is waited for."""

    def __init__(self, target: Tensor, value: Tensor) -> None:
        self._target, self._value = target, value

    def wait(self) -> None:
        self._target.copy_(self._value)


def _done(target: Tensor, value: Tensor, async_op: bool) -> Later | None:
    later = Later(target, value.view(target.shape))
    if not async_op:
        later.wait()
    return later if async_op else None


def _check(*tensors: Tensor) -> None:
    """As the real ones ask for it."""
    assert len({tensor.dtype for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() for tensor in tensors)


def all_reduce(tensor: Tensor, group: Group, async_op: bool = False) -> Later | None:
    _check(tensor)
    return _done(tensor, torch.stack(group.all(tensor)).sum(0), async_op)


def all_gather_single(output: Tensor, tensor: Tensor, group: Group, async_op: bool = False) -> Later | None:
    _check(output, tensor)
    return _done(output, torch.stack(group.all(tensor)), async_op)


def reduce_scatter_single(output: Tensor, tensor: Tensor, group: Group, async_op: bool = False) -> Later | None:
    _check(output, tensor)
    return _done(output, torch.stack(group.all(tensor)).sum(0).chunk(group.ranks.count)[group.rank], async_op)


def all_to_all_single(
    output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None,
    group: Any = None, async_op: bool = False,
) -> Later | None:  # fmt: skip
    _check(output, tensor)
    parts = tensor.chunk(group.ranks.count) if sent is None else tensor.split(sent)
    everyone = group.ranks.exchange(group.rank, [part.detach().clone() for part in parts])
    mine = [parts[group.rank] for parts in everyone]
    assert received is None or [len(part) for part in mine] == received
    return _done(output, torch.cat(mine), async_op)


@dataclass
class P2POp:
    """A message to another rank ("isend"), or from it ("irecv")."""

    op: str
    tensor: Tensor
    group: Group
    group_peer: int


class _Message:
    def __init__(self, operation: P2POp) -> None:
        _check(operation.tensor)
        group, peer = operation.group, operation.group_peer
        pair = (group.rank, peer) if operation.op == "isend" else (peer, group.rank)
        self._queue, self._target = group.ranks.message(operation.op, *pair), operation.tensor
        self._is_open = operation.op == "irecv"
        if not self._is_open:
            self._queue.put(operation.tensor.detach().clone())

    def wait(self) -> None:
        if self._is_open:
            value = self._queue.get(timeout=60)
            assert (value.shape, value.dtype) == (self._target.shape, self._target.dtype)
            self._target.copy_(value)
        self._is_open = False


def batch_isend_irecv(operations: list[P2POp]) -> list[_Message]:
    return [_Message(operation) for operation in operations]
