"""What follows from documents is worked out once for a micro-batch, the device is not asked, and nothing is left."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnscaler.kernels import Asked, Documents, attend, documents
from nnscaler.kernels.attention import choice, flex
from nnscaler.runtime import collectives, pipeline
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.dealing import rows_of
from tests.kernels.test_attention import libraries_are_there  # noqa: F401  a fixture

NUMBERS = [[0, 0, 0, 1, 1, 5, 5, 5, 2], [3, 1, 1, 1, 1, 1, 1, 0, 0]]


@pytest.fixture
def numbers() -> Tensor:
    return torch.tensor(NUMBERS)


def test_borders_by_hand(numbers):
    rows, keys, longest = Documents(numbers).borders(0, 9)
    assert rows.tolist() == keys.tolist() == [0, 3, 5, 8, 9, 10, 16, 18]
    assert (rows.dtype, longest) == (torch.int32, 6)
    rows, keys, longest = Documents(numbers).borders(4, 3)  # places 4, 5 and 6
    assert rows.tolist() == [0, 0, 1, 3, 3, 3, 6, 6]
    assert keys.tolist() == [0, 3, 5, 8, 9, 10, 16, 18]
    rows, keys, longest = Documents(numbers).part(slice(1, 2), slice(0, 3)).borders(0, 3)
    assert (rows.tolist(), keys.tolist(), longest) == ([0, 1, 3], [0, 1, 3], 2)


def test_in_inference_too_documents_are_known():
    """Where torch does not count what is written."""
    with torch.inference_mode():
        numbers = torch.tensor(NUMBERS)
        assert Documents(numbers).borders(0, 9)[2] == 6
        assert not Documents(numbers).are_rows


def test_rows_that_are_one_document(numbers, monkeypatch):
    assert not Documents(numbers).are_rows
    assert Documents(numbers).part(slice(None), slice(5, 6)).are_rows
    assert Documents(torch.tensor([[4, 4], [2, 2]])).are_rows
    chosen = []
    monkeypatch.setattr(choice, "_load", lambda kernel: chosen.append(kernel) or (lambda q, k, v, asked: q))
    monkeypatch.setattr(choice.masked, "attend_under_masks", lambda q, *_: chosen.append("under masks") or q)
    query = torch.zeros(1, 1, 3, 4)
    for document in ([0, 0, 0], [0, 0, 1]):
        attend(query, query, query, Asked(1.0, right=0, documents=Documents(torch.tensor([document]))), "auto")
    assert chosen == ["sdpa", "under masks"], "as without documents, where all are one"


@pytest.mark.usefixtures("libraries_are_there")
def test_layers_what_is_computed_again_and_backward_share_it(numbers, monkeypatch):
    made = []
    original = Documents._borders
    monkeypatch.setattr(Documents, "_borders", lambda self, *given: made.append(given) or original(self, *given))
    run = choice.KERNELS["flash_attention_2"].load()

    def layer(x: Tensor, numbers: Tensor) -> Tensor:
        asked = Asked(1.0, right=0, documents=Documents(numbers))
        whole = run(x, x, x, asked)
        part = Documents(numbers).part(slice(1, 2), slice(0, 6))  # as where rows are dealt out
        return whole + run(x[1:, 3:6], x[1:, :6], x[1:, :6], Asked(1.0, 3, right=0, documents=part)).sum()

    x = torch.randn(2, 9, 1, 4, requires_grad=True)
    for _ in range(2):
        y = x
        for _ in range(3):
            y = checkpoint(layer, y, numbers, use_reentrant=False)
        y.sum().backward()
    assert made == [(0, 9), (3, 3)]
    numbers[0, 0] = 7  # another micro-batch in the same memory
    layer(x, numbers)
    assert made == [(0, 9), (3, 3)] * 2


def test_the_device_is_not_asked_where_the_host_has_told(numbers, monkeypatch):
    monkeypatch.setattr(Tensor, "is_cpu", False)  # as if it were elsewhere
    asked = []
    monkeypatch.setattr(Tensor, "cpu", lambda self: asked.append(self) or self.clone())
    there = numbers.clone()
    Documents(there).note(numbers)
    assert Documents(there).part(slice(1, 2), slice(2, 5)).on_host.tolist() == [[1, 1, 1]]
    assert not asked
    other = numbers.clone()
    for sequence in range(2):
        found = Documents(other).part(slice(sequence, sequence + 1), slice(4, 7)).on_host
        assert found.tolist() == [NUMBERS[sequence][4:7]]
    assert len(asked) == 1


def test_the_host_knows_copies_of_what_it_knows(numbers, monkeypatch):
    """As a device gets its part of a batch, and a pipeline those of several micro-batches."""
    monkeypatch.setattr(Tensor, "is_cpu", False)  # as if they were elsewhere
    asked = []
    monkeypatch.setattr(Tensor, "cpu", lambda self: asked.append(self) or self.clone())
    one, other = numbers.clone(), numbers.flip(0)
    Documents(one).note(numbers)
    part = collectives.slice_(one, Axis(2, 1, "group"), 0, "pad")
    assert Documents(part).on_host.tolist() == NUMBERS[1:]
    assert not asked
    together = pipeline._stacked([one, other])
    assert Documents(together[0]).on_host.tolist() == NUMBERS
    assert len(asked) == 1, "it does not know the other one"
    Documents(other).note(numbers.flip(0))
    together = pipeline._stacked([one, other])
    assert [Documents(each).on_host.tolist() for each in together] == [NUMBERS, NUMBERS[::-1]]
    one[0, 0] = 7  # what was noted of it is no longer so
    assert Documents(pipeline._stacked([one, other])[0]).on_host[0, 0] == 7
    assert len(asked) == 2


def test_nothing_is_left_of_a_micro_batch(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    gc.collect()
    before = len(documents._known)
    known = Documents(torch.tensor(NUMBERS))
    assert not known.are_rows
    known.borders(0, 9)
    known.note(known.numbers)
    rows_of(known)
    x = torch.zeros(2, 9, 1, 4)
    for _ in range(2):
        flex.run(x, x, x, Asked(1.0, right=0, documents=known))
    assert len(known._memory.results) == 4
    assert len(documents._known) == before + 1
    del known
    gc.collect()
    assert len(documents._known) == before
