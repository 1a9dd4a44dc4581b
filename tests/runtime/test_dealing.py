"""Attention's rows are dealt out so that devices have as much to do, by what the documents of a sequence let them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnscaler.kernels import Documents
from nnscaler.runtime import dealing
from nnscaler.runtime.dealing import Rows, deal, rows_of, rows_of_one

sides = st.one_of(st.none(), st.integers(0, 40))


def numbers_of(lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def seen(numbers: np.ndarray, place: int, limits: tuple[int | None, int | None]) -> int:
    """Keys that a row sees, counted one by one."""
    left, right = (len(numbers) if side is None else side for side in limits)
    return sum(
        numbers[key] == numbers[place] for key in range(max(0, place - left), min(len(numbers), place + right + 1))
    )


def loads_of(owners: tuple[int, ...], work: list[int], devices: int) -> list[int]:
    size = len(work) // len(owners)
    loads = [0] * devices
    for place, one in enumerate(work):
        loads[owners[place // size]] += one
    return loads


@given(
    st.lists(st.integers(1, 60), min_size=1), st.sampled_from([1, 2, 3, 4]), st.integers(1, 24), st.tuples(sides, sides)
)
def test_every_device_has_as_many_rows_and_none_much_more_work_than_must_be(lengths, devices, rows, limits):
    numbers = np.resize(numbers_of(lengths), devices * rows + 5)
    numbers = np.cumsum(np.diff(numbers, prepend=numbers[:1]) != 0)  # repeated, they are other documents
    owners = Rows.of(numbers).owners(devices, rows, limits)
    assert len(owners) % devices == 0
    assert rows % (len(owners) // devices) == 0
    assert all(owners.count(device) == len(owners) // devices for device in range(devices))
    work = [seen(numbers, place, limits) for place in range(5, len(numbers))]  # those of the last rows
    own = loads_of(tuple(range(devices)), work, devices)
    assert max(loads_of(owners, work, devices)) <= max(own)
    if len(owners) > devices:
        assert max(own) * devices > dealing.EVEN * sum(own), "as they lie, they were good enough"


def test_one_document_is_dealt_out_from_both_ends():
    assert rows_of_one(64).owners(4, 16, (None, 0)) == (0, 1, 2, 3, 3, 2, 1, 0)
    assert rows_of_one(64).owners(4, 16, (None, None)) == (0, 1, 2, 3)


@pytest.mark.parametrize(("devices", "left"), [(4, None), (2, None), (2, 10), (4, 160), (2, 100), (4, 20)])
def test_windows_are_dealt_out_evenly(devices, left):
    work = [seen(np.zeros(256), place, (left, 0)) for place in range(256)]
    loads = loads_of(rows_of_one(256).owners(devices, 256 // devices, (left, 0)), work, devices)
    assert max(loads) <= 1.06 * sum(loads) / devices


def test_documents_that_fill_a_device_s_rows_stay_there():
    assert Rows.of(numbers_of([16] * 4)).owners(4, 16, (None, 0)) == (0, 1, 2, 3)
    assert Rows.of(numbers_of([8, 4, 4, 16])).owners(2, 16, (None, 0)) != (0, 1)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_long_tails_are_dealt_out_evenly(devices):
    """Documents of 8,192 tokens on average, the k-th longest in proportion to 1 / k, in sequences of 131,072."""
    generator = np.random.default_rng(0)
    length = 131_072
    ranks = 1 / np.arange(1, 1001)
    lengths = np.maximum(1, ranks / ranks.mean() * 8192).astype(int)
    stream = numbers_of(generator.permutation(lengths).tolist())
    for start in range(0, len(stream) - length, length):
        rows = Rows.of(stream[start : start + length])
        owners = rows.owners(devices, length // devices, (None, 0))
        work = (np.arange(length) - rows.starts + 1).reshape(len(owners), -1).sum(1)
        loads = np.bincount(owners, work, devices)
        assert loads.max() <= 1.1 * loads.mean(), start


def test_what_is_most_goes_to_who_has_least():
    assert deal([5, 1, 4, 2], 2) == (0, 0, 1, 1)
    assert deal([9, 1, 1, 1], 2) == (0, 1, 1, 0), "each has two"


def test_documents_are_read_once():
    documents = Documents(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    first, second = found = rows_of(documents)
    assert first.starts.tolist() == [0, 0, 2, 2]
    assert first.ends.tolist() == [2, 2, 4, 4]
    assert second.ends.tolist() == [4] * 4
    assert rows_of(Documents(documents.numbers)) is found
    assert rows_of(Documents(documents.numbers.clone())) is not found


def test_who_owns_which_rows_is_worked_out_once(monkeypatch):
    rows, asked = dealing.Rows.of(np.zeros(48, np.int64)), []
    monkeypatch.setattr(dealing.Rows, "_even", lambda self, *given: asked.append(given[:2]) or (len(asked),))
    different = [(3, 16, (None, 0)), (4, 12, (None, 0)), (3, 8, (None, 0)), (3, 16, (5, 0)), (3, 16, (None, 5))]
    for _ in range(2):
        assert [rows.owners(*given) for given in different] == [(1,), (2,), (3,), (4,), (5,)]
    assert asked == [given[:2] for given in different]


def test_rows_are_cut_into_more_pieces_up_to_the_most(monkeypatch):
    """Where no number of pieces is even enough, and as long as these are equally long."""
    tried = []
    monkeypatch.setattr(dealing, "EVEN", 0)
    monkeypatch.setattr(dealing, "MOST_PIECES", 4)
    monkeypatch.setattr(dealing, "deal", lambda work, devices: tried.append(len(work)) or deal(work, devices))
    for rows, wanted in ((16, [6, 12]), (10, [6]), (3, [])):
        tried.clear()
        dealing.Rows.of(np.zeros(3 * rows, np.int64)).owners(3, rows, (None, 0))
        assert tried == wanted
