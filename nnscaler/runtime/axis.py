"""The devices along one axis of the mesh, which communicate with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The group of ranks along one mesh axis through this rank.

    size   how many ranks it has
    rank   this rank's place in it
    group  the process group; None: the axis has one device
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None  # None where the axis has one device


ALONE = Axis(1, 0, None)
