"""Low-rank adapters (LoRA) by peft: small matrices that are trained beside the weights of a model, which stay.

E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. An adapted linear layer gives
W x + alpha / rank * B A x, where A [rank, in] begins random and B [out, rank] with zeros.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from nnscaler.errors import UserError

if TYPE_CHECKING:  # seconds to import, for those who train no adapters too
    from peft import LoraConfig

PREFIX = "base_model.model."  # of the names in an adapted model, before those of the model itself
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them


def adapted(model: nn.Module, config: LoraConfig) -> Any:
    """A language model with adapters, which alone need gradients. Where `config` asks for all linear layers, it names
    them afterwards.

    Raises UserError where the model has no such layers.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    own = copy.copy(config)
    own.base_model_name_or_path = None  # which peft compares with a name that a model without weights does not have
    try:
        found = get_peft_model(model, own, autocast_adapter_dtype=False)
    except ValueError as error:
        linear = {name.rsplit(".", 1)[-1]: None for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        asked = config.target_modules
        raise UserError(
            f"lora_target_modules is {asked if isinstance(asked, str) else ' '.join(sorted(asked or ()))}, which does "
            f"not suit {type(model).__name__}; its linear layers are {', '.join(linear)}"
        ) from error
    if config.target_modules == "all-linear":
        config.target_modules = sorted(own.target_modules or ())
    part: Any
    for layer in found.modules():
        if isinstance(layer, LoraLayer):
            for parts, kind in ((layer.lora_A, _Random), (layer.lora_B, _Zeros)):
                for part in parts.values():
                    part.__class__ = kind
                    part._init_weights(part)  # from now on it gives the first values, not peft
    return found


class _Random(nn.Linear):
    """The first factor. It makes its own first values: the model around it would make those of a layer of its own."""

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.reset_parameters()


class _Zeros(nn.Linear):
    """The second factor."""

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.zeros_(self.weight)


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is a factor of an adapter, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def name_in_model(name: str, prefix: str) -> str:
    """The name that a Hugging Face model without adapters has for a parameter.

    prefix  what stands before it in `name`; with adapters it ends in `PREFIX`
    """
    short = name.removeprefix(prefix)
    return short.replace(".base_layer.", ".") if prefix.endswith(PREFIX) else short


def name_in_file(name: str) -> str:
    """The name that peft's files have for a parameter of an adapter, which peft itself calls `default`."""
    return name.replace(".default.", ".")
