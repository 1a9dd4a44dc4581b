"""Low-rank adapters (LoRA) by peft: small matrices that are trained beside the weights of a model, which stay.

E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. An adapted linear layer gives
W x + alpha / rank * B A x, where A [rank, in] begins random and B [out, rank] with zeros. The weights of a mixture's
experts, which are no layers but parameters, have a pair for each expert.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from nnscaler.errors import UserError

if TYPE_CHECKING:  # seconds to import, for those who train no adapters too
    from peft import LoraConfig

PREFIX = "base_model.model."  # of the names in an adapted model, before those of the model itself
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them


# What peft changes of a configuration when it meets the model: `all-linear` to names, and names of experts' layers in
# published files to those of parameters.
_RESOLVED = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")


def adapted(model: nn.Module, config: LoraConfig) -> Any:
    """A language model with adapters, which alone need gradients. `config` names afterwards what they are of.

    Raises UserError where the model cannot have them.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    linear = {name.rsplit(".", 1)[-1]: None for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    own = copy.deepcopy(config)
    own.base_model_name_or_path = None  # which peft compares with a name that a model without weights does not have
    try:
        with warnings.catch_warnings():  # peft asks for a thing by a name that transformers warns of
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            found = get_peft_model(model, own, autocast_adapter_dtype=False)
    except ValueError as error:
        asked = config.target_modules
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"lora_target_modules is {asked if isinstance(asked, str) else ' '.join(sorted(asked or ()))}, which does "
            f"not suit {type(model).__name__} ({reason}); its linear layers are {', '.join(linear)}"
        ) from error
    for name in _RESOLVED:
        value = getattr(own, name)
        setattr(config, name, sorted(value) if isinstance(value, set) else value)
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


def adapted_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters stand around."""
    return {child for part in model.modules() for name, child in part.named_children() if name == "base_layer"}


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is a factor of an adapter, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def name_in_model(name: str, prefix: str) -> str:
    """The name that a Hugging Face model without adapters has for a parameter.

    prefix  what stands before it in `name`; with adapters it ends in `PREFIX`
    """
    short = name.removeprefix(prefix)
    return re.sub(r"(\.base_layer)+\.", ".", short) if prefix.endswith(PREFIX) else short


def name_in_file(name: str) -> str:
    """The name that peft's files have for a parameter of an adapter, which peft itself calls `default`."""
    return name.replace(".default.", ".")
