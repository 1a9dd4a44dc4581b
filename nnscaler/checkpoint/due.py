"""When to save, and when to stop: the same answer on every rank at the same step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

_SAVE, _STOP = 0, 1


class Due:
    """Asked after each step. A context: within it SIGTERM does not end the process, but is the wish to save and stop.

    steps    optimizer steps between saves; 0: not by steps
    minutes  minutes between saves, by rank 0's clock; 0: not by time
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self._steps, self._seconds = steps, 60 * minutes
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # training may use NCCL
        self._keeps_time = self._group is None or dist.get_rank() == 0
        self._terminated = False
        self._saved_at = time.monotonic()
        self._previous: object = None

    def __enter__(self) -> Due:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def after(self, step: int) -> tuple[bool, bool]:
        """(whether to save now, whether to stop then). Collective."""
        by_time = self._keeps_time and self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds
        wishes = torch.tensor([by_time, self._terminated], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group)  # some 100 us beside a step
        stop = bool(wishes[_STOP])
        save = stop or bool(wishes[_SAVE]) or (self._steps > 0 and step % self._steps == 0)
        if save:
            self._saved_at = time.monotonic()
        return save, stop
