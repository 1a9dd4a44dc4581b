"""Names and shapes of weights in files, and in the model: as transformers renames and merges them on loading.

Published mixtures of experts have a tensor for each expert, the models of transformers 5 one for all; other models have
older names for some. transformers lists what to do for each kind of model, and the same list read backwards gives the
files that it saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nnscaler.models.adapters import PREFIX, name_in_model
from nnscaler.models.unread import Unread


def to_model(tensors: Mapping[str, Unread], model: PreTrainedModel) -> dict[str, Unread]:
    """Tensors of files, by the names that the model has for them, and put together as it has them.

    What is not renamed keeps its name, so that files with the model's own names are taken as they are.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own = {name_in_model(name, PREFIX) for name in model.state_dict()}
    found: dict[str, Unread] = {}
    merged: dict[str, WeightConverter] = {}
    for name in sorted(tensors, key=dot_natural_key):  # experts in order
        renamed, pattern = rename_source_key(name, renamings, converters)
        if renamed not in own and name in own:  # a name of the model's own, which a pattern for others has met
            renamed, pattern = name, None
        if pattern is None:
            found[renamed] = tensors[name]
        else:
            converter = merged.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
            tensor: Any = tensors[name]
            converter.add_tensor(renamed, name, pattern, tensor)
    for name, converter in merged.items():
        for renamed, made in converter.convert(name, model=model, config=model.config).items():
            found[renamed] = made[0] if isinstance(made, list) else made
    return found


def to_files(tensors: Mapping[str, Unread], model: PreTrainedModel) -> dict[str, Unread]:
    """Tensors of a model as its published files have them, with their names: what `save_pretrained` writes."""
    own = dict(model.named_parameters())
    shaped: dict[str, Any] = {
        name: tensor.shaped(own[name].shape) if name in own else tensor for name, tensor in tensors.items()
    }
    return dict(revert_weight_conversion(model, shaped))
