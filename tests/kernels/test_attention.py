"""Attention on the CPU against a softmax written out in fp64, with scales, masks and lengths that are no default."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler import UserError
from nnscaler.kernels import KERNELS, attend, attend_to_prefix
from nnscaler.kernels import attention as module
from nnscaler.operators.attention import attention


def inputs(heads: int, shared: int, rows: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 6), (2, shared, keys, 6), (2, shared, keys, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool) -> Tensor:
    """[b, l, h, e]; a causal mask ends with the last row, which sees all keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        rows, keys = scores.shape[2:]
        scores = scores.masked_fill(torch.arange(keys) > torch.arange(rows).unsqueeze(1) + keys - rows, -math.inf)
    return (scores.softmax(3) @ value).transpose(1, 2)


def assert_right(call: Callable[..., Tensor], tensors: list[Tensor], *arguments: Any) -> None:
    """Values and gradients of `call(*tensors)` are those of what is written out."""
    found, wanted = call(*tensors), written_out(*tensors, *arguments)
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn(wanted.shape, dtype=wanted.dtype)
    pairs = zip(*(torch.autograd.grad(result, tensors, gradient) for result in (found, wanted)))
    for mine, right in pairs:
        torch.testing.assert_close(mine, right)


SIZES = [(4, 4, 7, 7), (4, 2, 7, 7), (4, 2, 5, 9)]  # heads, key-value heads, rows, keys


CASES = list(product(SIZES, (None, 0.05, 2.0), (True, False)))


@pytest.mark.parametrize(("sizes", "scale", "is_causal"), CASES)
def test_every_argument_counts(sizes, scale, is_causal):
    tensors = inputs(*sizes)
    assert_right(lambda q, k, v: attend(q, k, v, scale, is_causal, "auto"), tensors, scale, is_causal)
    assert_right(lambda q, k, v: attention(q, k, v, scale, is_causal), tensors, scale, is_causal)


def test_some_rows_of_a_longer_sequence():
    query, key, value = inputs(4, 2, 3, 9)
    found = attend_to_prefix(query, key, value, 0.3, "auto", 7)
    torch.testing.assert_close(found, written_out(query, key[:, :, :7], value[:, :, :7], 0.3, True))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Any:
    """As flash-attn's libraries have it: [b, l, h, d]; some give the scores' logarithms beside the result."""
    return written_out(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal), None


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_given_every_argument(kernel, monkeypatch):
    """Those of libraries that are not here are stood in for by what they are documented to do."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=flash_attention))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(module, "sdpa_kernel", lambda backends: nullcontext())
    run = KERNELS[kernel]()
    for sizes, scale, is_causal in CASES[1::4]:
        tensors = inputs(*sizes)
        turned = lambda *qkv: run(*(x.transpose(1, 2) for x in qkv), scale, is_causal)  # noqa: B023, E731
        assert_right(turned, tensors, scale, is_causal)


def test_a_kernel_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="attention kernel 'flash_attention_3' is not installed"):
        module._load("flash_attention_3")
