"""Gradients of weights are computed with the rest of backward, or after it; also where what is around is compiled."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler.kernels import later as kernels
from nnscaler.recompute import KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION
from nnscaler.runtime import later as module
from nnscaler.runtime import regions
from nnscaler.runtime.later import Later

LEVELS = (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION)
BACKENDS = (None, "aot_eager")  # None: not compiled


def mlp(x: Tensor, scale: Tensor, up: Any, down: Any, bias: Any) -> Tensor:
    """With weights that wait, or with plain ones."""
    linear: Callable[..., Tensor] = kernels.linear if isinstance(up, tuple) else F.linear
    inner = linear(x * scale, up, bias)
    return linear(F.silu(inner) * inner, down) + x


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 4), "scale": (4,), "up": (6, 4), "down": (4, 6), "bias": (6,)}
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def compiled(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> Callable[..., Any]:
    if backend is not None:
        monkeypatch.setattr(regions, "_on_accelerator", lambda args: True)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return regions.region(mlp)


def given(tensors: dict[str, Tensor], later: Later) -> list[Any]:
    up = later.weight(tensors["up"], [2, 3, 4], [2, 3, 6])
    down = later.weight(tensors["down"], [2, 3, 6], [2, 3, 4])
    return [tensors["x"], tensors["scale"], up, down, tensors["bias"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_gradients_are_those_of_a_plain_product_at_once_or_later(tensors, level, backend, monkeypatch):
    plain = mlp(*tensors.values())
    wanted = dict(zip(tensors, torch.autograd.grad(plain.sin().sum(), list(tensors.values()))))
    taken: list[tuple[Tensor, Tensor]] = []
    later = Later(lambda parameter, gradient: taken.append((parameter, gradient)))
    region = compiled(monkeypatch, backend)
    for waits in (False, True):
        later.waits = waits
        for tensor in tensors.values():
            tensor.grad = None
        made = region(level.name, *given(tensors, later))
        torch.testing.assert_close(made, plain)
        made.sin().sum().backward()
        rest = later.rest()
        assert taken == []
        here = ("x", "scale", "bias") if waits else tuple(tensors)
        assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [
            name for name in tensors if name in here
        ]
        for name in here:
            torch.testing.assert_close(tensors[name].grad, wanted[name])
        rest()
    assert [parameter is tensors[name] for (parameter, _), name in zip(taken, ("down", "up"))] == [True] * 2
    for (_, gradient), name in zip(taken, ("down", "up"), strict=True):
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_part_computes_only_gradients_of_weights_and_the_first_none(tensors, backend, monkeypatch):
    """Also where the first computes the region again."""
    products: list[tuple[tuple[int, ...], ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(tuple(tuple(arg.shape) for arg in args[-2:]))
            return op(*args, **(kwargs or {}))

    later = Later(lambda parameter, gradient: None)
    later.waits = True
    region = compiled(monkeypatch, backend)
    region(RECOMPUTES_ALL_BUT_ATTENTION.name, *given(tensors, later)).sum().backward()  # compiles
    later.rest()
    made = region(RECOMPUTES_ALL_BUT_ATTENTION.name, *given(tensors, later)).sum()
    up, down, dx_of_down, dx_of_up = ((6, 4), (4, 6)), ((6, 6), (6, 4)), ((6, 4), (4, 6)), ((6, 6), (6, 4))
    again = [up] if backend else [up, down]  # not compiled, a function is over before what it keeps is there
    with Watch():
        made.backward()
    assert products == [*again, dx_of_down, dx_of_up]
    products.clear()
    rest = later.rest()
    with Watch():
        rest()
    assert products == [((4, 6), (6, 6)), ((6, 6), (6, 4))], "dy^T x of each"


def test_what_products_hold_is_let_go_of_one_after_the_other(tensors):
    alive: list[list[bool]] = []
    held: list[weakref.ref[Tensor]] = []

    def take(parameter: Tensor, gradient: Tensor) -> None:
        alive.append([one() is not None for one in held])

    later = Later(take)
    for _ in range(3):
        x = torch.randn(2, 4)
        held.append(weakref.ref(x))
        later.leave(tensors["up"], x, torch.randn(2, 6))
    del x
    rest = later.rest()
    assert later.rest() is not rest
    later.rest()()
    assert alive == [], "what one backward left is not another's"
    rest()
    assert alive[1:] == [[False, True, True], [False, False, True]]


def test_a_product_that_nothing_depends_on_leaves_nothing(tensors):
    later = Later(lambda parameter, gradient: None)
    later.waits = True
    weight = later.weight(tensors["up"], [2, 3, 4], [2, 3, 6])
    kernels.linear(tensors["x"], weight)
    (weight.x.sum() * 0 + tensors["x"].sum()).backward()
    assert not later._left
    assert tensors["up"].grad is None


def test_places_take_no_memory(tensors):
    weight = Later(lambda parameter, gradient: None).weight(tensors["up"], [2, 3, 4], [2, 3, 6])
    assert [(tuple(one.shape), one.untyped_storage().nbytes()) for one in (weight.x, weight.dy)] == [
        ((2, 3, 4), 8), ((2, 3, 6), 8),
    ]  # fmt: skip
    assert weight.value.data_ptr() == tensors["up"].data_ptr()
    assert not weight.value.requires_grad


def test_without_gradients_a_weight_is_a_weight(tensors):
    with torch.no_grad():
        weight = Later(lambda parameter, gradient: None).weight(tensors["up"], [2, 3, 4], [2, 3, 6])
        made = kernels.linear(tensors["x"], weight)
    torch.testing.assert_close(made, F.linear(tensors["x"], tensors["up"]).detach())
    assert module.weight_gradient(torch.ones(5, 2), torch.ones(5, 3)).tolist() == [[5.0] * 2] * 3
