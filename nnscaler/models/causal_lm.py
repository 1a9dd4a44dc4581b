"""Hugging Face causal language models as the compiler trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from nnscaler.errors import UserError
from nnscaler.kernels import KERNELS
from nnscaler.operators.attention import attention
from nnscaler.trace import build_on_meta

IGNORED = -100  # label of a token that counts for nothing
ATTENTION = "nnscaler"  # how our names in transformers' table of attention functions begin


def _attention_by(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [b, h, l, d], key and value [b, k, l, d] -> [b, l, h, d]."""
        return attention(query, key, value, options.get("scaling"), True, kernel), None

    return attend


for _kernel in ("auto", *KERNELS):
    AttentionInterface.register(f"{ATTENTION}_{_kernel}", _attention_by(_kernel))
    # Rows are whole sequences without padding, so that causality needs no mask tensor.
    AttentionMaskInterface.register(f"{ATTENTION}_{_kernel}", lambda *args, **kwargs: None)

IMPLEMENTATIONS = ("auto", *KERNELS, "eager")  # what --attn_implementation may be


class CausalLM(nn.Module):
    """A causal language model whose forward gives the sum of a micro-batch's losses.

    `linear_loss(hidden [b, l, d], weight [n, d], labels [b, l], ignored) -> [b, l]` takes the place of the model's last
    projection and the loss, where given.
    """

    def __init__(self, config: PretrainedConfig, linear_loss: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.linear_loss = linear_loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """input_ids, labels [b, l] int64; labels are those of the next token, `IGNORED` where there is none."""
        if self.linear_loss is not None:
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return self.linear_loss(hidden, self.model.get_output_embeddings().weight, labels, IGNORED).sum()
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


WEIGHT_PREFIX = "model."  # of `CausalLM`'s parameters, before the names that the Hugging Face model has for them


def prepare_config(config: PretrainedConfig, sequence_length: int, implementation: str, chunk_loss: bool) -> None:
    """Sets a configuration up for training, or raises UserError for what is not supported."""
    config.use_cache = False
    config._attn_implementation = implementation if implementation == "eager" else f"{ATTENTION}_{implementation}"
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    sliding = window and sequence_length > window and ("sliding_attention" in kinds or not kinds)
    if implementation != "eager" and sliding:
        raise UserError(
            f"the model attends to a sliding window of {window} tokens, sequences have {sequence_length}; "
            "use --attn_implementation eager"
        )
    scaled = [
        name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, None)
    ]
    if chunk_loss and scaled:
        raise UserError(f"--enable_chunk_loss does not apply the model's {', '.join(scaled)}; leave it out")


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of a configuration's model, without making them."""
    model, _ = build_on_meta(lambda: CausalLM(config))
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_sequence(config: PretrainedConfig, parameters: int, sequence_length: int) -> tuple[float, float]:
    """Forward and backward operations of one sequence, with attention counted in full, and halved by causality.

    3 * 2 * (parameters * l + 2 * layers * heads * head_dim * l ** 2); the last term halved for causal attention.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention_flops = 2.0 * config.num_hidden_layers * heads * head_dim * sequence_length**2
    full = 6.0 * (parameters * sequence_length + attention_flops)
    return full, full - 3.0 * attention_flops
