"""For how long a sequence a model has positions."""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

# Kinds of RoPE whose frequencies or scale follow from max_position_embeddings: another value is another model.
_FOLLOW_LENGTH = {"dynamic", "longrope"}


def check_positions(config: PretrainedConfig, sequence_length: int) -> None:
    """Warns of sequences that are longer than those for which the model was made.

    Raises UserError where the model cannot have more positions, because each is a row of a table.
    """
    rope = _rope(config)
    known = _known_positions(config)
    if known is None or sequence_length <= known:
        return
    if not rope:
        raise UserError(f"the model knows {known} positions, and sequences have {sequence_length} tokens")
    scaled = {**rope, "rope_type": "yarn", "factor": float(-(-sequence_length // known))}
    scaled.setdefault("original_max_position_embeddings", known)
    logger.warning(
        "sequences have %d tokens, and the model's positions were made for %d (max_position_embeddings): it learns the "
        "others from this data alone. A scaled RoPE starts from what the model knows: --set rope_parameters='%s'",
        sequence_length, known, json.dumps(scaled),
    )  # fmt: skip


def check_rope(config: PretrainedConfig) -> None:
    """Raises UserError where RoPE is of a kind that `transformers` does not know."""
    known = ["default", *ROPE_INIT_FUNCTIONS]
    kind = _rope(config).get("rope_type", "default")
    if kind not in known:
        raise UserError(f"rope_type of rope_parameters is {kind!r}; allowed are {', '.join(dict.fromkeys(known))}")


def check_pairs(config: PretrainedConfig) -> None:
    """Raises UserError where RoPE, which turns pairs of a head's dimensions, gets an odd number of them."""
    rope = _rope(config)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    size = getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else 0)
    part = rope.get("partial_rotary_factor", 1.0)
    if rope and not hasattr(config, "qk_rope_head_dim") and int(size * part) % 2:
        of = "" if part == 1 else f", times partial_rotary_factor {part}"
        raise UserError(
            f"heads have {size} dimensions{of}; RoPE turns pairs of them, of which it must have a whole number"
        )


def set_trained_length(config: PretrainedConfig, sequence_length: int) -> None:
    """Writes the length of training into a configuration, where it changes nothing that the model computes."""
    rope = _rope(config)
    known = _known_positions(config)
    if known is not None and rope and rope.get("rope_type", "default") not in _FOLLOW_LENGTH:
        config.max_position_embeddings = max(known, sequence_length)


def _known_positions(config: PretrainedConfig) -> int | None:
    for name in ("max_position_embeddings", "max_seq_len"):
        known = getattr(config, name, None)
        if isinstance(known, int) and known > 0:  # -1: any number
            return known
    return None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of RoPE, or those of one kind of layers where kinds have their own. Empty: no RoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return dict(kinds[0] if kinds else rope)
