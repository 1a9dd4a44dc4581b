"""Attention on a GPU, whose kernel a probe chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnscaler import UserError
from nnscaler.kernels.attention import KERNELS, Asked, attend
from nnscaler.kernels.attention.choice import _load, _probed
from nnscaler.kernels.attention.rows import attend_by_rows
from nnscaler.kernels.documents import Documents
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


# rows, keys, place of the first row, heads, key-value heads, size of query and key, size of values
SHAPES = {
    "whole": (640, 640, 0, 8, 2, 128, 128),
    "last rows": (256, 640, 384, 8, 2, 128, 128),
    "rows between": (256, 640, 128, 4, 4, 128, 128),
    "MLA": (640, 640, 0, 4, 4, 192, 128),
    "small heads": (640, 640, 0, 4, 1, 64, 64),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"right": 0},
    "full": {},
    "window": {"left": 100, "right": 0},
    "window of two sides": {"left": 50, "right": 70},
    "soft cap": {"right": 0, "softcap": 20.0},
    "sinks": {"right": 0, "sinks": True},
    "ALiBi": {"right": 0, "slopes": True},
    "documents": {"right": 0, "documents": True},
    "documents, full": {"documents": True},
    "documents, window": {"left": 30, "right": 0, "documents": True},
    "window, soft cap, scale": {"left": 100, "right": 0, "softcap": 20.0, "scale": 0.2},
    "window, sinks": {"left": 100, "right": 0, "sinks": True},
}


def call(shape: tuple[int, ...], given: dict[str, Any]) -> tuple[list[Tensor], Asked, Tensor]:
    """(query, key, value, what is asked, gradient of the result) of two sequences."""
    rows, keys, first, heads, shared, size, value_size = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    tensors = [draw(2, rows, heads, size), draw(2, keys, shared, size), draw(2, keys, shared, value_size)]
    asked = Asked(given.get("scale", size**-0.5), first, given.get("left"), given.get("right"), given.get("softcap"))
    if given.get("sinks"):
        asked = replace(asked, sinks=draw(heads).requires_grad_())
    if given.get("slopes"):
        asked = replace(asked, slopes=torch.linspace(0.01, 0.3, heads, device="cuda"))
    if given.get("documents"):
        # documents of one token, and such as have none of the rows; the last rows are those of other documents
        borders = torch.tensor([[1, 7, 130, 131, 300, 600], [64, 128, 256, 384, 500, 639]], device="cuda")
        places = torch.arange(keys, device="cuda").expand(2, -1).contiguous()
        asked = replace(asked, documents=Documents(torch.searchsorted(borders, places, right=True)))
    return [x.requires_grad_() for x in tensors], asked, draw(2, rows, heads, value_size)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "rows"])
def test_every_kernel_computes_what_it_says_that_it_can(kernel, shape, options):
    """Its error in bf16 against plain PyTorch in fp32, results and gradients."""
    tensors, asked, gradient = call(SHAPES[shape], OPTIONS[options])
    wanted = tensors if asked.sinks is None else [*tensors, asked.sinks]
    if not asked.options(tensors[0].shape[1], tensors[1].shape[1]) <= KERNELS[kernel].can:
        pytest.skip("not said to be able")
    try:
        _load(kernel)
    except UserError as error:
        pytest.skip(str(error))
    try:
        result = attend(*(x.transpose(1, 2) for x in tensors), asked, kernel)
        found = [result.detach(), *torch.autograd.grad(result, wanted, gradient)]
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        pytest.skip(f"does not work here: {type(error).__name__}: {str(error)[:200]}")
    exact = [x.detach().float().requires_grad_() for x in tensors]
    if asked.sinks is not None:
        asked = replace(asked, sinks=asked.sinks.detach().float().requires_grad_())
        exact.append(asked.sinks)
    result = attend_by_rows(*exact[:3], asked)
    for mine, right in zip(found, [result, *torch.autograd.grad(result, exact, gradient.float())]):
        assert mine.isfinite().all()
        assert (mine.float() - right).norm() < 0.02 * right.norm()
