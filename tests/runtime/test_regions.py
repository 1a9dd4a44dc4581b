"""Regions are compiled each on its own, however many a model has."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler.recompute import KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION
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


def test_one_tensor_on_a_gpu_among_other_arguments_is_enough_for_a_region_to_be_compiled():
    with FakeTensorMode():
        here, there = torch.empty(1), torch.empty(1, device="cuda")
        assert regions._on_accelerator((2, here, there))
        assert not regions._on_accelerator((2, here))


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


def test_on_a_gpu_each_way_to_run_a_region_is_compiled_once(monkeypatch):
    """Whole, and for the sizes that there are. Without gradients there is nothing to keep, and one way."""
    compiled = []

    def compile_(function, **options):
        compiled.append((function, options))
        return function

    def sines(x):
        return x.sin()

    monkeypatch.setattr(regions, "_on_accelerator", lambda args: True)
    monkeypatch.setattr(torch, "compile", compile_)
    region, x = regions.region(sines), torch.ones(3, requires_grad=True)
    for _ in range(2):
        for level in (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION):
            assert torch.equal(region(level.name, x), x.sin())
            with torch.no_grad():
                assert torch.equal(region(level.name, x), x.sin())
    assert [options for _, options in compiled] == [{"dynamic": False, "fullgraph": True}] * 3
    plain, products, again = (function for function, _ in compiled)
    assert plain is sines, "as it is: with all kept, and without gradients"
    names = [function.__code__.co_name for function in (products, again)]
    assert all(name.startswith("sines_") for name in names)
    assert len(set(names)) == 2


class Counted(TorchDispatchMode):
    """Counts operators as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "product", "times"), [
    ("aten.mm.default", lambda x, w: x @ w, 1 + 2),
    ("aten.bmm.default", lambda x, w: torch.bmm(x[None], w[None]), 1 + 2),
    ("aten.addmm.default", lambda x, w: torch.addmm(w[0], x, w), 1),
])  # fmt: skip
def test_products_are_kept_and_all_else_runs_again(op, product, times):
    """A product runs in forward, and for the gradients of both factors; of addmm these are products without a sum."""
    x, w = torch.rand(3, 4, requires_grad=True), torch.rand(4, 5, requires_grad=True)

    def between(x, w):
        return product(x.exp(), w).sin()

    region = regions.region(between)
    found = {}
    for level in (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION):
        with Counted() as counted:
            gradients = torch.autograd.grad(region(level.name, x, w).sum(), (x, w))
        found[level] = (counted.ran[op], counted.ran["aten.exp.default"])
        for mine, right in zip(gradients, torch.autograd.grad(between(x, w).sum(), (x, w))):
            torch.testing.assert_close(mine, right)
    assert found == {
        KEEPS_ALL: (times, 1), KEEPS_PRODUCTS: (times, 2), RECOMPUTES_ALL_BUT_ATTENTION: (times + 1, 2)
    }  # fmt: skip
