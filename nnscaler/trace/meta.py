"""Building a model without its weights, but with the values of its buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Factories whose results have no particular value: what a parameter is made of before it is initialised.
_VALUELESS = {torch.empty, torch.rand, torch.randn, torch.normal, torch.empty_strided}


# Functions, of torch.nn.init, of Tensor, or that stand in for them, that give a tensor its first values. On the meta
# device they do nothing, and take a millisecond a tensor for that.
_FILLS = {"normal_", "uniform_", "zero_", "zeros_", "ones_", "fill_", "constant_", "kaiming_uniform_", "trunc_normal_"}


class _ValuelessOnMeta(TorchFunctionMode):
    """Puts tensors without values, and with random ones, on the meta device.

    Computed tensors, such as rotary frequencies and masks, stay real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func in _VALUELESS:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Calls `make` so that no weight takes memory or time.

    Returns the model, all of it on the meta device, and name -> value of its buffers. A buffer that `make` leaves
    uninitialised has no value, and is left out.
    """
    with _ValuelessOnMeta():
        model = make()
    buffers = {name: tensor.detach().clone() for name, tensor in model.named_buffers() if not tensor.is_meta}
    return model.to("meta"), buffers
