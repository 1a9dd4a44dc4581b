"""Attention under masks on the CPU: torch's with one mask for all rows to the last bit, and gradients as exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler.kernels import Asked, Documents, attend
from nnscaler.kernels.attention import choice, masked, rows

# rows, keys, heads, key-value heads, (first, left, right), length of documents; of several blocks and tiles
CASES: list[tuple[int, int, int, int, tuple[int, int | None, int | None], int | None]] = [
    (40, 40, 4, 2, (0, 7, 0), None),
    (700, 700, 2, 1, (0, 99, 0), None),
    (1100, 1100, 2, 2, (0, 600, 0), 311),
    (300, 1100, 4, 1, (500, 5, 3), None),
    (300, 1100, 2, 2, (800, None, 0), 211),
]


def tensors(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[list[Tensor], Asked]:
    """query [2, l, h, d], key and value [2, s, k, d], and gradient of the result; what is asked"""
    length, keys, heads, shared, (first, left, right), document = case
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 8), (2, keys, shared, 8), (2, keys, shared, 8), (2, length, heads, 8)]
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    documents = None if document is None else Documents((torch.arange(keys) // document).expand(2, -1))
    return found, Asked(0.4, first, left, right, documents=documents)


def by_one_mask(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """As transformers calls torch's function: heads are repeated, and a mask says for each row what it sees."""
    places, others = torch.arange(query.shape[1]).unsqueeze(1) + asked.first, torch.arange(key.shape[1])
    sees = torch.ones(len(query), 1, query.shape[1], key.shape[1], dtype=torch.bool)
    if asked.left is not None:
        sees &= others >= places - asked.left
    if asked.right is not None:
        sees &= others <= places + asked.right
    if asked.documents is not None:
        numbers = asked.documents.numbers
        sees &= (numbers[:, places] == numbers[:, None])[:, None]
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    parts = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*parts, attn_mask=sees, scale=asked.scale).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_under_one_mask_to_the_last_bit(case, dtype, monkeypatch):
    (query, key, value, _), asked = tensors(case, dtype)
    wanted = by_one_mask(query, key, value, asked)
    assert torch.equal(masked.attend_under_masks(query, key, value, asked), wanted)
    monkeypatch.setattr(masked, "_MASK", 64 * 2**10)  # blocks of a few rows
    torch.testing.assert_close(masked.attend_under_masks(query, key, value, asked), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_as_exact_as_those_by_rows(case):
    """In bf16, beside fp64: torch's own are up to twice as far."""
    found, asked = tensors(case, torch.bfloat16)
    gradient = found.pop()
    wide = [x.double().requires_grad_() for x in found]
    exact = torch.autograd.grad(rows.attend_by_rows(*wide, asked), wide, gradient.double())
    errors = []
    for run in (masked.attend_under_masks, rows.attend_by_rows):
        inputs = [x.clone().requires_grad_() for x in found]
        gradients = torch.autograd.grad(run(*inputs, asked), inputs, gradient)
        assert {x.dtype for x in gradients} == {torch.bfloat16}
        errors.append([float((x - y).norm() / y.norm()) for x, y in zip(gradients, exact)])
    for mine, right in zip(*errors):
        assert mine < 1.2 * right + 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_by_rows_in_fp64(case):
    """Also of inputs and gradients whose heads do not lie in one piece."""
    found, asked = tensors(case, torch.float64)
    *inputs, gradient = (x.mT.contiguous().mT.requires_grad_() for x in found)
    mine, right = (run(*inputs, asked) for run in (masked.attend_under_masks, rows.attend_by_rows))
    torch.testing.assert_close(mine, right)
    for x, y in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (mine, right))):
        torch.testing.assert_close(x, y)


def test_masks_take_the_calls_that_they_can(monkeypatch):
    """Windows and documents, where values have the size of keys; the rest is for `rows`."""
    (query, key, value, _), asked = tensors(CASES[0], torch.float32)
    taken = []
    monkeypatch.setattr(masked, "attend_under_masks", lambda *call: taken.append(call) or call[0])
    parts = [x.transpose(1, 2) for x in (query, key, value)]
    attend(*parts, asked, "auto")
    attend(*parts, replace(asked, left=None, documents=Documents(torch.arange(40).expand(2, -1) // 9)), "auto")
    assert len(taken) == 2
    attend(*parts, replace(asked, left=None), "auto")
    attend(*parts, replace(asked, softcap=3.0), "auto")
    attend(*parts[:2], parts[2][..., :4], asked, "auto")
    assert len(taken) == 2
    assert choice._chosen(query, key, value, asked, frozenset({"windows", "sinks"}), "auto") is rows.attend_by_rows
