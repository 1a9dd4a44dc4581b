"""Gradients of weights that are gathered from shards travel in fp32, whatever the weights' type."""

from __future__ import annotations

import torch

from nnscaler.mesh import Mesh
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.gathering import Gathers
from tests.launch import run


def gradients_of_a_shard() -> list[list[float]]:
    """The gradient that arrives at this rank's half of a bf16 weight, along each dimension."""
    axes, found = Axes(Mesh((2,)), torch.device("cpu")), []

    def arrived(parameter, work, gradient):
        if work is not None:
            work.wait()
        found.append(gradient.flatten().tolist())

    for dim in (0, 1):
        gathers = Gathers(arrived)
        shape = (2, 4) if dim == 0 else (4, 2)
        shard = torch.full(shape, float(axes.rank), dtype=torch.bfloat16, requires_grad=True)
        whole = gathers.weight(shard, (axes[0], dim))
        assert [part.float().mean().item() for part in whole.chunk(2, dim)] == [0.0, 1.0]
        (whole * (1.0 if axes.rank == 0 else 2.0**-9)).sum().backward()
    return found


def test_a_term_that_bf16_would_round_away_arrives():
    for found in run(2, gradients_of_a_shard):
        assert found == [[1 + 2.0**-9] * 8] * 2
