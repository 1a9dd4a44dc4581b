"""When to save, and when to stop: the same answer on every rank at the same step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_SAVE, _STOP = 0, 1


class Due:
    """Decides, in every step and before its update, whether to save after it and whether to stop.

    steps    optimizer steps between saves; 0: not by steps
    minutes  minutes between saves, by rank 0's clock; 0: not by time
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self._steps, self._seconds = steps, 60 * minutes
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # training may use NCCL
        self._keeps_time = self._group is None or dist.get_rank() == 0
        self._saved_at = time.monotonic()
        self._postponed = False

    def after(self, step: int, stop: bool = False) -> tuple[bool, bool]:
        """(whether to save after this step, whether some rank was told to `stop`). Collective."""
        by_time = self._keeps_time and self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds
        wishes = torch.tensor([by_time, stop], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group)  # some 100 us beside a step
        save = bool(wishes[_SAVE]) or self._postponed or (self._steps > 0 and step % self._steps == 0)
        if save:
            self._saved_at, self._postponed = time.monotonic(), False
        return save, bool(wishes[_STOP])

    def postpone(self) -> None:
        """The save that is due happens after the next step instead. To be called on every rank, or on none."""
        self._postponed = True

    def any(self, here: bool) -> bool:
        """Whether something holds on some rank. Collective."""
        return not self.all(not here)

    def all(self, here: bool) -> bool:
        """Whether this holds on every rank. Collective."""
        answer = torch.tensor(int(here), dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._group)
        return bool(answer)
