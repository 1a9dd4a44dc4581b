"""Telling transformers' models that rows hold several documents.

transformers recognises from positions that rows are several sequences ("packed"), in models that pass positions on.
While a model is traced, positions have no values. So what stands in place of masks is told about documents here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig, masking_utils

from nnscaler.errors import UserError


class Documents(NamedTuple):
    """The documents in the rows of a micro-batch.

    numbers  [b, l] integers: the document of each token
    length   tokens of a token's own document, on average; None: not known
    """

    numbers: Tensor
    length: int | None


in_rows: ContextVar[Documents | None] = ContextVar("in_rows", default=None)  # of the model that runs


@contextmanager
def rows_hold(documents: Documents | None) -> Iterator[None]:
    """Inside, models take their rows to hold `documents`. None: each row is one"""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    token = in_rows.set(documents)
    try:
        yield
    finally:
        in_rows.reset(token)
        masking_utils.find_packed_sequence_indices = original


def check_documents(config: PretrainedConfig, model_class: Any) -> None:
    """Raises UserError where a model, whose attention has been chosen, would not keep documents apart."""
    if config._attn_implementation == "eager":
        raise UserError(
            f"{model_class.__name__} would compute attention as it writes it (eager), which does not go with "
            "--document_mask; leave it out"
        )
    layers = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    others = {kind for kind in layers if not kind.endswith("attention") or kind.startswith("linear")}
    if others or model_class._is_stateful:
        what = f"layers ({', '.join(sorted(others))})" if others else "state"
        raise UserError(
            f"{model_class.__name__} has {what} by which tokens of one document would reach those of the next; leave "
            "out --document_mask"
        )
