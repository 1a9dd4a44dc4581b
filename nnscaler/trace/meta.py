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
    _leave_values(model)
    return model, buffers


def _leave_values(model: nn.Module) -> None:
    """Puts all of a model on the meta device. Unlike `Module.to`, this leaves tied parameters tied."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that no other one gets their id
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in known:
                    made = tensor.detach().to("meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = tensor, nn.Parameter(made, tensor.requires_grad) if is_parameter else made
                held[name] = known[id(tensor)][1]  # type: ignore[assignment]
