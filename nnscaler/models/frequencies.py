"""RoPE whose frequencies follow from how long a sequence is, worked out for rows of one length.

Where RoPE is of the kinds `longrope` and `dynamic`, transformers computes frequencies in each forward from the highest
position, whose value a traced model does not know, and keeps them in the module. Rows have one length here, and
positions in them begin at 0: the highest is known.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nnscaler.errors import UserError
from nnscaler.models.documents import in_rows


def follow_rows(model: nn.Module) -> None:
    """Lets the modules of a model that embed positions have the frequencies for rows of the length that they get."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if kinds is not None and any(map(_follows, kinds.values() if isinstance(kinds, dict) else [kinds])):
            module.forward = functools.partial(_embed, module)


def _follows(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _embed(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """The module's forward without what transformers does before it. layer_type: where each has its own RoPE"""
    forward = inspect.unwrap(type(module).forward)
    prefix, named = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    with torch.no_grad():
        found = _frequencies(module, position_ids.shape[-1], x.device, layer_type)
        stands_in: Any = module if found is None else _With(module, f"{prefix}inv_freq", found)
        return forward(stands_in, x, position_ids, **named)


def _frequencies(module: Any, length: int, device: torch.device, layer_type: str | None) -> Tensor | None:
    """For a row of this length; None: those that the module has had from the beginning.

    Raises UserError where the documents of a row are kept apart, whose lengths are not known, and it matters.
    """
    rope = module.config.rope_parameters
    kind, rope = (module.rope_type, rope) if layer_type is None else (module.rope_type[layer_type], rope[layer_type])
    if not _follows(kind):
        return None
    limit = rope["original_max_position_embeddings"] if kind == "longrope" else module.original_max_seq_len
    if length <= limit:
        return None
    if in_rows.get() is not None:
        raise UserError(
            f"RoPE of the kind {kind} is another in documents of more than {limit} tokens, and rows have {length}; "
            f"leave out --document_mask, or make rows of {limit}"
        )
    options = {} if layer_type is None else {"layer_type": layer_type}
    found: Tensor = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=length, **options)[0]
    return found


class _With:
    """Stands for a module, of which one attribute is another."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
