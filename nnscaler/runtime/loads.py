"""How even the loads of experts are, for the logs of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.kernels import counting
from nnscaler.placement import REPLICATE
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.reading import Reading


class ExpertLoads:
    """Counts how often each expert is chosen, for each call of a mixture in forward."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._counts: list[Tensor] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, choices are counted."""
        token = counting.set(self._count)
        try:
            yield
        finally:
            counting.reset(token)

    def _count(self, chosen: Tensor, experts: int) -> None:
        flat = chosen.flatten()
        counts = torch.zeros(experts, dtype=torch.float64, device=flat.device)
        self._counts.append(counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float64)))

    def report(self) -> Callable[[], dict[str, float]]:
        """What reads the evenness of what was counted since the last report, over the samples of all ranks, on average
        over the calls. Collective.

        experts/busiest  tokens of the busiest expert, over those of an average expert: 1 where loads are even
        experts/idle     the part of the experts that no token has chosen, 0 to 1

        Empty where there are no experts.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self._axes.device)  # of both, and calls
        if self._counts:  # a rank has the same calls as others that run the same part of the model
            counts = torch.cat(self._counts)
            together = self._axes.owners((REPLICATE,) * len(self._axes.mesh.sizes))
            if together.group is not None:
                dist.all_reduce(counts, group=together.group)
            for one in counts.split([len(each) for each in self._counts]):
                sums += torch.stack([one.max() / one.mean(), (one == 0).double().mean(), one.new_ones(())])
            self._counts = []
        if dist.is_initialized():
            dist.all_reduce(sums)
        found = Reading(sums)

        def read() -> dict[str, float]:
            busiest, idle, calls = found.numbers()
            return {"experts/busiest": busiest / calls, "experts/idle": idle / calls} if calls else {}

        return read
