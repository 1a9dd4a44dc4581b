"""Building a model without its weights, but with the values of its buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Factories whose results have no particular value: what a parameter is made of before it is initialised.
_VALUELESS = {torch.empty, torch.rand, torch.randn, torch.normal, torch.empty_strided}


class _ValuelessOnMeta(TorchFunctionMode):
    """Puts uninitialised and random tensors on the meta device; computed ones (rotary frequencies, masks) stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _VALUELESS:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Calls `make` so that no weight takes memory or time.

    Returns the model, all of it on the meta device, and the values of its buffers by name. A buffer that `make` leaves
    uninitialised has no value and is left out.
    """
    with _ValuelessOnMeta():
        model = make()
    buffers = {name: tensor.detach().clone() for name, tensor in model.named_buffers() if not tensor.is_meta}
    return model.to("meta"), buffers
