"""The scales of weights that are gathered in fp8 (see `nnscaler.kernels.fp8`).

A weight has one scale, by its largest element on all devices. So what is gathered is what would have been made of the
weight after it was gathered, to the last bit. (On two mesh axes, a product may take a part of a weight, which alone
would have a scale of its own.) The scales of a bucket are found once it is updated, beside the next
forward: each rank looks at what it owns, and a number for each weight is exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.kernels.fp8 import by_largest
from nnscaler.runtime.axis import Axis


class Scales:
    """The scales of some weights; of one that lies in several buckets, those of its parts.

    parts  id of a weight -> what this rank owns of it here, maybe nothing. Ranks have the same weights, in one order
    dtype  the type in which the weights are used, whatever the parts are stored in
    every  all devices that own any of these
    """

    def __init__(self, parts: Mapping[int, Tensor], dtype: torch.dtype, every: Axis) -> None:
        self._parts, self._dtype, self._every = list(parts.values()), dtype, every
        self._places = {weight: place for place, weight in enumerate(parts)}
        self._values = torch.zeros(len(parts), device=self._parts[0].device)
        self._known = False
        self._exchange: dist.Work | None = None

    @torch.no_grad()
    def find(self) -> None:
        """Starts finding them, after what is computed now."""
        self._wait()
        for value, part in zip(self._values, self._parts):
            if len(part):
                value.copy_(torch.linalg.vector_norm(part, math.inf, dtype=torch.float32))
            else:
                value.zero_()
        self._values.copy_(by_largest(self._values.to(self._dtype).float()))  # to round keeps the order
        if self._every.group is not None:
            self._exchange = dist.all_reduce(self._values, dist.ReduceOp.MAX, self._every.group, async_op=True)
        self._known = True

    def forget(self) -> None:
        """To be called when weights have changed in another way than by an update. All ranks must."""
        self._known = False

    def of(self, weight: Tensor) -> Tensor:
        """The scale [] of a weight, after all that it depends on. It is the reader's own."""
        if not self._known:
            self.find()
        self._wait()
        return self._values[self._places[id(weight)]].clone()

    def _wait(self) -> None:
        """Makes what is computed next come after an exchange that is under way: that writes to the values."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None


def scale_of(weight: Tensor, parts: Sequence[Scales]) -> Tensor:
    """The scale of a weight that lies in several buckets."""
    first, *others = (one.of(weight) for one in parts)
    for other in others:
        first = torch.maximum(first, other)
    return first
