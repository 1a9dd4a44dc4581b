"""A model that is made without its weights begins with the values that making it gives them, or is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nnscaler import UserError
from nnscaler.first_values import initial_parameters
from nnscaler.trace.meta import build_on_meta, build_with_first_values


class Model(nn.Module):
    def __init__(self, change: Callable[[Model], object]) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        change(self)


def first(change: Callable[[Model], object]) -> dict[str, Tensor]:
    model, _, values = build_with_first_values(lambda: Model(change))
    return dict(initial_parameters(model, 0, torch.device("cpu"), first=values))


def in_place(change: Callable[[Tensor], object]) -> Callable[[Model], None]:
    def of(model: Model) -> None:
        with torch.no_grad():
            change(model.linear.weight)

    return of


def loads(model: Model) -> None:
    model.load_state_dict({name: torch.ones(value.shape) for name, value in model.state_dict().items()})


class Given(nn.Linear):
    """A linear layer whose weight is another one than its `reset_parameters` has made."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4) * 0.02)


class OfParts(nn.Module):
    """Its `reset_parameters` is called again for its own parameters, and it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.inner.weight, 2.0)


LOST: dict[str, Callable[[Model], object]] = {
    "zeros": lambda model: nn.init.zeros_(model.linear.weight),
    "normal": lambda model: nn.init.normal_(model.linear.weight, std=1e-3),
    "truncated": lambda model: nn.init.trunc_normal_(model.linear.weight, std=1e-3),
    "orthogonal": lambda model: nn.init.orthogonal_(model.linear.weight),
    "eye": lambda model: nn.init.eye_(model.linear.weight),
    "xavier": lambda model: nn.init.xavier_uniform_(model.linear.weight),
    "data": lambda model: model.linear.weight.data.mul_(0.1),
    "copied": in_place(lambda weight: weight.copy_(torch.eye(4))),
    "a row": in_place(lambda weight: weight[0].fill_(7.0)),
    "assigned": in_place(lambda weight: weight.__setitem__(0, 7.0)),
    "applied": lambda model: model.apply(lambda part: hasattr(part, "bias") and nn.init.ones_(part.weight)),
    "loaded": loads,
    "given": lambda model: setattr(model, "linear", Given()),
    "a part's": lambda model: setattr(model, "linear", OfParts()),
}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
@pytest.mark.parametrize("case", LOST)
def test_a_value_that_would_be_lost_is_refused_with_its_line(case):
    where = r"test_first_values\.py:\d+, and not in the model's _init_weights\(\) or the module's reset_parameters\(\)"
    with pytest.raises(UserError, match=rf"parameter 'linear\.[a-z.]*weight' of \w+ gets its first value at {where}"):
        first(LOST[case])


def scaled(model: Model) -> None:
    model.scale = nn.Parameter(torch.zeros(4))
    nn.init.constant_(model.scale, 1e-4)


KNOWN: dict[str, tuple[Callable[[Model], object], str, list[float]]] = {
    "full": (lambda model: setattr(model, "a", nn.Parameter(torch.full((2,), 3.0))), "a", [3, 3]),
    "computed": (lambda model: setattr(model, "a", nn.Parameter(torch.arange(1.0, 3).log())), "a", [0, 0.6931472]),
    "in place": (scaled, "scale", [1e-4] * 4),
    "in place of another": (
        lambda model: setattr(model.linear, "bias", nn.Parameter(torch.tensor([1.0, 2, 3, 4]))),
        "linear.bias",
        [1, 2, 3, 4],
    ),
    "pretrained": (
        lambda model: setattr(model, "table", nn.Embedding.from_pretrained(torch.eye(2))),
        "table.weight",
        [1, 0, 0, 1],
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_value_that_is_known_is_taken(case):
    change, name, wanted = KNOWN[case]
    values = first(change)
    assert values[name].flatten().tolist() == pytest.approx(wanted)
    assert 0 < values["other.weight"].abs().max() <= 0.5, "as a linear layer makes it"


class Own(nn.Linear):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.mul_(0).add_(5.0)


class Around(Model):
    """As models of transformers do it."""

    def __init__(self) -> None:
        super().__init__(lambda model: setattr(model, "linear", copy.deepcopy(model.other)))
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight)
            module.weight.data.fill_(6.0)
            module.bias.data.zero_()


def test_what_is_called_again_may_do_anything():
    assert first(lambda model: setattr(model, "linear", Own(4, 4)))["linear.weight"].unique().tolist() == [5.0]
    model, _, values = build_with_first_values(Around)
    found = dict(initial_parameters(model, 0, torch.device("cpu"), first=values))
    assert {name: value.unique().tolist() for name, value in found.items()} == {
        "linear.weight": [6], "linear.bias": [0], "other.weight": [6], "other.bias": [0],
    }  # fmt: skip


BUFFERS: dict[str, Callable[[Model], Tensor]] = {
    "random": lambda model: torch.randn(4),
    "filled": lambda model: torch.empty(4).fill_(2.0),
    "of a weight": lambda model: model.linear.weight.detach().mean(0),
    "on meta": lambda model: torch.ones(4, device="meta"),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_a_buffer_whose_value_would_be_lost_is_refused(case):
    with pytest.raises(UserError, match="buffer 'b' has no value that is known: it is made of random numbers, of wei"):
        build_on_meta(lambda: Model(lambda model: model.register_buffer("b", BUFFERS[case](model), persistent=False)))
    with torch.device("meta"):
        whole = Model(lambda model: model.register_buffer("b", torch.ones(4)))
    with pytest.raises(UserError, match="buffer 'b' has no value that is known"):
        build_on_meta(lambda: copy.deepcopy(whole))


def test_random_buffers_depend_on_the_seed_alone():
    def made(seed: int) -> list[int]:
        drawn = build_with_first_values(
            lambda: Model(lambda model: model.register_buffer("b", torch.randperm(50))), seed
        )
        return drawn[1]["b"].tolist()

    before = torch.random.get_rng_state()
    assert made(1) == made(1) != made(2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: float(model.linear.weight.detach().std()),
        lambda model: setattr(model.linear.weight, "data", torch.eye(4)),
        lambda model: torch.from_numpy(model.linear.weight.detach().numpy()),
    ],
)
def test_a_model_that_needs_the_values_of_weights_to_be_made_is_refused(change):
    with pytest.raises(UserError, match=re.escape("the weights have no values when the model is made (")):
        build_on_meta(lambda: Model(change))
    with pytest.raises(RuntimeError, match="mine"):
        build_on_meta(lambda: Model(lambda model: (_ for _ in ()).throw(RuntimeError("mine"))))
