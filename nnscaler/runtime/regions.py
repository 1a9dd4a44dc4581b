"""Regions of generated code: computation without communication, compiled on GPUs, and recomputed as planned."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config

from nnscaler.recompute import level_of

# Gradients that come with the strides of the outputs that they belong to are taken as they are. As torch 2.13 has it by
# default; 2.11 copies those of attention's inputs, which are transposed.
torch._functorch.config.guess_tangent_strides_as_outputs = True

_numbers = itertools.count()


def region(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a region `call(keep, *args)`, where `keep` is the name of a recompute level.

    On a GPU it is compiled, once for each way in which levels run it. Without gradients nothing is kept, and there is
    one way.
    """
    compiled: dict[Callable[..., Any] | None, Callable[..., Any]] = {}

    @functools.wraps(function)
    def call(keep: str, *args: Any) -> Any:
        way = level_of(keep).region if torch.is_grad_enabled() else None
        if not _on_accelerator(args):
            return function(*args) if way is None else way(function, *args)
        if way not in compiled:
            wrapped = function if way is None else _bound(way, function)
            compiled[way] = torch.compile(wrapped, dynamic=False, fullgraph=True)
        return compiled[way](*args)

    return call


def _bound(way: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`way(function, *args)` as a function with code of its own: torch compiles few variants of one code object."""

    def run(*args: Any) -> Any:
        return way(function, *args)

    code = run.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, run.__globals__, closure=run.__closure__)


def _on_accelerator(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
