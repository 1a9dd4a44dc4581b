"""Other architectures: computed as transformers computes them, or refused by name; never silently different."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, masking_utils
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from nnscaler.errors import UserError
from nnscaler.graph import Call
from nnscaler.models.attention import (
    Seen,
    _attention_by,
    _mask,
    _mask_or_tensor,
    _seen_by,
    _warn_of_all_scores,
    _window,
)
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.trace import build_on_meta, trace
from tests.models.architectures import ARCHITECTURES, LENGTH, batch, compare, compare_uncompiled, config_of, installed

SAME_BUT_CHUNKED = {"granite": "div", "cohere": "mul", "cohere2": "mul", "gemma2": "div"}
REFUSED = {"t5": "not a causal language model"}
OWN_ATTENTION = {
    "gptj", "gpt_neo", "bloom", "falcon", "mpt", "rwkv", "mamba", "git", "deepseek_v32", "deepseek_v4",
    "doge", "dots3_note_text",
}  # fmt: skip
WITHOUT_ATTENTION = {"rwkv", "mamba"}


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers(name, chunked):
    """Of our attention and our loss in the model, run by PyTorch; compiling is tested on its own."""
    said = compare_uncompiled(name, chunked)
    if name in REFUSED:
        assert said.startswith("REFUSED")
        assert REFUSED[name] in said
    elif chunked and name in SAME_BUT_CHUNKED:
        assert f"({SAME_BUT_CHUNKED[name]}), which the chunked loss does not" in said
    else:
        assert said.startswith("SAME"), said


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral"])
def test_attention_as_the_model_writes_it(name):
    assert compare_uncompiled(name, False, "eager").startswith("SAME")


@pytest.mark.parametrize("name", installed(sorted(OWN_ATTENTION)))
def test_a_model_that_has_no_place_for_our_attention_keeps_its_own(name, caplog):
    config = config_of(name)
    prepare_config(config, LENGTH, "auto")
    assert config._attn_implementation == "eager"
    warned = "has attention of its own, which computes all scores at once" in caplog.text
    assert warned == (name not in WITHOUT_ATTENTION)
    with pytest.raises(UserError, match="no kernel can stand in for; use --attn_implementation eager"):
        prepare_config(config_of(name), LENGTH, "sdpa")
    as_told = config_of(name)
    prepare_config(as_told, LENGTH, "eager")
    assert as_told._attn_implementation == "eager"


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},  # one layer of two
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt_oss": {"sliding_window": 9},
    "starcoder2": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "llama": {"is_causal": False},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_row_sees_what_the_mask_of_transformers_lets_it_see(name):
    assert compare_uncompiled(name, False, **WINDOWS[name]).startswith("SAME")
    without = {"sliding_window": LENGTH} if "sliding_window" in WINDOWS[name] else {"is_causal": True}
    assert loss_of(name, **WINDOWS[name]) != loss_of(name, **{**WINDOWS[name], **without})


def loss_of(name: str, **changes: Any) -> str:
    return compare_uncompiled(name, False, **changes).split("right")[1]


@pytest.mark.parametrize(
    ("name", "chunked", "implementation", "changes"),
    [
        ("granite", False, "auto", {}),  # a scale of its own
        ("phi", True, "auto", {}),  # a last projection with a bias
        ("llama", False, "eager", {}),
        ("deepseek_v3", False, "eager", {}),
        ("gemma2", False, "eager", {}),  # soft caps
        ("mistral", False, "eager", {"sliding_window": 8}),
        ("gemma3_text", True, "auto", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_compiled(name, chunked, implementation, changes, tmp_path):
    assert compare(name, chunked, tmp_path, implementation, **changes).startswith("SAME")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_dropout": 1.5}, r"drops its weights with probability 1\.5; it must be from 0 to 1"),
        ("llama", {"hidden_act": "none"}, "cannot build a llama language model: KeyError"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(name, changes, message, tmp_path):
    for compared in (compare_uncompiled(name, False, **changes), compare(name, False, tmp_path, **changes)):
        assert compared.startswith("REFUSED")
        with pytest.raises(UserError, match=message):
            raise UserError(compared)
        assert "\n" not in compared


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_the_loss_that_keeps_the_loads_of_experts_even(name, chunked):
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    found, without = (compare_uncompiled(name, chunked, **changes) for changes in (asked, {}))
    assert found.startswith("SAME")
    assert found != without


def test_layers_of_two_kinds_are_two_blocks():
    kinds = ["sliding_attention", "full_attention"]
    config = config_of("gemma3_text", num_hidden_layers=6, layer_types=[kinds[i % 3 == 2] for i in range(6)])
    prepare_config(config, LENGTH, "auto")
    tokens, labels = batch(LENGTH)
    model, buffers = build_on_meta(lambda: CausalLM(config))
    graph = trace(model, {"input_ids": tokens, "labels": labels}, buffers)
    windows = {
        name: [node.kwargs.get("window") for node in block.nodes if node.op == "attention"]
        for name, block in graph.blocks.items()
    }
    assert sorted(windows.values(), key=str) == [[(7, None)], [None]]
    called = [call.block for call in graph.root.nodes if isinstance(call, Call)]
    assert [windows[name][0] is not None for name in called] == [True, True, False] * 2


def test_a_window_as_long_as_the_sequence_hides_nothing():
    assert _window(Seen(LENGTH - 1, 0), LENGTH) is None
    assert _window(Seen(LENGTH - 2, 0), LENGTH) == (LENGTH - 2, None)
    assert compare_uncompiled("mistral", False, sliding_window=LENGTH).startswith("SAME")


def test_options_nobody_has_heard_of_are_refused():
    q = torch.randn(1, 2, 4, 8)
    attend = _attention_by("auto")
    module = torch.nn.Linear(1, 1)
    causal, weights = attend(module, q, q, q, None, scaling=None, dropout=0.0, news=None, output_attentions=False)
    assert weights is None
    assert not torch.equal(causal, attend(module, q, q, q, None, is_causal=False)[0])
    by_name = attend(module, q, q, q, attention_mask=Seen(right=0), is_causal=False)[0]
    assert torch.equal(causal, by_name)  # the mask is what counts
    with pytest.raises(UserError, match="asks attention for the option news"):
        attend(module, q, q, q, None, news=1.0)
    with pytest.raises(UserError, match="a mask of its own"):
        attend(module, q, q, q, torch.zeros(1, 1, 4, 4))
    assert not torch.equal(causal, attend(module, q, q, q, None, dropout=0.5)[0])


WRITTEN = {
    "biogpt": "a mask of its own",  # of ones
    "inkling_text": "a bias of attention's scores by position: option position_bias",  # and windows
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_layer_that_asks_for_what_ours_does_not_do_computes_its_own(name, caplog):
    _warn_of_all_scores.cache_clear()
    assert compare_uncompiled(name, False).startswith("SAME")
    assert f"asks attention for {WRITTEN[name]}: it is computed as the model writes it, all scores at" in caplog.text
    said = compare_uncompiled(name, False, "sdpa")
    assert said.startswith("REFUSED")
    assert said.endswith("--attn_implementation eager computes attention as the model writes it")


def test_only_what_a_model_s_own_attention_names_is_left_to_it():
    module = LlamaAttention(config_of("llama"), 0)
    q = torch.randn(1, 4, 5, 8)
    k, mask = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 5)
    given = {"scaling": 0.5, "dropout": 0.0}
    found, _ = _attention_by("auto")(module, q, k, k, mask, **given)
    assert torch.equal(found, eager_attention_forward(module, q, k, k, mask, **given)[0])
    with pytest.raises(UserError, match="LlamaAttention asks attention for sparse attention: option indices"):
        _attention_by("auto")(module, q, k, k, mask, **given, indices=torch.zeros(1))
    with pytest.raises(UserError, match="LlamaAttention asks attention for a mask of its own"):
        _attention_by("sdpa")(module, q, k, k, mask, **given)


def test_keys_beside_those_of_the_mask_are_refused():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    attend = _attention_by("auto")
    with pytest.raises(UserError, match="Linear gives attention keys that its mask does not know; --attn_impl"):
        attend(torch.nn.Linear(1, 1), q, k, k, Seen(right=0))
    attend(torch.nn.Linear(1, 1), q, k, k, None, is_causal=False)


@pytest.mark.parametrize(
    "compute",
    [
        lambda mask: mask.dtype,
        lambda mask: mask[:, :, :, :4],
        lambda mask: torch.ones(4, 4).masked_fill(mask, 0.0),
        lambda mask: torch.ones(4, 4) + mask,
    ],
)
def test_arithmetic_with_a_mask_that_is_no_tensor_is_refused(compute):
    with pytest.raises(UserError, match=r"the model computes with attention's mask \(.*\), .*; --attn_impl"):
        compute(Seen(right=0))


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v4",  # makes keys of several
        "doge",  # chooses keys by scores
    ],
)
def test_keys_that_a_model_makes_or_chooses_are_seen_as_it_says(name):
    assert compare_uncompiled(name, False).startswith("SAME")


def test_sparse_attention_sees_the_keys_that_a_model_chooses():
    some, whole = (compare_uncompiled("deepseek_v32", False, index_topk=count) for count in (6, LENGTH))
    assert some.startswith("SAME")
    assert some != whole


def test_what_masks_let_rows_see():
    own = lambda batch, head, row, key: key <= row  # noqa: E731
    masks = {
        "causal": (masking_utils.causal_mask_function, Seen(right=0)),
        "both ways": (masking_utils.bidirectional_mask_function, Seen()),
        "window": (masking_utils.sliding_window_causal_mask_function(3), Seen(2, 0)),
        "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(3), Seen(3, 3)),
        "pieces": (masking_utils.chunked_causal_mask_function(8, torch.zeros(1)), Seen(right=0)),
        "short pieces": (masking_utils.chunked_causal_mask_function(2, torch.zeros(1)), None),
        "another": (own, None),
        "with another": (masking_utils.and_masks(masking_utils.causal_mask_function, own), None),
        "one or the other": (masking_utils.or_masks(masking_utils.causal_mask_function, own), None),
    }
    for name, (mask, seen) in masks.items():
        assert _seen_by(mask, 8) == seen, name


@pytest.mark.parametrize("given", [{"attention_mask": torch.ones(1, 8).bool()}, {"allow_is_causal_skip": False}])
def test_a_mask_that_is_needed_as_a_tensor_is_refused_by_kernels(given):
    assert _mask(8, 8) == Seen(right=0)  # said, and not left to what the module has by default
    with pytest.raises(UserError, match="neither causal nor a window"):
        _mask(8, 8, **given)
    assert _mask_or_tensor(q_length=8, kv_length=8) == Seen(right=0)
    added = _mask_or_tensor(batch_size=1, q_length=8, kv_length=8, **given)
    assert torch.equal(added[0, 0] < 0, torch.ones(8, 8).triu(1).bool())


def test_positions_beyond_those_of_the_model(caplog):
    prepare_config(config_of("llama"), 64, "auto")
    assert not caplog.records
    prepare_config(config_of("llama"), 100, "auto")
    (record,) = caplog.records
    assert "sequences have 100 tokens, and the model's positions were made for 64" in record.message
    assert '--set rope_parameters=\'{"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0' in record.message
    with pytest.raises(UserError, match="the model knows 64 positions, and sequences have 100 tokens"):
        prepare_config(config_of("gpt2"), 100, "auto")


PARTS: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}},
}


@pytest.mark.parametrize("name", PARTS)
def test_models_that_are_more_than_text(name):
    with pytest.raises(UserError, match=f"{name} is more than a language model"):
        prepare_config(AutoConfig.for_model(name, **PARTS[name]), 8, "auto")
