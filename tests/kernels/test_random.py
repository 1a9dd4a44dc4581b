"""Random numbers by counting: those of the published generator, evenly spread, and each a part of the whole."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from nnscaler import same_dropout
from nnscaler.kernels.random import draws_of, dropout, kept, no_draws, numbers_of, philox, place_of, together

# Counter, key and what is drawn, of philox4x32 with ten rounds: from kat_vectors of its authors' library Random123.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "drawn"), KNOWN)
def test_the_generator_gives_the_numbers_that_its_authors_publish(counter, key, drawn):
    assert list(philox(words(counter), words(key))) == words(drawn)


SHAPE = (8, 64, 128)
PLACE = place_of("layers.3.mlp", 0)


def drawn(seed: int = 1, step: int = 2, micro_batch: int = 3, place: Tensor = PLACE, p: float = 0.3) -> Tensor:
    return kept(p, draws_of(seed, step, micro_batch), place, together(numbers_of(SHAPE)))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_as_many_are_dropped_as_are_to_be(p):
    n = math.prod(SHAPE)
    for found in (drawn(p=p), drawn(p=p, seed=-7), drawn(p=p, step=10**6), drawn(p=p, seed=2**40 + 1)):
        assert abs(int((~found).sum()) - p * n) < 5 * math.sqrt(n * p * (1 - p))
        by_row = (~found).double().mean(-1).flatten()  # no row or column has all of it
        assert by_row.std().item() == pytest.approx(math.sqrt(p * (1 - p) / SHAPE[-1]), rel=0.25)


OTHERS = {
    "seed": {"seed": 2}, "a high bit of the seed": {"seed": 1 + 2**32}, "step": {"step": 3},
    "micro-batch": {"micro_batch": 4}, "step for micro-batch": {"step": 3, "micro_batch": 2},
    "layer": {"place": place_of("layers.4.mlp", 0)}, "call": {"place": place_of("layers.3.mlp", 1)},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_what_differs_in_anything_is_drawn_independently(other):
    first, second = (x.double() - x.double().mean() for x in (drawn(), drawn(**OTHERS[other])))
    correlation = (first * second).mean() / (first.std() * second.std())
    assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_what_is_drawn_stays_what_it_was():
    """An element's number is the low half of the counter; micro-batch and step are the high half. The key's words are
    those of the seed, changed by the place's."""
    seed, place, numbers = 0x0000_0105_0000_0F03, 0x7123_4567_89AB_CDEF, [0, 1, 77, 2**32 + 5]
    found = kept(0.4, draws_of(seed, step=9, micro_batch=6), torch.tensor(place), torch.tensor(numbers))
    key = [torch.tensor(0x0F03 ^ 0x89AB_CDEF), torch.tensor(0x105 ^ 0x7123_4567)]
    for stays, number in zip(found.tolist(), numbers):
        counter = [torch.tensor(word) for word in (number % 2**32, number // 2**32, 6, 9)]
        assert stays == (philox(counter, key)[0].item() >= 0.4 * 2**32)
    many = torch.arange(64)
    expected = philox([many, 0 * many, 0 * many + 6, 0 * many + 9], key)[0] >= round(0.4 * 2**32)
    assert torch.equal(kept(0.4, draws_of(seed, step=9, micro_batch=6), torch.tensor(place), many), expected)


def test_neighbours_are_independent():
    found = drawn().double() - 0.7
    for dim, apart in product(range(3), (1, 2, 4)):
        correlation = (found * found.roll(apart, dim)).mean() / found.var()
        assert abs(correlation) < 5 / math.sqrt(found.numel())


def test_beyond_32_bits_a_number_still_counts():
    base = torch.arange(1000)
    low, high = (kept(0.5, draws_of(0, 0, 0), PLACE, base + offset) for offset in (0, 2**32))
    assert 400 < int((low == high).sum()) < 600


def test_values_and_gradients():
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    given, numbers = draws_of(1, 2, 3), numbers_of(SHAPE)
    y = dropout(x, 0.25, given, PLACE, numbers)
    stays = kept(0.25, given, PLACE, together(numbers))
    torch.testing.assert_close(y, torch.where(stays, x / 0.75, 0.0))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, stays.double() / 0.75)
    assert torch.equal(dropout(x, 0.25, no_draws(), PLACE, numbers), x)
    assert not dropout(x, 1.0, given, PLACE, numbers).any()
    assert dropout(x.bfloat16(), 0.25, given, PLACE, numbers).dtype == torch.bfloat16
    inside = x.detach().clone()
    inside[0, 0, 0] = math.nan
    assert not dropout(inside, 1.0, given, PLACE, numbers).any(), "what is dropped is 0, whatever it was"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.stack([layer(nn.functional.dropout(x)) for layer in self.layers])
        return torch.stack([first, nn.functional.dropout(first, training=False)])


def test_a_plain_module_drops_by_counting_only_where_it_is_told_to():
    net, x = Net(), torch.ones(2, 3, 4)

    def run(seed: int, step: int, micro_batch: int = 0) -> Tensor:
        with same_dropout(net, seed, step, micro_batch):
            return net(x)

    found = run(1, 2)
    assert torch.equal(run(1, 2), found)
    assert torch.equal(found[0], found[1]), "outside training nothing is dropped"
    assert not torch.equal(found[0, 0], found[0, 1]), "each layer has a place of its own"
    for other in (run(2, 2), run(1, 3), run(1, 2, 1), net(x)):
        assert not torch.equal(other, found)
    net.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(1, 2)
    assert not nn.modules.module._global_forward_hooks
