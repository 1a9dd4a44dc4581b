"""What a compiled module computes, beside what its model computes in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nnscaler.runtime.module import ParallelModule

Pair = tuple[Tensor, Tensor]  # of the compiled module, of the model


def beside_plain(
    code: Path, make: Callable[[], nn.Module], x: Tensor
) -> tuple[nn.Module, Pair, list[tuple[str, Tensor, Tensor]]]:
    """On one process, with the same weights: (the model; losses of `x`; for each part of a parameter its name, and
    gradients)."""
    torch.manual_seed(0)
    found, plain = ParallelModule(code, torch.device("cpu")), make()
    weights = dict(plain.named_parameters())
    found.load(lambda name, box: weights[name].detach()[box.slices])
    loss = plain(x)
    loss.backward()
    losses = found.accumulate([{"x": x}]), loss.detach()
    gradients = []
    for bucket in found.buckets:
        for part in bucket.owned_parts():
            mine = bucket.gradient[part.start : part.stop].view(part.box.sizes)
            gradients.append((part.name, mine, weights[part.name].grad[part.box.slices]))
    return plain, losses, gradients
