"""How devices add up their terms of a gradient, of which each gets a slice."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradientSum:
    """One way to add up gradients.

    collective  "reduce_scatter" adds terms on their way, in the type in which they travel. "all_to_all" brings each
                device the terms of its slice, and it adds them in fp32
    travels_as  the type in which terms travel: "float32" (wider ones keep their type) or "bfloat16"

    In bf16, half as much travels. By "all_to_all", each term is then rounded once, and one that is in bf16 anyway not
    at all. By "reduce_scatter", sums are rounded again at every device that they pass.
    """

    collective: str = "reduce_scatter"
    travels_as: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a term that travels."""
        return self.dtype(torch.bfloat16).itemsize

    def dtype(self, gradient: torch.dtype) -> torch.dtype:
        """In which a gradient of this type travels."""
        travels_as: torch.dtype = getattr(torch, self.travels_as)
        return torch.promote_types(gradient, travels_as) if self == IN_FP32 else travels_as


IN_FP32 = GradientSum()


def gradient_sum(dtype: str, devices: int, devices_per_node: int) -> GradientSum:
    """The way for terms that are to travel as `dtype`, "fp32" or "bf16", among so many devices.

    Across nodes it is by reduce-scatter: an all-to-all would send several times as much from node to node.
    """
    if dtype == "fp32":
        return IN_FP32
    return GradientSum("all_to_all" if devices <= devices_per_node else "reduce_scatter", "bfloat16")
