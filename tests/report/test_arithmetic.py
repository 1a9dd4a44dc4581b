"""Operations of a model, counted in its graph, against formulas of its shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.graph import Node, Ref
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.operators.attention import attention_flops, unmasked_flops
from nnscaler.report.arithmetic import model_flops
from nnscaler.trace import build_on_meta, trace
from tests import tiny
from tests.models.architectures import config_of

LENGTH, BATCH = tiny.LENGTH, 3
TOKENS = LENGTH * BATCH
ANGLES = 1e-3  # RoPE's are products too, which no formula counts, and count for something where all else is tiny


def flops(config: PretrainedConfig, chunked: bool = False, implementation: str = "auto") -> tuple[float, float]:
    prepare_config(config, LENGTH, implementation)
    inputs = {name: torch.zeros((BATCH, LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    loss = chunk_linear_cross_entropy if chunked else None
    return model_flops(trace(*_with_inputs(lambda: CausalLM(config, loss), inputs)), TOKENS)


def _with_inputs(make: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    model, buffers = build_on_meta(make)
    return model, inputs, buffers


def parameters(config: PretrainedConfig) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(lambda: CausalLM(config))[0].parameters())


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llamas_are_those_of_the_documents_formula(chunked, tied):
    """3 * 2 * (parameters * l + 2 * layers * heads * head_dim * l ** 2); of the latter, what a causal mask leaves."""
    config = tiny.config(head_dim=6, tie_word_embeddings=tied)
    full, causal = flops(config, chunked)
    attention = BATCH * 2 * config.num_hidden_layers * config.num_attention_heads * 6 * LENGTH**2
    assert full == pytest.approx(6 * (parameters(config) * TOKENS + attention), rel=ANGLES)
    assert full - causal == pytest.approx(6 * attention * (LENGTH - 1) / (2 * LENGTH))


def test_layers_count_as_they_are():
    """Of one layer with a window and one without, and heads that are wider than the hidden size."""
    config = config_of("gemma3_text", head_dim=16, layer_types=["full_attention", "sliding_attention"])
    full, seen = flops(config)
    dense = BATCH * 2 * config.num_attention_heads * 16
    assert full == pytest.approx(6 * (parameters(config) * TOKENS + 2 * dense * LENGTH**2), rel=ANGLES)
    left = config.sliding_window - 1
    pairs = [sum(min(row, limit) + 1 for row in range(LENGTH)) for limit in (LENGTH, left)]
    assert full - seen == pytest.approx(6 * dense * (2 * LENGTH**2 - sum(pairs)))


def test_layers_without_attention_have_none():
    config = config_of("lfm2", layer_types=["conv", "full_attention"])
    full, seen = flops(config)
    attention = 6 * BATCH * 2 * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    assert full - seen == pytest.approx(attention * LENGTH * (LENGTH - 1) / 2)


def test_a_frozen_product_has_one_less():
    def frozen() -> CausalLM:
        model = CausalLM(config)
        model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        return model

    config = tiny.config()
    prepare_config(config, LENGTH, "auto")
    inputs = {name: torch.zeros((BATCH, LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    less = model_flops(trace(*_with_inputs(frozen, inputs)), TOKENS)[0]
    product = 2 * TOKENS * config.hidden_size * config.intermediate_size
    assert flops(tiny.config())[0] - less == pytest.approx(product)


class Scaled(nn.Module):
    """A product reads its weight after it was scaled and turned, its bias never, and of the gain only what x has of
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8, 1))
        self.bias, self.gain = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x * self.gain, (self.weight * self.scale).t()) + self.bias


def test_what_a_product_reads_in_another_form_counts_as_read():
    """Of five tokens: 2 x 5 x 6 x 8 forward, and as much for each factor; 6 for each token, and element of the rest."""
    inputs = {"x": torch.zeros(5, 6)}
    assert model_flops(trace(*_with_inputs(Scaled, inputs)), 5) == (3 * 480 + 6 * 5 * (8 + 6),) * 2


def test_documents_leave_attention_within_them():
    sizes = {"b": 2, "k": 4, "g": 2, "l": 64, "s": 64, "d": 8, "e": 8}
    dense = 2 * 2 * 8 * 64 * 64 * 16

    def counted(**options: Any) -> tuple[float, float]:
        node = Node("o", "attention", tuple(Ref(name) for name in "qkv"), options, ("o",))
        return unmasked_flops(sizes, node), attention_flops(sizes, node)

    assert counted() == pytest.approx((dense, dense * 65 / 128))
    assert counted(document_length=16) == pytest.approx((dense / 4, dense / 4 * 17 / 32))
    assert counted(document_length=100) == counted()
    assert counted(document_length=16, window=(3, None))[1] == pytest.approx(dense * (13 * 4 + 1 + 2 + 3) / 16 / 64)
