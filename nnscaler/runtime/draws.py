"""Telling a compiled model what random numbers each of its micro-batches draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from nnscaler.kernels.random import DRAWS, draws_of, no_draws
from nnscaler.runtime.axes import Axes

Inputs = Mapping[str, Tensor]


def with_draws(micro_batches: Iterable[Inputs], axes: Axes, seed: int, step: int) -> Iterator[Inputs]:
    """The micro-batches of a step, on one copy of the model. Each draws other numbers, those of other copies too.

    Micro-batch m of copy r is number m * copies + r, as samples are dealt out (`nnscaler.data.training.Share`).
    """
    for index, inputs in enumerate(micro_batches):
        yield {**inputs, DRAWS: draws_of(seed, step, index * axes.mesh.replicas + axes.replica, axes.device)}


def without_draws(micro_batches: Iterable[Inputs], axes: Axes) -> Iterator[Inputs]:
    """Micro-batches in which nothing is dropped."""
    draws = no_draws(axes.device)
    for inputs in micro_batches:
        yield {**inputs, DRAWS: draws}
