"""How fast devices copy to their host and back. `nnscaler.profiler.benchmark_comm` is the command that measures
this."""

from __future__ import annotations

import torch

from nnscaler.hardware.communication import CopyRates
from nnscaler.profiler.timing import slowest_median

SIZE = 2**28  # bytes: large enough for the rate of all that is larger


def measure_copies(device: torch.device) -> CopyRates:
    """The rates of the slowest device, while all devices copy at once, as they share the memory of their host.
    Collective."""
    sent, fetched = (torch.empty(SIZE, dtype=torch.uint8, device=device) for _ in range(2))
    written, read = (torch.empty(SIZE, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    other = torch.cuda.Stream(device)

    def to_host() -> None:
        written.copy_(sent, non_blocking=True)

    def to_device() -> None:
        fetched.copy_(read, non_blocking=True)

    def both_ways() -> None:
        current = torch.cuda.current_stream(device)
        other.wait_stream(current)
        with torch.cuda.stream(other):
            to_device()
        to_host()
        current.wait_stream(other)

    return CopyRates(*(SIZE / slowest_median(call, device) for call in (to_host, to_device, both_ways)))
