"""What a module takes and returns, by name."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.signature import Numbers, Signature, _loss, _tensors

ONE, TWO, THREE = (torch.tensor(float(number)) for number in (1, 2, 3))


@dataclass
class Made:
    first: Tensor
    rest: list[Tensor]


def test_each_tensor_of_what_is_returned_has_the_way_to_it():
    pair = namedtuple("pair", ("x", "y"))
    given = {"a": {"b": ONE, "text": "no tensor"}, "c": [TWO, pair(ONE, THREE)], 5: Made(ONE, [TWO])}
    assert [name for name, _ in _tensors(given)] == ["a.b", "c.0", "c.1.x", "c.1.y", "5.first", "5.rest.0"]
    assert list(_tensors(ONE)) == [("", ONE)]
    assert list(_tensors(Made)) == [], "a class is no result"


@pytest.mark.parametrize(
    ("output", "loss"),
    [
        (ONE, 1.0),
        ({"other": THREE, "loss": TWO}, 2.0),
        (SimpleNamespace(loss=TWO), 2.0),
        ((ONE, torch.tensor([THREE])), 4.0),
        ({"one": ONE, "two": TWO}, 3.0),
        ({"loss": torch.tensor([2.0]), "logits": torch.zeros(3, 4)}, 2.0),
    ],
)
def test_what_is_trained_where_nobody_says(output, loss):
    assert _loss(output).item() == loss


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"loss": torch.zeros(2), "x": ONE}, r"loss \[2\], x \[\]"),
        ({"logits": torch.zeros(3, 4)}, r"logits \[3, 4\]"),
        (None, "NoneType"),
        ([], "list"),
    ],
)
def test_what_gives_no_loss_is_one_line(output, said):
    with pytest.raises(UserError, match=f"forward gives {said}; what is trained must give one number, the loss"):
        _loss(output)


class Several(nn.Module):
    def forward(self, batch: dict[str, Tensor], *rest: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        x = batch["x"] * scale
        return {"loss": x.sum(), "largest": x.max(), "rows": x.expand(2), "rest": rest[0].sum()}


def test_arguments_go_in_by_name_and_come_back_in_place():
    rest = (torch.ones(2), torch.ones(1))
    signature = Signature(Several(), ({"x": ONE.view(1), "flag": True}, *rest))
    assert list(signature.tensors) == ["batch_x", "rest_0", "rest_1"]
    assert signature.constants == {"batch_flag": True, "scale": 2.0}
    given = {"batch_x": TWO.view(1), "rest_0": torch.zeros(2), "rest_1": THREE.view(1)}
    args, kwargs = signature.put(given)
    assert (args[0]["flag"], args[0]["x"].item(), args[2].item(), kwargs) == (True, 2.0, 3.0, {"scale": 2.0})
    named = signature.named(({"x": THREE.view(1), "flag": True}, *rest))
    assert (list(named), named["batch_x"].item()) == (list(given), 3.0)
    for wrong, said in (
        (({"x": ONE.view(1), "flag": False}, *rest), "input 'batch_flag' of a micro-batch is False; the example was T"),
        (({"x": ONE.view(1)}, *rest), "input 'batch_flag' of a micro-batch is missing; the example was True"),
        (({"x": ONE.view(1), "flag": True}, rest[0]), "input 'rest_1' of a micro-batch is missing; the example was "),
        (({"x": ONE.view(1), "flag": True, "y": ONE}, *rest), "a micro-batch has 'batch_y'; the example has batch_x"),
        (({"x": ONE.view(1).double(), "flag": True}, *rest), r"'batch_x' of a micro-batch is \[1\] torch.float64; the"),
    ):
        with pytest.raises(UserError, match=said):
            signature.named(wrong)
    numbers = Numbers(signature, None)
    made = numbers.of(Several())
    found = made(**{**given, "batch_x": torch.tensor([3.0])})
    assert (found.dtype, found.tolist(), numbers.names) == (torch.float64, [6.0, 6.0, 0.0], ["largest", "rest"])
    assert Numbers(signature, lambda output: output["largest"]).of(Several())(**given).tolist() == [4.0, 4.0, 0.0]
    with pytest.raises(UserError, match=r"what loss= makes of what forward gives is \[1, 2\]; it must be one number"):
        Numbers(signature, lambda output: torch.zeros(1, 2)).of(Several())(**given)


def test_a_loss_alone_stays_in_its_own_type():
    class Alone(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"rows": x.expand(2, 3), "loss": x.sum().view(1)}

    numbers = Numbers(Signature(Alone(), (ONE.bfloat16(),)), None)
    found = numbers.of(Alone())(x=TWO.bfloat16())
    assert (found.dtype, found.shape, found.item(), numbers.names) == (torch.bfloat16, (), 2.0, [])


def test_names_that_cannot_be_told_apart_and_examples_without_tensors():
    class Both(nn.Module):
        def forward(self, a: dict[str, Tensor], a_b: Tensor) -> Tensor:
            return a_b

    with pytest.raises(UserError, match="inputs of Both have names that differ only in '_' and other signs"):
        Signature(Both(), ({"b": ONE}, TWO))
    with pytest.raises(UserError, match="the example of Both's inputs has no tensor"):
        Signature(Both(), ({"c": 1}, 2))
    with pytest.raises(
        UserError, match=r"forward of Both takes .*; of the example: missing a required argument: 'a_b'"
    ):
        Signature(Both(), {"a": {"b": ONE}})


def test_every_kind_of_parameter_gives_its_arguments_names():
    """A tuple in the place of one parameter, several more after it, and keywords whose names are no identifiers."""

    class Places(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *rest: Tensor) -> Tensor:
            return pair[1] + rest[1]

    class Keywords(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, extra: Tensor, **more: Tensor) -> Tensor:
            return pair[1] + extra * more["in-put"]

    by_place = Signature(Places(), ((ONE, TWO), THREE, TWO))
    assert {name: tensor.item() for name, tensor in by_place.tensors.items()} == {
        "pair_0": 1.0, "pair_1": 2.0, "rest_0": 3.0, "rest_1": 2.0
    }  # fmt: skip
    by_keyword = Signature(Keywords(), {"in-put": TWO, "extra": THREE, "pair": (ONE, TWO)})
    named = by_keyword.named({"pair": (TWO, THREE), "extra": ONE, "in-put": TWO})
    assert {name: tensor.item() for name, tensor in named.items()} == {
        "pair_0": 2.0, "pair_1": 3.0, "extra": 1.0, "in_put": 2.0
    }  # fmt: skip
    places, keywords = by_keyword.put(named)
    assert places == ((TWO, THREE),)
    assert keywords == {"extra": ONE, "in-put": TWO}


@pytest.mark.parametrize(
    ("constant", "like", "unlike"),
    [(1, 1, (True, 1.0, 2)), ("a", "a", ("b", None)), (None, None, (0, "None")), (0.5, 0.5, (0.25,))],
)
def test_a_constant_is_that_of_the_example_in_value_and_type(constant, like, unlike):
    class Scaled(nn.Module):
        def forward(self, x: Tensor, constant: object) -> Tensor:
            return x.sum()

    signature = Signature(Scaled(), (ONE, constant))
    assert list(signature.named((TWO, like))) == ["x"]
    for other in unlike:
        with pytest.raises(UserError, match=f"^input 'constant' of a micro-batch is {other!r}; the example was"):
            signature.named((TWO, other))
    array = np.ones(2)
    assert list(Signature(Scaled(), (ONE, array)).named((TWO, array))) == ["x"], "which is the very same"
    with pytest.raises(UserError, match="input 'constant' of a micro-batch is array"):
        Signature(Scaled(), (ONE, array)).named((TWO, np.ones(2)))


def test_only_the_loss_has_a_gradient():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x * 2).sum(), (x * 3).max(), x

    numbers = Numbers(Signature(Two(), (torch.ones(2),)), lambda output: output[0])
    x = torch.tensor([1.0, 5.0], requires_grad=True)
    found = numbers.of(Two())(x=x)
    assert (found.tolist(), numbers.names) == ([12.0, 15.0], ["1"]), "the loss is not told twice, nor what is no number"
    found.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
