"""Our attention gives a Hugging Face model what its own does, also where its scores are scaled in a way of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, PretrainedConfig

from nnscaler.models.causal_lm import CausalLM, prepare_config
from tests import tiny


def losses_and_gradients(config: PretrainedConfig, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    prepare_config(config, tiny.LENGTH, implementation)
    torch.manual_seed(0)
    model = CausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4  # so large that attention is far from even
    tokens = torch.arange(2 * tiny.LENGTH).view(2, -1) * 7 % tiny.VOCABULARY
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# Scores are multiplied with 1 / sqrt(head_dim), here not that of hidden_size / heads; or with the configuration's own.
CONFIGS = {
    "llama": lambda: tiny.config(head_dim=6),
    "granite": lambda: GraniteConfig(
        **{**tiny.config().to_dict(), "attention_multiplier": 0.9, "model_type": "granite"}
    ),
}


@pytest.mark.parametrize("model", CONFIGS)
def test_scores_are_scaled_as_the_model_says(model):
    found, gradients = losses_and_gradients(CONFIGS[model](), "auto")
    wanted, right = losses_and_gradients(CONFIGS[model](), "eager")
    torch.testing.assert_close(found, wanted)
    assert all(tiny.close(gradients[name], right[name]) < 1e-4 for name in right)
