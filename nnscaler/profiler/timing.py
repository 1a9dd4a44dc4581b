"""How long the slowest device takes for something that all devices do at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUDGET = 0.1  # seconds of repetitions of one call
REPEATS = (3, 100)
AHEAD = 200_000  # cycles of the device, about 0.1 ms: more than the host takes to start a call


def slowest_median(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the call: the median of each rank, and the largest of these."""
    call()  # The first opens connections.
    once = _slowest(_median_seconds(call, device, 1), device)
    fewest, most = REPEATS
    repeats = min(max(int(BUDGET / once), fewest), most)
    return _slowest(_median_seconds(call, device, repeats), device)


def _median_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    dist.barrier()
    if device.type == "cuda":
        # The device waits until the host is ahead of it: what is timed is its work, not the host's.
        torch.cuda._sleep(repeats * AHEAD)
    marks = [_mark(device)]
    for _ in range(repeats):
        call()
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks)) / 1000
    return statistics.median(end - begin for begin, end in pairwise(marks))


def _mark(device: torch.device) -> Any:
    """A point in time: in the device's stream of work, or on the clock where there is no such stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _slowest(seconds: float, device: torch.device) -> float:
    value: Tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)
