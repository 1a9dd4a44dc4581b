"""Documents in one row, kept apart, are to each architecture as if each were alone; or it is refused by name."""

from __future__ import annotations

import pytest

from nnscaler.errors import UserError
from nnscaler.models.causal_lm import prepare_config
from tests.models.architectures import ARCHITECTURES, LENGTH, compare_uncompiled, config_of

STARTS = [[0, 1, 10, 19, 23], [0, 12]]  # of two rows of 24 tokens
OTHERS = {
    "t5": "not a causal language model",
    "mamba": "MambaForCausalLM would compute attention as it writes it",
    "rwkv": "RwkvForCausalLM would compute attention as it writes it",
    "mamba2": "Mamba2ForCausalLM would compute attention as it writes it",
    "qwen3_next": "has layers (linear_attention) by which tokens of one document would reach those of the next",
    **dict.fromkeys(("gptj", "gpt_neo", "bloom", "falcon", "mpt", "doge"), "would compute attention as it writes it"),
}
# transformers 5.17 gives OPT's attention a mask of ones, of which only values say that it hides nothing.
REFUSED_OR_SAME = {"opt": "a mask of its own, which may not keep documents apart"}
WINDOWS = {
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 9},
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "doge"])
def test_each_document_is_as_if_alone(name):
    said = compare_uncompiled(name, False, starts=STARTS)
    if name in OTHERS:
        assert said.startswith("REFUSED")
        assert OTHERS[name] in said
    else:
        assert said.startswith("SAME") or REFUSED_OR_SAME.get(name, "not refused") in said, said


def test_a_layer_that_attends_as_its_model_writes_it_is_refused():
    said = compare_uncompiled("biogpt", False, starts=STARTS)
    assert said.startswith("REFUSED")
    assert "which may not keep documents apart; leave out --document_mask" in said


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_end_with_a_document(name):
    assert compare_uncompiled(name, False, starts=STARTS, **WINDOWS[name]).startswith("SAME")


def test_layers_that_carry_a_state_are_refused():
    config = config_of("qwen3", layer_types=["full_attention", "full_attention"])
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match=r"has layers \(linear_attention\) by which tokens of one document would reach"):
        prepare_config(config, LENGTH, "auto", documents=True)
