"""The loss that keeps the loads of experts even, where a model's configuration asks for it (`output_router_logits`).

transformers computes it from the logits of all routers: how often each expert is chosen, times how likely it was,
summed over the layers of a micro-batch. Two things are otherwise here. Logits are results of their layers, so that a
layer is still a function that is compiled once; and the choices are counted over the samples of all copies of the
model, which together are what one process would have as its micro-batch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from nnscaler.errors import UserError
from nnscaler.operators.copies import average_over_copies

_logits: ContextVar[list[Tensor]] = ContextVar("logits of the routers met so far")


class _Reporting:
    """Placed before a layer's class. The result of the layer is then a pair, and its caller sees only the first of
    it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, logits = super().__call__(*args, **kwargs)  # type: ignore[misc]
        _logits.get().append(logits)
        return hidden

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        found: list[Tensor] = []
        router, index = self._router  # type: ignore[attr-defined]
        hook = router.register_forward_hook(lambda module, given, results: found.append(results[index]))
        try:
            hidden = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()
        return hidden, found[0]


def report_routers(model: PreTrainedModel) -> None:
    """Makes each layer with a router report its logits. Raises UserError for a model whose loss of this kind is not
    known."""
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    missing = [
        name for name in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef") if not hasattr(model, name)
    ]
    if recorder is None or missing or _loss_function(model) is None:
        raise UserError(
            f"{type(model).__name__} has no loss from the experts' router that is known here; train without it: --set "
            "output_router_logits=false"
        )
    for part in list(model.modules()):
        layers: Any = part if isinstance(part, nn.ModuleList) else ()
        for layer in layers:
            routers = [inner for inner in layer.modules() if isinstance(inner, recorder.target_class)]
            if len(routers) == 1:
                layer._router = (routers[0], recorder.index)  # in a pair, so that it is no module of the layer's
                kind: Any = type(layer)
                layer.__class__ = _reporting(kind)


@functools.cache
def _reporting(layer_class: Any) -> Any:
    """The class of layers that report. It has the name of the class that does not."""
    return type(layer_class.__name__, (_Reporting, layer_class), {})


@contextmanager
def routers_met() -> Iterator[list[Tensor]]:
    """Inside, collects the logits [tokens, experts] of all routers."""
    found: list[Tensor] = []
    token = _logits.set(found)
    try:
        yield found
    finally:
        _logits.reset(token)


def balancing_loss(model: PreTrainedModel, logits: list[Tensor], labels: Tensor) -> Tensor:
    """This copy's part of what a micro-batch's loss has more, as a sum over labels like the loss itself.

    logits  [tokens, experts] of each router
    labels  how many labels count for something, a number

    In one process with all samples of the micro-batch, it is `router_aux_loss_coef` times transformers' loss times the
    labels. That loss is linear in the likelihoods of this copy's tokens; counts and labels are averages over copies.
    """
    function = _loss_function(model)
    with _CountedOverCopies() as counted:
        loss = function(tuple(logits), model.num_experts, model.num_experts_per_tok)
    if not counted.met:
        raise UserError(
            "this version of transformers counts the choices of experts in another way: update transformers"
        )
    return model.router_aux_loss_coef * average_over_copies(labels.float()) * loss


def _loss_function(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


class _CountedOverCopies(TorchFunctionMode):
    """Inside, counts are the averages of all copies' counts. `met`: whether anything was counted"""

    met = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.bincount:  # as transformers 5.17 counts; how long its result is hangs on the values
            experts = kwargs["minlength"]
            function, args, kwargs = torch.histc, (args[0].float(),), {"bins": experts, "min": 0, "max": experts}
        result = function(*args, **(kwargs or {}))
        if function is not torch.histc:
            return result
        self.met = True
        return average_over_copies(result)
