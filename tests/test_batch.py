"""The ways in which a step's sequences may be divided, and what allows none."""

from __future__ import annotations

import pytest

from nnscaler.batch import Batch, Division, divisors
from nnscaler.errors import UserError


def test_all_ways_to_divide_a_batch():
    assert Batch(4, 2).divisions() == [
        Division(1, 1, 2), Division(1, 2, 1), Division(2, 1, 4), Division(2, 2, 2), Division(2, 4, 1),
    ]  # fmt: skip
    assert Batch(3, 2).divisions() == [Division(2, 1, 3), Division(2, 3, 1)], "two copies cannot share three"
    assert Batch(12, 6, plan_ngpus=2).divisions() == [Division(2, 1, 4), Division(2, 2, 2), Division(2, 4, 1)]
    assert Batch(12, 4, micro_batch_size=3).divisions() == [Division(1, 3, 1), Division(2, 3, 2), Division(4, 3, 4)]
    assert Batch(12, 4, micro_batches=6).divisions() == [Division(2, 1, 6), Division(4, 2, 6)]
    assert Batch(12, 4, 2, 3, 2).divisions() == [Division(2, 3, 2)]
    for division in Batch(60, 12).divisions():
        assert 12 // division.plan_ngpus * division.micro_batch_size * division.micro_batches == 60


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(49) == [1, 7, 49]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(6, 8, 3), "runtime_ngpus is 8; it must be a multiple of plan_ngpus=3"),
        (Batch(7, 8, None, 2), "size is 7; with runtime_ngpus=8, micro_batch_size=2 it must be a multiple of 2"),
        (Batch(7, 8, 2), "7; with runtime_ngpus=8, plan_ngpus=2 (copies of the model: 4) it must be a multiple of 4"),
        (Batch(8, 8, 2, 3), "micro_batch_size=3 (copies of the model: 4) it must be a multiple of 12"),
        (Batch(8, 8, None, None, 3), "with runtime_ngpus=8, grad_accumulation_steps=3 it must be a multiple of 3"),
        (Batch(9, 4, None, 3, 2), "micro_batch_size=3, grad_accumulation_steps=2 it must be 6 or 12 or 24"),
        (Batch(64, 8, 2, 2, 4), "grad_accumulation_steps=4 (copies of the model: 4) it must be 32"),
    ],
)  # fmt: skip
def test_what_contradicts_the_batch_is_one_line(batch, said):
    with pytest.raises(UserError) as refused:
        batch.divisions()
    assert said in str(refused.value)
