"""Attention on a GPU, whose kernel a probe chooses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nnscaler.kernels.attention.choice import _probed
from nnscaler.operators.attention import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gradients(kernel: str, again: bool) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 8, 2048, 128), (1, 2, 2048, 128), (1, 2, 2048, 128)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, kernel=kernel)

    out = checkpoint(call, *inputs, use_reentrant=False) if again else call(*inputs)
    return list(torch.autograd.grad(out.float().square().sum(), inputs))


def test_the_probe_may_happen_in_what_is_computed_again():
    _probed.cache_clear()
    found = gradients("auto", again=True)
    wanted = gradients("sdpa", again=False)
    for a, b in zip(found, wanted):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
