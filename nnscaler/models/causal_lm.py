"""Hugging Face causal language models as the compiler trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from nnscaler import hub
from nnscaler.errors import UserError
from nnscaler.models.adapters import adapted
from nnscaler.models.attention import set_attention
from nnscaler.models.balance import balancing_loss, report_routers, routers_met
from nnscaler.models.documents import Documents, check_documents, rows_hold
from nnscaler.models.experts import divide_gates, set_experts
from nnscaler.models.frequencies import follow_rows
from nnscaler.models.positions import check_positions, check_rope
from nnscaler.models.scans import make_scans_operators
from nnscaler.trace import build_on_meta

if TYPE_CHECKING:
    from peft import LoraConfig

IGNORED = -100  # label of a token that counts for nothing
MOST_LAYERS = 4096  # tracing runs each, to find those that are alike
WEIGHT_PREFIX = "model."  # of `CausalLM`'s parameters, before the names that the Hugging Face model has for them


class CausalLM(nn.Module):
    """A causal language model, whose forward gives the sum of a micro-batch's losses.

    linear_loss  takes the place of the model's last projection and the loss, where given:
                 `linear_loss(hidden [b, l, d], weight [n, d], labels [b, l], ignored) -> [b, l]`
    document_length  for predictions, where documents are kept apart: tokens of the document in which a token stands, on
                 average
    adapters     what is trained in place of the model's own weights; None: these are

    Raises UserError for a model that cannot be built; and, when it is traced, for a model with another loss.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        linear_loss: Callable[..., Tensor] | None = None,
        document_length: int | None = None,
        adapters: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = build(config)
        make_scans_operators(self.model)
        follow_rows(self.model)
        self.balanced = bool(getattr(config, "output_router_logits", False))
        if self.balanced:
            report_routers(self.model)
        if adapters is not None:
            self.model = adapted(self.model, adapters)
        divide_gates(self.model)
        self.linear_loss = linear_loss
        self.document_length = document_length

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """All inputs are [b, l] int64. A label is the next token, or `IGNORED` where there is none.

        Where rows hold several documents, `documents` has the number of each token's document, and `position_ids` count
        from 0 in each document.
        """
        held = None if documents is None else Documents(documents, self.document_length)
        given = {} if position_ids is None else {"position_ids": position_ids}
        with rows_hold(held), routers_met() as routers:
            loss = self._next_token(labels, input_ids=input_ids, **given)
        if not self.balanced:
            return loss
        return loss + balancing_loss(self.model, routers, (labels != IGNORED).sum())

    def _next_token(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        # What it makes of its routers' logits is made here; a model without the option takes none.
        options = {"output_router_logits": False} if self.balanced else {}
        if self.linear_loss is not None:
            with _LastProjection(self.model) as last:
                output = self.model(**inputs, use_cache=False, **options)
            _check_losses(output)
            if not last.gave(output.logits):
                raise UserError("the logits are not what the last projection gives; leave out --enable-chunk-loss")
            return self.linear_loss(*_without_bias(last.input, last.head), labels, IGNORED).sum()
        output = self.model(**inputs, use_cache=False, **options)
        _check_losses(output)
        logits = output.logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model of a configuration. Raises UserError where there is none or it cannot be built."""
    check_rope(config)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise UserError(f"num_hidden_layers is {layers}; it must be from 1 to {MOST_LAYERS:,}")
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **hub.NO_CODE)
    except Exception as error:  # a value that no check of ours knows makes the class raise whatever it may
        reason = f"{type(error).__name__}: {hub.first_line(error)}"
        raise UserError(f"cannot build a {config.model_type} language model: {reason}") from error
    if model.loss_function is not ForCausalLMLoss:
        raise UserError(f"{type(model).__name__} has a loss of its own, {model.loss_function.__name__}: not supported")
    return model


def _check_losses(output: Any) -> None:
    """Raises UserError where a model adds a loss to that of the next token."""
    for name, value in output.items():
        if "loss" in name and value is not None:
            raise UserError(
                f"the model adds a loss to that of the next token ({name}), which is not supported; where "
                "it comes from the experts' router, train without it: --set output_router_logits=false"
            )


def _without_bias(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Hidden states [b, l, d] and a weight [n, d] whose product is the projection's result, bias included.

    A bias becomes a column of the weight that meets a column of ones. Seven columns of zeros are added, because
    products of odd widths are slow.
    """
    if head.bias is None:
        return hidden, head.weight
    weight = torch.cat([head.weight, head.bias.unsqueeze(1), torch.zeros_like(head.weight[:, :7])], 1)
    return torch.cat([hidden, torch.ones_like(hidden[..., :1]).expand(*hidden.shape[:-1], 8)], -1), weight


class _LastProjection(TorchFunctionMode):
    """Inside, a model's last projection is not computed, and something else stands for its result. `input` is what it
    got.

    Raises UserError where the model computes anything from the result, for that would be lost.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(
                f"--enable-chunk-loss needs a last projection of class Linear, {type(model).__name__} has "
                f"{type(head).__name__}; leave it out"
            )
        self.head: nn.Linear = head
        self.input: Tensor
        self._results: list[Tensor] = []  # the projection's, and what is the same in another type

    def __enter__(self) -> _LastProjection:
        self.head.forward = self._take  # type: ignore
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        del self.head.forward

    def gave(self, logits: Tensor) -> bool:
        """Whether this is what stands for the projection's result."""
        return any(logits is result for result in self._results)

    def _take(self, hidden: Tensor) -> Tensor:
        if self._results:
            raise UserError("the model uses its last projection twice; leave out --enable-chunk-loss")
        self.input = hidden
        self._results.append(torch.empty(*hidden.shape[:-1], self.head.out_features, device="meta"))
        return self._results[0]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._results:
            return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        result = function(*args, **(kwargs or {}))
        if name == "__get__" or not any(self.gave(value) for value in inputs):  # a shape or type may be looked at
            return result
        if name not in ("contiguous", "float", "to") or result.dtype != torch.float32:
            raise UserError(
                f"the model computes with its logits before the loss ({name}), which the chunked loss does not; "
                "leave out --enable-chunk-loss"
            )
        self._results.append(result)
        return result


def prepare_config(config: PretrainedConfig, positions: int, implementation: str, documents: bool = False) -> None:
    """Sets up a configuration for training. Raises UserError for what is not supported.

    positions  how many positions the model is to know
    documents  whether documents are kept apart
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise UserError(f"{config.model_type} is not a causal language model of transformers, which train.py trains")
    if not _is_text_alone(config):
        raise UserError(f"{config.model_type} is more than a language model; give the directory of its language model")
    config.use_cache = False
    set_attention(config, implementation, model_class)
    set_experts(config)
    if documents:
        check_documents(config, model_class)
    check_positions(config, positions)


def _is_text_alone(config: PretrainedConfig) -> bool:
    try:
        return config.get_text_config() is config
    except ValueError:  # it has several models of text inside
        return False


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of a configuration's model, without making them."""
    model, _ = build_on_meta(lambda: CausalLM(config))
    return sum(parameter.numel() for parameter in model.parameters())
