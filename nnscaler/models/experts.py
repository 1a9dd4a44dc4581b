"""Our experts in place of a Hugging Face model's own: as one operator, with whatever gate and biases they have.

transformers stores the gate of an expert and the rest of its first product as the two halves of one dimension of a
weight. Equal parts of both halves are not one slice. So the dimension is made two here, [2, f] for [2 f]: the same
elements in the same order, also in files and exports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import moe

from nnscaler.errors import UserError
from nnscaler.models.adapters import adapted_parts
from nnscaler.operators.experts import experts

EXPERTS = "nnscaler"  # our name in transformers' table of functions of experts


def set_experts(config: PretrainedConfig) -> None:
    """Chooses a model's experts. A model without experts ignores this."""
    config._experts_implementation = EXPERTS


def divide_gates(model: nn.Module) -> None:
    """Makes the dimension of experts' weights that holds gate and rest two, except where adapters are made for one."""
    others = adapted_parts(model)
    for module in model.modules():
        if _is_mixture(module) and module not in others:
            for name, rank in (("gate_up_proj", _WEIGHT), ("gate_up_proj_bias", _BIAS)):
                weight = getattr(module, name, None)
                if weight is not None:
                    divided = _divided(module, weight.detach(), rank)
                    setattr(module, name, nn.Parameter(divided, weight.requires_grad))


_WEIGHT, _BIAS = 3, 2  # dimensions that they have as transformers makes them


def _divided(module: Any, weight: Tensor, rank: int) -> Tensor:
    """A weight or bias of gates and rest with two dimensions for them, where they lie one after the other in one."""
    if not (module.has_gate and module.is_concatenated) or weight.dim() > rank:
        return weight
    return weight.unflatten(-1 if module.is_transposed or rank == _BIAS else -2, (2, -1))


def _is_mixture(module: nn.Module) -> bool:
    """Whether a module is of a class of experts that transformers lets others compute."""
    return hasattr(module, "has_gate") and hasattr(module, "is_concatenated")


def _mixture(module: Any, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """transformers' interface of experts: hidden [t, d], chosen and scores [t, k] -> [t, d].

    Raises UserError for what experts do that the operator does not.
    """
    if getattr(module, "has_post_expert_norm", False):  # which transformers 5.17 does not know yet
        raise UserError(f"{type(module).__name__} normalises what each expert gives, which is not supported")
    up, bias = ("gate_up_proj", "gate_up_proj_bias") if module.has_gate else ("up_proj", "up_proj_bias")
    gate, constants = _gate(module)
    found = experts(
        hidden,
        chosen,
        scores,
        _divided(module, getattr(module, up), _WEIGHT),
        module.down_proj,
        _divided(module, getattr(module, bias), _BIAS) if module.has_bias else None,
        transposed=module.is_transposed,
        gate=gate,
        constants=constants,
    )
    if not module.has_bias:
        return found
    # Added once, however the experts are split: each token's scores of all experts, times these experts' biases.
    weights = scores.new_zeros(len(scores), len(module.down_proj)).scatter_add(1, chosen, scores)
    return found + (weights.to(found.dtype) @ module.down_proj_bias)


moe.ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _mixture)


def _gate(module: Any) -> tuple[str, dict[str, Any]]:
    """The name of a module's gate, and what the gate reads of the module (see
    `nnscaler.kernels.experts.gate_named`)."""
    if not module.has_gate:
        return f"{__name__}:activate", {"act_fn": _constant(module, "act_fn")}
    function = type(module)._apply_gate
    reads = _Reads(module)
    function(reads, torch.empty(1, 2, device="meta"))
    return f"{function.__module__}:{function.__qualname__}", {key: _constant(module, key) for key in reads.names}


def activate(module: Any, x: Tensor) -> Tensor:
    """The gate of experts that have no gate: only an activation."""
    return module.act_fn(x)


class _Reads:
    """Stands for a module, and records what is read of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.names = module, dict[str, None]()

    def __getattr__(self, name: str) -> Any:
        self.names[name] = None
        return getattr(self._module, name)


def _constant(module: nn.Module, name: str) -> Any:
    return _spelled(module, getattr(module, name))


def _spelled(module: nn.Module, value: Any) -> Any:
    """What a gate reads, as `nnscaler.kernels.experts.gate_named` takes it. Raises UserError for what that cannot
    make."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    known = _activation(value)
    if known is not None:
        return known
    if not isinstance(value, nn.Module) or value.state_dict() or "<locals>" in type(value).__qualname__:
        raise UserError(
            f"{type(module).__name__} computes with a {type(value).__name__}, which is neither a number nor an "
            "activation without weights"
        )
    held = {name: item for name, item in vars(value).items() if name not in vars(nn.Module())} | value._modules
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    return {"class": kind, **{name: _spelled(module, item) for name, item in held.items()}}


def _activation(function: Any) -> str | None:
    """The name of an activation in transformers."""
    for name in ACT2FN:
        known = ACT2FN[name]
        if type(known) is type(function) and repr(known) == repr(function):
            return name
    return None
