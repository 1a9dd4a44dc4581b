"""Regions are compiled each on its own, however many a model has."""

from __future__ import annotations

import functools

import torch

from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL_BUT_ATTENTION
from nnscaler.runtime import regions


def test_more_regions_than_torch_compiles_one_function_anew(monkeypatch):
    monkeypatch.setattr(regions, "_on_accelerator", lambda args: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x = torch.ones(3, requires_grad=True)
    for count in range(torch._dynamo.config.recompile_limit + 2):
        space: dict = {}
        exec(f"def add(x):\n    return x + {count}", space)  # as in generated code: each has lines of its own
        region = regions.region(space["add"])
        assert torch.equal(region(RECOMPUTES_ALL_BUT_ATTENTION.name, x), x + count)


def test_a_region_runs_again_in_backward_where_its_level_says_so():
    calls = []

    def squares(x):
        calls.append(torch.is_grad_enabled())
        return x.sin().square()

    region, x = regions.region(squares), torch.ones(3, requires_grad=True)
    for level, times in ((KEEPS_ALL, 1), (RECOMPUTES_ALL_BUT_ATTENTION, 2)):
        calls.clear()
        region(level.name, x).sum().backward()
        assert len(calls) == times
    calls.clear()
    with torch.no_grad():
        assert torch.equal(region(RECOMPUTES_ALL_BUT_ATTENTION.name, x), squares(x))
    assert calls == [False, False]
    assert region.__name__ == "squares"
