"""Executing a model on a device, one operator at a time, with tensors that stay on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def run_on(device: torch.device, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)` on copies of the tensors on `device`. Results come back to the CPU.

    What it writes into an argument is written into the original. An argument that it returns is the original.
    """
    originals: dict[int, tuple[Tensor, Tensor, int]] = {}  # by id of the copy

    def move(tensor: Tensor) -> Tensor:
        copy = tensor.to(device, copy=True)
        originals[id(copy)] = (tensor, copy, copy._version)
        return copy

    def back(result: Tensor) -> Tensor:
        return originals[id(result)][0] if id(result) in originals else result.cpu()

    with _disable_current_modes():
        args, kwargs = pytree.tree_map_only(Tensor, move, (args, kwargs))
        results = function(*args, **kwargs)
        written = _written(function, args, kwargs)
        for tensor, copy, version in originals.values():
            if id(copy) in written or copy._version != version:
                tensor.copy_(copy)
        return pytree.tree_map_only(Tensor, back, results)


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Ids of the arguments that an ATen operator writes. Below autograd, their version numbers do not show this."""
    if not isinstance(function, torch._ops.OpOverload):
        return set()
    values = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs
    writes = {
        argument.name for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write
    }
    return {id(tensor) for name in writes & values.keys() for tensor in pytree.tree_leaves(values[name])}


class Offload(TorchDispatchMode):
    """Runs each ATen operator on `device`. Views, and what only makes tensors, run on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, kwargs)))
        if func.is_view or "device" in kwargs or not tensors:
            return func(*args, **kwargs)
        return run_on(self._device, func, args, kwargs)


class OffloadAttention(TorchFunctionMode):
    """Runs attention on `device` as a whole. Otherwise ATen would choose the CPU's kernel before `Offload` sees it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return run_on(self._device, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
