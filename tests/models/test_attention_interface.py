"""What our attention takes over from a model: masks as transformers makes them; and each option, or it is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

from nnscaler.errors import UserError
from nnscaler.models import attention as ours
from nnscaler.models.attention import CAUSAL, Seen
from nnscaler.models.documents import Documents, rows_hold

LENGTH = 9
PADDING = torch.zeros(1, dtype=torch.int64)
KNOWN = {
    "causal": masks.causal_mask_function,
    "all": masks.bidirectional_mask_function,
    "window": masks.sliding_window_causal_mask_function(3),
    "window of one": masks.sliding_window_causal_mask_function(1),
    "window to both sides": masks.sliding_window_bidirectional_mask_function(2),
    "two windows": masks.and_masks(masks.sliding_window_overlay(5), masks.sliding_window_overlay(3)),
    "windows of both kinds": masks.and_masks(
        masks.sliding_window_bidirectional_overlay(4), masks.sliding_window_overlay(3)
    ),
    "one chunk": masks.and_masks(masks.chunked_overlay(LENGTH, PADDING), masks.causal_mask_function),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rows_see_what_a_mask_function_lets_them_see(name):
    seen = ours._seen_by(KNOWN[name], LENGTH)
    assert seen is not None
    for row in range(LENGTH):
        for key in range(LENGTH):
            wanted = bool(KNOWN[name](0, 0, torch.tensor(row), torch.tensor(key)))
            after_left = seen.left is None or key >= row - seen.left
            before_right = seen.right is None or key <= row + seen.right
            assert (after_left and before_right) == wanted, (row, key)


def test_masks_of_other_kinds_are_not_known():
    chunks = masks.chunked_overlay(LENGTH - 1, PADDING)
    for function in (
        chunks, masks.and_masks(masks.causal_mask_function, chunks), lambda *places: True,
        masks.or_masks(masks.causal_mask_function, masks.causal_mask_function),
        masks.and_masks(lambda *places: True, masks.causal_mask_function),
    ):  # fmt: skip
        assert ours._seen_by(function, LENGTH) is None
        with pytest.raises(UserError, match=r"a mask that is neither causal nor a window; --attn_implementation eager"):
            ours._mask(LENGTH, LENGTH, function)


def test_a_mask_that_has_to_be_a_tensor_or_hides_more_is_refused():
    assert ours._mask(LENGTH, LENGTH, KNOWN["window"]) == Seen(2, 0)
    assert ours._mask(q_length=LENGTH, kv_length=LENGTH, other="x") == CAUSAL
    assert ours._mask(LENGTH, LENGTH, KNOWN["all"], None, False, True) == Seen()
    documents = torch.zeros(1, LENGTH)
    with rows_hold(Documents(documents, 5)):
        assert ours._mask(LENGTH, LENGTH, KNOWN["window"]) == Seen(2, 0, documents, 5)
    for given in ((LENGTH, LENGTH + 1), (LENGTH, LENGTH, KNOWN["causal"], torch.ones(1, LENGTH)),
                  (LENGTH, LENGTH, KNOWN["causal"], None, False, False)):  # fmt: skip
        with pytest.raises(UserError, match="neither causal nor a window"):
            ours._mask(*given)


def asked(monkeypatch: pytest.MonkeyPatch, mask: Seen | Tensor | None, kernel: str = "auto", **options: Any) -> Any:
    """What our attention is asked for, for 9 keys."""
    monkeypatch.setattr(ours, "attention", lambda query, key, value, **given: given)
    q, k = torch.zeros(1, 4, LENGTH, 2), torch.zeros(1, 2, LENGTH, 2)
    module = SimpleNamespace(is_causal=options.pop("of_the_module", True))
    found, weights = ours._attention_by(kernel)(module, q, k, k, mask, **options)  # type: ignore[arg-type]
    assert weights is None
    return found


def test_every_option_reaches_attention_under_its_name(monkeypatch):
    sinks, documents = torch.zeros(4), torch.zeros(1, LENGTH)
    given = {"scaling": 0.3, "softcap": 5.0, "s_aux": sinks, "dropout": 0.1}
    assert asked(monkeypatch, Seen(3, 0, documents, 4), "rows", **given) == {
        "scale": 0.3, "softcap": 5.0, "sinks": sinks, "dropout": 0.1, "documents": documents, "document_length": 4,
        "window": (3, None), "kernel": "rows",
    }  # fmt: skip
    assert asked(monkeypatch, CAUSAL, dropout=0.0, scaling=None) == {}
    harmless = {"sliding_window": 7, "position_ids": documents, "use_cache": True, "new": None, "newer": False}
    assert asked(monkeypatch, CAUSAL, **harmless) == {}


@pytest.mark.parametrize(
    ("mask", "options", "wanted"),
    [
        (None, {}, {}),
        (None, {"is_causal": False}, {"is_causal": False}),
        (None, {"of_the_module": False}, {"is_causal": False}),
        (None, {"of_the_module": False, "is_causal": True}, {}),
        (Seen(), {"is_causal": True}, {"is_causal": False}),  # a mask says all
        (Seen(7, 0), {}, {"window": (7, None)}),
        (Seen(8, 0), {}, {}),  # the ninth token sees the first one still
        (Seen(100, 0), {}, {}),
        (Seen(2, 3), {}, {"is_causal": False, "window": (2, 3)}),
        (Seen(None, 3), {}, {"is_causal": False, "window": (None, 3)}),
        (Seen(8, 8), {}, {"is_causal": False}),
        (Seen(0, 0), {}, {"window": (0, None)}),
    ],
)
def test_causality_and_windows_follow_from_the_mask(monkeypatch, mask, options, wanted):
    assert asked(monkeypatch, mask, **options) == wanted


@pytest.mark.parametrize(
    ("mask", "options", "said"),
    [
        (torch.zeros(1), {}, "attention .*a mask of its own, which is not supported; --attn_implementation eager"),
        (CAUSAL, {"position_bias": torch.zeros(1)}, "a bias of attention's scores by position: option position_bias,"),
        (CAUSAL, {"output_attentions": True}, "asks attention for attention's weights as a result"),
        (CAUSAL, {"tilt": 0}, "asks attention for the option tilt, which is not supported"),
    ],
)
def test_what_attention_does_not_do_is_refused_by_name(monkeypatch, mask, options, said):
    with pytest.raises(UserError, match=f"^SimpleNamespace .*{said}"):
        asked(monkeypatch, mask, **options)


def test_without_a_mask_documents_would_not_be_kept_apart(monkeypatch):
    with rows_hold(Documents(torch.zeros(1, LENGTH), None)):
        with pytest.raises(UserError, match="gives attention no mask, and would not keep documents apart; leave out"):
            asked(monkeypatch, None)
        assert "documents" in asked(monkeypatch, Seen(None, 0, torch.zeros(1, LENGTH)))
