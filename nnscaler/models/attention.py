"""Our attention in the place of a Hugging Face model's own: every option that the model passes is honoured or refused.

transformers gives an attention function whatever its models know: scales, masks, windows, soft caps, sinks. One that is
not known here may change the result, so that it is refused by name, when the model is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from nnscaler.errors import UserError
from nnscaler.kernels import KERNELS
from nnscaler.operators.attention import attention

ATTENTION = "nnscaler"  # how our names in transformers' table of attention functions begin
IMPLEMENTATIONS = ("auto", *KERNELS, "eager")  # what --attn_implementation may be

# What models pass along that does not change what attention computes, given that a row is one sequence from its start.
_HARMLESS = {
    "position_ids",
    "position_embeddings",
    "cache_position",
    "past_key_values",
    "use_cache",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "deterministic",
}
# What an option is, for people who know the configuration rather than the code.
_MEANING = {
    "softcap": "a soft cap of attention's scores (attn_logit_softcapping)",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias of attention's scores by position",
    "output_attentions": "attention's weights as a result (output_attentions)",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


def _attention_by(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [b, h, l, d], key and value [b, k, l, d] -> [b, l, h, e].

        Raises UserError for an option that plain causal attention with a scale does not honour.
        """
        scale = options.pop("scaling", None)
        causal = options.pop("is_causal", None)
        _check(module, key.shape[2], mask, getattr(module, "is_causal", True) if causal is None else causal, options)
        return attention(query, key, value, scale, True, kernel), None

    return attend


def _check(module: nn.Module, length: int, mask: Tensor | None, causal: bool, options: dict[str, Any]) -> None:
    """Raises UserError for what would change attention's result, and is not honoured."""
    where = type(module).__name__
    if mask is not None:
        raise UserError(f"{where} gives attention a mask of its own, which is not supported; {_OWN_ATTENTION}")
    if not causal:
        raise UserError(f"{where} attends to later tokens too (is_causal is false), which is not supported")
    dropout = options.pop("dropout", 0.0)
    if dropout:
        raise UserError(
            f"{where} drops attention's weights with probability {dropout}, which is not supported; train without, by "
            "--set attention_dropout=0 (attn_pdrop=0 in some models)"
        )
    check_window(options.pop("sliding_window", None), length)
    for name, value in options.items():
        if name not in _HARMLESS and value is not None and value is not False:
            what = f"{_MEANING[name]}: option {name}" if name in _MEANING else f"the option {name}"
            raise UserError(f"{where} asks attention for {what}, which is not supported; {_OWN_ATTENTION}")


_OWN_ATTENTION = "--attn_implementation eager computes attention as the model writes it"


def check_window(window: int | None, length: int) -> None:
    """Raises UserError where attention would see less than a sequence of `length` tokens."""
    if window is not None and length > window:
        raise UserError(
            f"the model attends to a window of {window} tokens, sequences have {length}, which no kernel here does; "
            f"take sequences of at most {window} tokens, widen the window (--set sliding_window={length}), or have "
            "attention as the model writes it (--attn_implementation eager)"
        )


def _no_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> None:
    """transformers' interface for masks: causality needs no tensor. Raises UserError where more is asked for."""
    check_window(local_size, kv_length)
    plain = mask_function is causal_mask_function or local_size is not None
    if not (plain and allow_is_causal_skip and attention_mask is None and q_length == kv_length):
        raise UserError(f"the model attends with a mask that is not plainly causal; {_OWN_ATTENTION}")


for _kernel in ("auto", *KERNELS):
    AttentionInterface.register(f"{ATTENTION}_{_kernel}", _attention_by(_kernel))
    AttentionMaskInterface.register(f"{ATTENTION}_{_kernel}", _no_mask)


def set_attention(config: PretrainedConfig, implementation: str, model_class: type[PreTrainedModel]) -> None:
    """Chooses a model's attention. Raises UserError where its class has no place for another than its own."""
    if implementation != "eager" and not model_class._supports_attention_backend:
        raise UserError(
            f"{model_class.__name__} has attention of its own that no kernel can stand in for; use "
            "--attn_implementation eager"
        )
    config._attn_implementation = implementation if implementation == "eager" else f"{ATTENTION}_{implementation}"


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Inside, models know that their rows are not several sequences, which they else find out from positions' values,
    and while they are traced there are none."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
