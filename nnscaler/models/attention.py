"""Our attention in place of a Hugging Face model's own. Every option that the model passes is honoured or refused.

transformers passes to an attention function whatever its models use: scales, masks, soft caps, sinks. An option that
ours does not have may change the result. So a layer that asks for one computes attention as its model writes it. Where
the user chose a kernel, or the model has no such function, the option is refused, by name, when the model is traced.
Which keys a row sees follows from the mask alone, as in a model's own attention.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from nnscaler.errors import UserError
from nnscaler.kernels import KERNELS, Asked
from nnscaler.models.documents import in_rows
from nnscaler.operators.attention import attention

logger = logging.getLogger(__name__)

ATTENTION = "nnscaler"  # how our names in transformers' table of attention functions begin
IMPLEMENTATIONS = ("auto", *KERNELS, "eager")  # what --attn_implementation may be

_HONOURED = {"is_causal", "s_aux", "scaling", "softcap", "dropout"}
# What models pass along that does not change what attention computes, given that masks say which keys a row sees.
_HARMLESS = {
    "sliding_window",
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
    "position_bias": "a bias of attention's scores by position",
    "output_attentions": "attention's weights as a result (output_attentions)",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


class Seen(NamedTuple):
    """Stands in place of a mask.

    How many keys before and after its place a row sees (None: all); and, where rows hold several documents, the number
    of each token's document [b, l], and how many tokens a document has on average.
    """

    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None
    document_length: int | None = None

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_") and hasattr(Tensor, name):
            _refuse_arithmetic(name)
        raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, (int, slice)):  # as no tuple is indexed
            _refuse_arithmetic("its elements")
        return tuple.__getitem__(self, place)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        _refuse_arithmetic(getattr(function, "__name__", str(function)))


def _refuse_arithmetic(what: str) -> NoReturn:
    raise UserError(f"the model computes with attention's mask ({what}), of which there is no tensor; {_OWN_ATTENTION}")


CAUSAL = Seen(right=0)


def _attention_by(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Seen | Tensor | None,  # some models give it by this name
        **options: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [b, h, l, d], key and value [b, k, l, d] -> [b, l, h, e].

        Raises UserError for an option that our attention does not have, where the model's own does not stand in.
        """
        where = type(module).__name__
        is_causal = options.get("is_causal")
        seen = Seen() if attention_mask is None else attention_mask
        if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            seen = CAUSAL
        if isinstance(attention_mask, Seen) and key.shape[2] != query.shape[2]:
            raise UserError(f"{where} gives attention keys that its mask does not know; {_OWN_ATTENTION}")
        others = _others(options)
        if others or not isinstance(seen, Seen):
            what = _spelled(others[0]) if others else "a mask of its own"
            own = _written(type(module), others) if kernel == "auto" else None
            if own is None:
                raise UserError(f"{where} asks attention for {what}, which is not supported; {_OWN_ATTENTION}")
            return _as_written(module, own, what, query, key, value, seen, options)
        if in_rows.get() is not None and seen.documents is None:
            raise UserError(
                f"{where} gives attention no mask, and would not keep documents apart; leave out --document_mask"
            )
        given = {
            "sinks": options.get("s_aux"),
            "documents": seen.documents,
            "document_length": seen.document_length,
            "scale": options.get("scaling"),
            "is_causal": None if seen.right == 0 else False,
            "window": _window(seen, key.shape[2]),
            "softcap": options.get("softcap"),
            "kernel": kernel if kernel != "auto" else None,
            "dropout": options.get("dropout") or None,
        }
        return attention(query, key, value, **{name: x for name, x in given.items() if x is not None}), None

    return attend


def _window(seen: Seen, length: int) -> tuple[int | None, int | None] | None:
    """Attention's window, for sequences of so many tokens. None: there is none, apart from causality."""
    left, right = (None if side is None or side >= length - 1 else side for side in seen[:2])
    right = right or None
    return None if left is None and right is None else (left, right)


def _others(options: dict[str, Any]) -> list[str]:
    """The options that would change attention's result, and are not honoured."""
    known = _HONOURED | _HARMLESS
    return [name for name, value in options.items() if name not in known and value is not None and value is not False]


def _spelled(option: str) -> str:
    return f"{_MEANING[option]}: option {option}" if option in _MEANING else f"the option {option}"


def _written(kind: type[nn.Module], options: list[str]) -> Callable[..., Any] | None:
    """The function of attention in the file of a class, where it has these options by name; None: there is none."""
    found = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
    return found if found is not None and set(options) <= inspect.signature(found).parameters.keys() else None


def _as_written(
    module: nn.Module,
    own: Callable[..., Any],
    what: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Seen | Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention by the function with which the model itself computes it.

    Raises UserError where documents are to be kept apart: what the model does with them is not known.
    """
    if in_rows.get() is not None:
        raise UserError(
            f"{type(module).__name__} asks attention for {what}, which may not keep documents apart; leave out "
            "--document_mask"
        )
    _warn_of_all_scores(type(module).__name__, what)
    if isinstance(mask, Seen):
        rows, keys = query.shape[2], key.shape[2]
        asked = Asked(1.0, keys - rows, mask.left, mask.right)
        hidden = asked.hidden(slice(0, rows), slice(0, keys), query.device)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]
    return own(module, query, key, value, mask, **options)[0], None


@functools.cache
def _warn_of_all_scores(where: str, what: str) -> None:
    logger.warning("%s asks attention for %s: it is computed as the model writes it, all scores at once", where, what)


_OWN_ATTENTION = "--attn_implementation eager computes attention as the model writes it"


def _mask(*args: Any, **options: Any) -> Seen:
    """transformers' interface for masks: what a mask lets rows see, without a tensor.

    Raises UserError for a mask that hides more than windows and documents do, or that the model needs as a tensor.
    """
    seen = _seen(*args, **options)
    if seen is None:
        raise UserError(f"the model attends with a mask that is neither causal nor a window; {_OWN_ATTENTION}")
    return seen


def _mask_or_tensor(*args: Any, **options: Any) -> Seen | Tensor:
    """The same, with a tensor that is added to scores for such a mask."""
    seen = _seen(*args, **options)
    return masking_utils.eager_mask(*args, **options) if seen is None else seen


def _seen(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_: Any,
) -> Seen | None:
    """What a mask lets rows see; None: `Seen` cannot say it, or a tensor is asked for.

    Documents in rows are part of it, whether the model hands on positions or not.
    """
    seen = _seen_by(mask_function, kv_length)
    as_tensor = not (allow_is_causal_skip or allow_is_bidirectional_skip)
    if seen is None or as_tensor or attention_mask is not None or q_length != kv_length:
        return None
    documents = in_rows.get()
    return seen if documents is None else Seen(seen.left, seen.right, *documents)


def _seen_by(function: Callable[..., Any], length: int) -> Seen | None:
    """What a mask function lets rows of `length` tokens see. None for a function that is not known here.

    The functions of transformers are recognised by what made them, and by the arguments that they enclose.
    """
    if function is causal_mask_function:
        return CAUSAL
    if function is bidirectional_mask_function:
        return Seen()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    enclosed = inspect.getclosurevars(function).nonlocals
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        return functools.reduce(_both, [_seen_by(part, length) for part in enclosed["mask_functions"]])
    if maker == "sliding_window_overlay":
        return Seen(left=enclosed["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return Seen(enclosed["sliding_window"], enclosed["sliding_window"])
    if maker == "chunked_overlay" and enclosed["chunk_size"] >= length:
        return Seen()
    return None


def _both(a: Seen | None, b: Seen | None) -> Seen | None:
    """What both of two masks let rows see."""
    if a is None or b is None:
        return None
    left, right = (min((side for side in sides if side is not None), default=None) for sides in zip(a[:2], b[:2]))
    return Seen(left, right)


def _registered(kernel: str) -> str:
    """Our name for a kernel in transformers' table. Where a name has `flash` in it, transformers itself looks for a
    package of that name."""
    return f"{ATTENTION}_{kernel.replace('flash_attention_', 'fa')}"


for _kernel in ("auto", *KERNELS):
    AttentionInterface.register(_registered(_kernel), _attention_by(_kernel))
    AttentionMaskInterface.register(_registered(_kernel), _mask_or_tensor if _kernel == "auto" else _mask)


def set_attention(config: PretrainedConfig, implementation: str, model_class: type[PreTrainedModel]) -> None:
    """Chooses a model's attention: ours, or the model's own where its class has no place for another.

    Raises UserError where the model cannot have the one that is asked for.
    """
    has_place = _has_place(model_class)
    if implementation not in ("auto", "eager") and not has_place:
        raise UserError(
            f"{model_class.__name__} has attention of its own that no kernel can stand in for; use "
            "--attn_implementation eager"
        )
    if implementation == "auto" and not has_place:
        if _has_attention(config):
            logger.warning("%s has attention of its own, which computes all scores at once", model_class.__name__)
        implementation = "eager"
    config._attn_implementation = implementation if implementation == "eager" else _registered(implementation)


def _has_attention(config: PretrainedConfig) -> bool:
    try:
        return hasattr(config, "num_attention_heads")
    except Exception:  # what transformers raises where each layer has its own number
        return True


# Where a model gives attention by another name something else than a mask, such as numbers of keys; or makes something
# of a mask by its type.
_TELLS_APART = re.compile(
    r"""_attn_implementation in [(\[]["']eager|isinstance\(attention_mask, (torch\.Tensor|BlockMask)\)"""
)


def _has_place(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model looks its attention up among transformers' functions, and not among classes of its own; and gives
    all of them the same."""
    module = sys.modules[model_class.__module__]
    tables = [x for x in vars(module).values() if isinstance(x, dict) and "eager" in x]
    if any(isinstance(kind, type) for table in tables for kind in table.values()):
        return False
    has_place = model_class._supports_attention_backend or hasattr(module, "ALL_ATTENTION_FUNCTIONS")
    return has_place and not _TELLS_APART.search(_source(module))


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except OSError:  # there is no file of it
        return ""
