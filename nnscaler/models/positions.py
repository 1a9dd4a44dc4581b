"""How long a sequence a model knows positions for."""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers import PretrainedConfig

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

# Kinds of RoPE whose frequencies or scale follow from max_position_embeddings: another value is another model.
_FOLLOW_LENGTH = {"dynamic", "longrope"}


def check_positions(config: PretrainedConfig, sequence_length: int) -> None:
    """Warns of sequences that are longer than those the model was made for.

    Raises UserError where it has no positions beyond, because each has a row in a table.
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
        "sequences have %d tokens, the model's positions were made for %d (max_position_embeddings): the others it "
        "learns from this data alone; a scaled RoPE goes on from what it knows: --set rope_parameters='%s'",
        sequence_length, known, json.dumps(scaled),
    )  # fmt: skip


def set_trained_length(config: PretrainedConfig, sequence_length: int) -> None:
    """Has a configuration say that it was trained at a length, where that changes nothing but what it says."""
    rope = _rope(config)
    known = _known_positions(config)
    if known is not None and rope and rope.get("rope_type", "default") not in _FOLLOW_LENGTH:
        config.max_position_embeddings = max(known, sequence_length)


def _known_positions(config: PretrainedConfig) -> int | None:
    for name in ("max_position_embeddings", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE's parameters, or those of one kind of layers where kinds have their own; empty: no RoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return dict(kinds[0] if kinds else rope)
