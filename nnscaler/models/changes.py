"""Changes to a model's configuration, as a user types them."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from nnscaler.errors import UserError
from nnscaler.models.positions import check_pairs

# What a configuration says about itself rather than about the model.
FIXED = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"}
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
)


def changed_config(config: PretrainedConfig, changes: dict[str, str]) -> PretrainedConfig:
    """A copy of a configuration, with other values for some fields.

    Args:
        config: a `transformers` configuration.
        changes: name of a field -> value as text, such as `{"hidden_size": "512"}`. A list with an entry for each layer
            is cut to the new number of layers. A head dimension that follows from other sizes is computed again.

    Raises:
        UserError: an unknown field, a value of the wrong type, or sizes that do not fit each other.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in FIXED}
    for name, text in changes.items():
        name = config.attribute_map.get(name, name)
        # A published configuration has rope_theta where the class has it inside of rope_parameters.
        holder = fields if name in fields else fields.get("rope_parameters") or {}
        if name not in holder:
            near = difflib.get_close_matches(name, fields, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(fields)}"
            raise UserError(f"a {config.model_type} configuration has no field {name!r}; {hint}")
        holder[name] = _value(name, text, holder[name])
    _cut_lists(config, changes, fields)
    _check_sizes(config, fields)
    _derive_head_dim(config, changes, fields)
    try:
        changed = type(config).from_dict({**fields, "architectures": config.architectures})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        said = str(error.args[0] if isinstance(error, KeyError) else error).splitlines()[-1].strip()
        raise UserError(f"not a {config.model_type} configuration: {said}") from error
    check_pairs(changed)
    return changed


def _value(name: str, text: str, current: Any) -> Any:
    """The value of a text, in the type of the current value; in any type, if that is None."""
    if isinstance(current, str):
        if "act" in name and current in ACT2FN and text not in ACT2FN:
            raise UserError(f"{name} is {text!r}; allowed are {', '.join(ACT2FN)}")
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not (math.isfinite(value) and (value >= 0 or (current or 0) < 0)):
        raise UserError(f"{name} is {value}; it must be a finite number, at least 0")
    if name == "rope_theta" and value == 0:
        raise UserError("rope_theta is 0; it must be more than 0")
    if isinstance(value, float) and ("dropout" in name or "pdrop" in name) and value > 1:
        raise UserError(f"{name} is {value}; it must be from 0 to 1")
    if current is not None and value is not None and type(value) is not type(current):
        raise UserError(f"{name} takes a value of type {type(current).__name__}, such as {current}, not {text!r}")
    return value


def _cut_lists(config: PretrainedConfig, changes: dict[str, str], fields: dict[str, Any]) -> None:
    """Cuts the lists that have an entry for each layer to the new number of layers."""
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name not in changes:
            fields[name] = value[: _size(config, fields, "num_hidden_layers")]


def _check_sizes(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    for name in SIZES:
        size = _size(config, fields, name)
        if size is not None and size < 1:
            raise UserError(f"{name} is {size}, and must be 1 or more")
    heads, groups = (_size(config, fields, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


def _derive_head_dim(config: PretrainedConfig, changes: dict[str, str], fields: dict[str, Any]) -> None:
    """Computes the head dimension again, where it is the hidden size divided by the heads."""
    before = config.to_dict()
    head_dim = before.get("head_dim")
    old_hidden, old_heads = (_size(config, before, name) for name in ("hidden_size", "num_attention_heads"))
    hidden, heads = (_size(config, fields, name) for name in ("hidden_size", "num_attention_heads"))
    if "head_dim" in changes or not (old_hidden and old_heads and hidden and heads):
        return
    if head_dim is not None and head_dim * old_heads != old_hidden:
        return
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if head_dim is not None:
        fields["head_dim"] = hidden // heads


def _size(config: PretrainedConfig, fields: dict[str, Any], name: str) -> Any:
    """A field, by its usual name; some classes spell it in another way."""
    return fields.get(config.attribute_map.get(name, name))
