"""Other architectures: computed as transformers computes them, or refused by name; never silently different."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from nnscaler.errors import UserError
from nnscaler.models.causal_lm import prepare_config
from tests.models.architectures import ARCHITECTURES, LENGTH, compare, compare_uncompiled, config_of

SAME_BUT_CHUNKED = {"granite": "div", "cohere": "mul", "cohere2": "mul", "gemma2": "div"}
REFUSED = {
    "gemma2": "option softcap", "gpt_oss": "option s_aux", "bert": "a mask that is not plainly causal",
    "t5": "not a causal language model", "mamba": "MambaForCausalLM has attention of its own",
}  # fmt: skip
# transformers 5.17 gives OPT's attention a mask of ones, of which only values say that it hides nothing.
REFUSED_OR_SAME = {"opt": "a mask that is not plainly causal"}
OWN_ATTENTION = {"stablelm", "gptj", "gpt_neo", "bloom", "falcon", "mpt", "rwkv"}


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers(name, chunked):
    """Of our attention and our loss in the model, run by PyTorch; compiling is tested on its own."""
    said = compare_uncompiled(name, chunked)
    if name in REFUSED or name in OWN_ATTENTION:
        assert said.startswith("REFUSED")
        assert REFUSED.get(name, "--attn_implementation eager") in said
    elif chunked and name in SAME_BUT_CHUNKED:
        assert f"({SAME_BUT_CHUNKED[name]}), which the chunked loss does not" in said
    else:
        refused = name in REFUSED_OR_SAME and REFUSED_OR_SAME[name] in said
        assert said.startswith("SAME") or refused, said


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mpt", "falcon", "bloom"])
def test_attention_as_the_model_writes_it(name):
    assert compare_uncompiled(name, False, "eager").startswith("SAME")


@pytest.mark.parametrize(
    ("name", "chunked", "implementation", "changes"),
    [
        ("granite", False, "auto", {}),  # a scale of its own
        ("phi", True, "auto", {}),  # a last projection with a bias
        ("llama", False, "eager", {}),
        ("deepseek_v3", False, "eager", {}),
        ("gemma2", False, "eager", {}),  # soft caps
        ("mistral", False, "eager", {"sliding_window": 8}),
    ],
)
def test_compiled(name, chunked, implementation, changes, tmp_path):
    assert compare(name, chunked, tmp_path, implementation, **changes).startswith("SAME")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_dropout": 0.5}, "drops attention's weights with probability 0.5, .*attention_dropout=0"),
        (
            "mistral",
            {"sliding_window": 8},
            f"window of 8 tokens, sequences have {LENGTH}.*--set sliding_window={LENGTH}",
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "window of 8 tokens"),
        ("llama", {"is_causal": False}, "not plainly causal"),
        # In transformers 5.17 that loss reads a value, which comes first.
        (
            "mixtral",
            {"output_router_logits": True},
            r"adds a loss .*\(aux_loss\).*--set output_router_logits=false|reads a tensor's value",
        ),
        ("llama", {"hidden_act": "none"}, "cannot build a llama language model: KeyError"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(name, changes, message, tmp_path):
    for compared in (compare_uncompiled(name, False, **changes), compare(name, False, tmp_path, **changes)):
        assert compared.startswith("REFUSED")
        with pytest.raises(UserError, match=message):
            raise UserError(compared)
        assert "\n" not in compared


def test_a_window_as_long_as_the_sequence_hides_nothing():
    assert compare_uncompiled("mistral", False, sliding_window=LENGTH).startswith("SAME")


def test_options_nobody_has_heard_of_are_refused():
    from nnscaler.models.attention import _attention_by

    q = torch.zeros(1, 2, 4, 8)
    attend = _attention_by("auto")
    module = torch.nn.Linear(1, 1)
    assert attend(module, q, q, q, None, scaling=None, dropout=0.0, news=None, output_attentions=False)[1] is None
    with pytest.raises(UserError, match="asks attention for the option news"):
        attend(module, q, q, q, None, news=1.0)
    with pytest.raises(UserError, match="a mask of its own"):
        attend(module, q, q, q, torch.zeros(1, 1, 4, 4))
    with pytest.raises(UserError, match="later tokens"):
        attend(module, q, q, q, None, is_causal=False)


def test_positions_beyond_those_of_the_model(caplog):
    prepare_config(config_of("llama"), 64, "auto")
    assert not caplog.records
    prepare_config(config_of("llama"), 100, "auto")
    (record,) = caplog.records
    assert "sequences have 100 tokens, the model's positions were made for 64" in record.message
    assert '--set rope_parameters=\'{"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0' in record.message
    with pytest.raises(UserError, match="the model knows 64 positions, and sequences have 100 tokens"):
        prepare_config(config_of("gpt2"), 100, "auto")


def test_models_that_are_more_than_text():
    with pytest.raises(UserError, match="gemma3 is more than a language model"):
        prepare_config(AutoConfig.for_model("gemma3"), 8, "auto")
