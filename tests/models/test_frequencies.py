"""RoPE whose frequencies follow from how long a sequence is: those of rows, known when a model is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler.errors import UserError
from nnscaler.models.causal_lm import build
from nnscaler.models.documents import Documents, rows_hold
from nnscaler.models.frequencies import follow_rows
from tests.models.architectures import LENGTH, compare, compare_uncompiled, config_of

LONG, SHORT = [2.0, 3.0, 4.0, 5.0], [1.0, 1.5, 1.0, 1.0]


def longrope(limit: int) -> dict[str, Any]:
    """Changes a Phi-3: other factors for sequences of more than `limit` tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
    return {"original_max_position_embeddings": limit, "rope_parameters": rope}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
BY_LAYER = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longer": ("phi3", longrope(LENGTH - 1)),
    "as long": ("phi3", longrope(LENGTH)),
    "dynamic": ("llama", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "by layer": ("gemma3_text", {"max_position_embeddings": 8, "rope_parameters": BY_LAYER}),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case):
    name, changes = CASES[case]
    assert compare_uncompiled(name, False, **changes).startswith("SAME")


@pytest.mark.parametrize("case", ["longer", "by layer"])
def test_compiled(case, tmp_path):
    name, changes = CASES[case]
    assert compare(name, False, tmp_path, **changes).startswith("SAME")


def angles(model: Any, length: int) -> Tensor:
    """The angles by which the second token is turned in a row of this length."""
    embed = model.model.rotary_emb
    cos, sin = embed(torch.zeros(1, length, 1), torch.arange(length).unsqueeze(0))
    return torch.atan2(sin[0, 1], cos[0, 1])[:4]


def test_frequencies_by_hand():
    """Of 8 dimensions, the i-th of 4 turns by 1 / (factor * 10000^(i / 4)) a token."""
    model = build(config_of("phi3", **longrope(16)))
    follow_rows(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    turns = 1e4 ** -(torch.arange(4) / 4)
    for length, factors in ((16, SHORT), (17, LONG), (16, SHORT)):
        assert torch.allclose(angles(model, length), turns / torch.tensor(factors), rtol=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()), "forward changes nothing"


def test_documents_of_unknown_lengths_are_refused_where_it_matters():
    model = build(config_of("phi3", **longrope(16)))
    follow_rows(model)
    with rows_hold(Documents(torch.zeros(1, 17, dtype=torch.int64), None)):
        assert angles(model, 16)[0] == pytest.approx(1)
        with pytest.raises(UserError, match="longrope is another in documents of more than 16 tokens"):
            angles(model, 17)


def test_other_models_keep_their_own():
    model = build(config_of("llama"))
    follow_rows(model)
    assert "forward" not in vars(model.model.rotary_emb)
