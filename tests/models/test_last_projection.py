"""A model whose last projection and loss are computed in its place: what of the projection is taken, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast

from nnscaler.errors import UserError
from nnscaler.models.causal_lm import CausalLM, _LastProjection, _without_bias


class Model(nn.Module):
    """Hidden states are its input, which has a dimension for channels. `after`: what becomes of the logits"""

    def __init__(self, after: Callable[[Tensor], Any] = lambda logits: logits, head: nn.Module | None = None) -> None:
        super().__init__()
        self.after, self.head = after, nn.Linear(4, 6, bias=False) if head is None else head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return self.after(self.head(input_ids))


HIDDEN = torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize(
    "after",
    [lambda x: x, lambda x: x.float(), lambda x: x.to(torch.float32).contiguous(), lambda x: x if x.shape[2] else None],
    ids=["as they are", "float", "to and contiguous", "their shape is looked at"],
)  # fmt: skip
def test_logits_are_not_computed_and_something_stands_for_them(after):
    model: Any = Model(after)
    with _LastProjection(model) as last:
        logits = model(HIDDEN)
    assert (logits.is_meta, tuple(logits.shape)) == (True, (2, 3, 6))
    assert last.gave(logits)
    assert last.input is HIDDEN
    assert last.head is model.head
    assert not last.gave(torch.empty(2, 3, 6, device="meta"))
    assert torch.equal(model.head(HIDDEN), F.linear(HIDDEN, model.head.weight)), "afterwards it computes again"


@pytest.mark.parametrize(
    ("after", "name"),
    [(lambda x: x * 2, "mul"), (lambda x: x.to(torch.bfloat16), "to"), (lambda x: x[:, -1:], "__getitem__"),
     (torch.tanh, "tanh"), (lambda x: torch.cat([x, x]), "cat"), (lambda x: x.float().sum(), "sum")],
)  # fmt: skip
def test_what_is_computed_with_logits_would_be_lost(after, name):
    model: Any = Model(after)
    with (
        pytest.raises(UserError, match=rf"computes with its logits before the loss \({name}\), which the chunked loss"),
        _LastProjection(model),
    ):
        model(HIDDEN)


def test_other_projections_are_refused():
    twice: Any = Model()
    twice.after = lambda logits: twice.head(HIDDEN)
    with pytest.raises(UserError, match="uses its last projection twice; leave out"), _LastProjection(twice):
        twice(HIDDEN)

    class Scaled(nn.Linear):
        pass

    with pytest.raises(UserError, match="needs a last projection of class Linear, Model has Scaled; leave it out"):
        _LastProjection(Model(head=Scaled(4, 6)))  # type: ignore[arg-type]


def test_a_bias_is_a_column_that_meets_ones():
    """And products stay as wide as kernels like them: by eight."""
    torch.manual_seed(0)
    head, given = nn.Linear(16, 6), torch.randn(2, 3, 16)
    hidden, weight = _without_bias(given, head)
    assert [tuple(each.shape) for each in (hidden, weight)] == [(2, 3, 24), (6, 24)]
    torch.testing.assert_close(F.linear(hidden, weight), head(given))
    F.linear(hidden, weight).sum().backward()
    assert head.bias.grad.tolist() == [6.0] * 6
    torch.testing.assert_close(head.weight.grad, given.sum((0, 1)).expand(6, 16))
    plain = nn.Linear(4, 6, bias=False)
    assert [each is other for each, other in zip(_without_bias(HIDDEN, plain), (HIDDEN, plain.weight))] == [True] * 2


def language_model(model: nn.Module, linear_loss: Callable[..., Tensor] | None) -> CausalLM:
    """With a model that is not one of transformers."""
    made = CausalLM.__new__(CausalLM)
    nn.Module.__init__(made)
    made.model, made.linear_loss, made.balanced, made.document_length = model, linear_loss, False, None  # type: ignore[assignment]
    return made


LABELS = torch.tensor([[1, -100, 5], [0, 2, -100]])


def test_the_loss_is_the_sum_over_labels_by_either_way():
    model = Model(lambda logits: CausalLMOutput(logits=logits))
    wanted = F.cross_entropy(model.head(HIDDEN).flatten(0, 1), LABELS.flatten(), ignore_index=-100, reduction="sum")
    assert torch.equal(language_model(model, None)(HIDDEN, LABELS), wanted)
    given = []

    def linear_loss(*arguments: Any) -> Tensor:
        given.extend(arguments)
        return torch.full(LABELS.shape, 2.0)

    assert language_model(model, linear_loss)(HIDDEN, LABELS).item() == 12.0
    assert [each is other for each, other in zip(given, (HIDDEN, model.head.weight, LABELS))] == [True] * 3
    assert given[3:] == [-100]


@pytest.mark.parametrize("linear_loss", [None, lambda *given: torch.zeros(2, 3)])
def test_losses_that_a_model_adds_are_refused(linear_loss):
    own = Model(lambda logits: MoeCausalLMOutputWithPast(logits=logits, aux_loss=torch.tensor(0.5)))
    with pytest.raises(UserError, match=r"adds a loss to that of the next token \(aux_loss\), which is not supported"):
        language_model(own, linear_loss)(HIDDEN, LABELS)


def test_logits_that_are_others_are_refused():
    others = Model(lambda logits: CausalLMOutput(logits=torch.empty(2, 3, 6)))
    with pytest.raises(UserError, match="the logits are not what the last projection gives; leave out"):
        language_model(others, lambda *given: torch.zeros(2, 3))(HIDDEN, LABELS)
