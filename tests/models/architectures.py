"""Tiny models of many architectures, and what the compiler makes of each beside plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.data.documents import document_inputs
from nnscaler.errors import UserError
from nnscaler.models.causal_lm import IGNORED, CausalLM, prepare_config
from nnscaler.runtime.module import ParallelModule
from tests import tiny

LENGTH = 24
# Sizes by the names that most classes know them under; `attribute_map` translates the others.
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 1, "sliding_window": 8,
    "index_topk": 6, "index_n_heads": 4, "index_block_size": 4, "index_topk_blocks": 2, "keep_window_size": 6,
}  # fmt: skip
NO_DROPOUT = dict.fromkeys(
    (
        "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout",
        "activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "residual_dropout",
    ),
    0.0,
)  # fmt: skip
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "lfm2": {},
    "seed_oss": {},
    "arcee": {},
    "stablelm": {},
    "gpt2": {"n_inner": 48},
    "gptj": {"rotary_dim": 4},
    "gpt_neox": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "starcoder2": {},
    "nemotron": {},
    "smollm3": {},
    "glm": {},
    "glm4": {},
    "ernie4_5": {},
    "helium": {},
    "exaone4": {},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 16},  # logits are divided by hidden_size / dim_model_base
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    },
    "gpt_oss": {},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "qwen3_next": {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "rwkv": {},
    "t5": {},
    "bert": {},
}  # fmt: skip

_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = ARCHITECTURES["qwen3_next"]
_SCAN = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_PART = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
# Other language models of transformers: those that are run on several processes alone (benchmarks/models.py).
OTHERS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "afmoe apertus aria_text bailing_hybrid bart beam bigbird_pegasus biogpt bitnet blenderbot "
            "blenderbot-small cohere2_moe cpmant ctrl cwm diffllama doge dots1 ernie4_5_moe exaone_moe falcon_h1 "
            "falcon_mamba flex_olmo flint gemma4_unified_text glm4_moe gpt-sw3 gpt_bigcode gpt_neox_japanese "
            "granite_swa granitemoe granitemoe_swa granitemoeshared hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
            "hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear "
            "kolibri1 laguna lfm3 llama4_text marian mbart mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text "
            "ministral3 mvp nanochat nemotron_h openai-gpt pegasus persimmon phimoe qwen2_moe qwen4_exp_text "
            "recurrent_gemma solar_open vaultgemma xglm"
        ).split()
    },
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v32", "glm_moe_dsa", "youtu"), _LATENT),
    **{name: {**_LATENT, "head_dim": 8} for name in ("glm4_moe_lite", "longcat_flash")},
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text"), _LINEAR),
    "bamba": _SCAN,
    "blt": {
        "encoder_hash_byte_group_vocab": 64,  # of 500,002 in six tables
        **{f"{part}_config": dict(_PART) for part in ("patcher", "encoder", "decoder", "global")},
    },
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},  # not so without the last two
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 96,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 96},
    "git": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16,
        },
    },
    "granitemoehybrid": {**_SCAN, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "modernbert-decoder": {"pad_token_id": 1},
    "plbart": {"d_model": 48},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def installed(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, by which it is skipped for an architecture that this version of transformers lacks."""
    lacks = {
        name: pytest.mark.skip(f"transformers {transformers.__version__} has no {name}")
        for name in names
        if name not in CONFIG_MAPPING
    }
    return [pytest.param(name, marks=lacks.get(name, ())) for name in names]


def config_of(name: str, drops: bool = False, **changes: Any) -> PretrainedConfig:
    """A tiny configuration of an architecture. drops: with the dropout that its class has; else without"""
    known = AutoConfig.for_model(name)
    fields = {}
    for field, value in {**SIZES, **({} if drops else NO_DROPOUT), **EXPERTS}.items():
        spelled = known.attribute_map.get(field, field)
        if spelled in known.to_dict():
            fields[spelled] = value
    if "sliding_attention" in (known.to_dict().get("layer_types") or ()):
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    return AutoConfig.for_model(name, **{**fields, **{**ARCHITECTURES, **OTHERS}.get(name, {}), **changes})


def plain(
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    starts: Sequence[list[int]] | None = None,
) -> Any:
    """(loss, gradients by name) of plain transformers in training, with these weights.

    starts  of the documents in each row, each of which goes through the model alone; None: a row is one
    """
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    model.train()
    total, alone = 0.0, [tokens]
    if starts is not None:
        alone = [part for row, places in zip(tokens.split(1), starts) for part in row.tensor_split(places[1:], 1)]
    for ids in alone:
        wanted = ids[:, 1:].flatten()
        if len(wanted) == 0:
            continue
        output = model(input_ids=ids, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), wanted, reduction="sum")
        if output.get("aux_loss") is not None:
            loss = loss + model.router_aux_loss_coef * output.aux_loss * len(wanted)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def random_weights(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Weights that no initialisation makes: biases and scales are not 0 and 1."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else 1 + noise * 0.3)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) [2, length]."""
    tokens = torch.randint(2, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)


def verdict(loss: float, right: float, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """SAME, or WRONG and where: losses and gradients by name."""
    off = {}
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in found.values())  # below is rounding around 0
    for name, gradient in found.items():
        exact = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        error = float((gradient.view_as(exact) - exact).abs().max() / max(float(exact.abs().max()), least))
        if not error < 2e-4:
            off[name] = round(error, 6)
    same = abs(loss - right) < 1e-5 * abs(right) and not off
    return f"{'SAME' if same else 'WRONG'} loss {loss:.5f}, right {right:.5f}" + (
        f"; gradients off {off}" if off else ""
    )


def compare_uncompiled(
    name: str, chunked: bool, implementation: str = "auto", starts: Sequence[list[int]] | None = None, **changes: Any
) -> str:
    """As `compare`, of `CausalLM` run by PyTorch: what it makes of the model, without the compiler.

    starts  of the documents in each of two rows, which are kept apart; None: a row is one
    """
    tokens, labels = batch(LENGTH)
    inputs = {} if starts is None else document_inputs([np.array(places) for places in starts], LENGTH)
    if starts is not None:
        labels[:, :-1].masked_fill_(inputs["position_ids"][:, 1:] == 0, IGNORED)
    config = config_of(name, **changes)
    try:
        prepare_config(config, LENGTH, implementation, documents=starts is not None)
        model = CausalLM(config, chunk_linear_cross_entropy if chunked else None)
        weights = random_weights(config_of(name, **changes))
        own = {key: weight.view(model.model.get_parameter(key).shape) for key, weight in weights.items()}
        model.model.load_state_dict(own, strict=False)
        loss = model.train()(tokens, labels, **inputs)
    except UserError as error:
        return f"REFUSED {error}"
    loss.backward()
    right, gradients = plain(config_of(name, **changes), weights, tokens, starts)
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.model.named_parameters()}
    return verdict(loss.item(), right, found, gradients)


def compare(
    name: str, chunked: bool, folder: Path, implementation: str = "auto", length: int = LENGTH, **changes: Any
) -> str:
    """SAME, WRONG and by how much, or REFUSED and why."""
    tokens, labels = batch(length)
    inputs = {"input_ids": tokens, "labels": labels}
    config = config_of(name, **changes)
    try:
        prepare_config(config, length, implementation)
        loss_of = chunk_linear_cross_entropy if chunked else None
        code = compile_model(
            Source(lambda: CausalLM(config, loss_of), inputs, torch.float32),
            ComputeConfig(hardware=tiny.write_hardware(folder)), folder / f"{name}-{chunked}",
        )  # fmt: skip
    except UserError as error:
        return f"REFUSED {error}"
    plain_config = config_of(name, **changes)
    weights = random_weights(plain_config)
    module = ParallelModule(code, torch.device("cpu"))

    def read(parameter: str, box: Any) -> torch.Tensor:
        aliases = [parameter, *(other for other, target in module.tied.items() if target == parameter)]
        found = next(alias for alias in aliases if alias.removeprefix("model.") in weights)
        return weights[found.removeprefix("model.")].view(module.specs[parameter].shape)[box.slices]

    module.load(read)
    loss = module.accumulate([inputs]).item()
    right, gradients = plain(plain_config, weights, tokens)
    names = {target: other for other, target in module.tied.items()}
    found, wanted = {}, {}
    for bucket in module.buckets:
        for part in bucket.owned_parts():
            key = part.name.removeprefix("model.")
            wanted[key] = gradients[key if key in gradients else names[part.name].removeprefix("model.")]
            found[key] = bucket.gradient[part.start : part.stop].view(part.box.sizes)
    return verdict(loss, right, found, wanted)
