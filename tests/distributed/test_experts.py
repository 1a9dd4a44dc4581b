"""Experts divided over devices, with their tokens, give what all in one place give, however uneven the choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler.operators.experts import experts
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.experts import experts_along_t_n
from tests import tiny
from tests.launch import run

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 24, 3, 8, 6, 5
GATED = {"gate": "transformers.integrations.moe:_default_apply_gate", "constants": {"act_fn": "silu"}}


def even(generator: torch.Generator) -> Tensor:
    return torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :CHOICES]


def all_to_the_first(generator: torch.Generator) -> Tensor:
    return torch.arange(CHOICES).repeat(TOKENS, 1)


def all_to_the_last(generator: torch.Generator) -> Tensor:
    return torch.arange(EXPERTS - CHOICES, EXPERTS).repeat(TOKENS, 1)


def some_without(generator: torch.Generator) -> Tensor:
    """Nobody chooses experts of even numbers."""
    return 2 * torch.rand(TOKENS, EXPERTS // 2, generator=generator).argsort(1)[:, :CHOICES] + 1


def one_device_sends_nothing_away(generator: torch.Generator) -> Tensor:
    return torch.cat([torch.arange(CHOICES).repeat(TOKENS // 2, 1), even(generator)[TOKENS // 2 :]])


CHOSEN = [even, all_to_the_first, all_to_the_last, some_without, one_device_sends_nothing_away]


def example(choose: Callable[[torch.Generator], Tensor], biased: bool) -> tuple[list[Tensor], Tensor]:
    """(arguments, gradient of the result), the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def real(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    tensors = [real(TOKENS, WIDTH), choose(generator), real(TOKENS, CHOICES)]
    tensors += [real(EXPERTS, 2, INNER, WIDTH), real(EXPERTS, WIDTH, INNER)]
    tensors += [real(EXPERTS, 2, INNER)] if biased else []
    return tensors, real(TOKENS, WIDTH)


def results(function: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The function's result, and the gradients of its arguments."""
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], gradient)]


def on_a_device(world: int) -> list[list[np.ndarray]]:
    """The results of this process' tokens and experts, for each case."""
    import torch.distributed as dist

    rank = dist.get_rank()
    axis = Axis(world, rank, dist.group.WORLD)
    found = []
    for choose in CHOSEN:
        for biased in (False, True):
            tensors, gradient = example(choose, biased)
            parts = [tensor.chunk(world)[rank] for tensor in (*tensors, gradient)]
            made = results(lambda *args: experts_along_t_n(axis, *args, **GATED), parts[:-1], parts[-1])
            found.append([tensor.numpy() for tensor in made])  # which travel to the test as they are
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_tokens_travel_to_their_experts_and_back(world):
    devices = run(world, on_a_device, world)
    cases = [(choose, biased) for choose in CHOSEN for biased in (False, True)]
    for (choose, biased), *parts in zip(cases, *devices):
        tensors, gradient = example(choose, biased)
        wanted = results(lambda *args: experts(*args, **GATED), tensors, gradient)
        for whole, *shards in zip(wanted, *parts):
            found = torch.from_numpy(np.concatenate(shards))
            assert tiny.close(found, whole) < 1e-12, choose.__name__
