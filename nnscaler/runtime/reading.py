"""What the host learns from the device, and when. To ask a GPU for a number waits for all that it was given before. So
a number is copied to the host beside what comes next, and read later.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Reading:
    """The numbers of a tensor as they are now. Only `numbers` waits for the device, until it has computed them."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._here = tensor.to("cpu", non_blocking=True)  # to page-locked memory
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._here = tensor.clone()

    def numbers(self) -> list[float]:
        """All of them, in a row."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._here.flatten().tolist()


class Moment:
    """When the device has computed what it has been given so far. Nothing waits for that."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, later: Moment) -> float:
        """The seconds between two moments of one device. Waits for the later one."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3
