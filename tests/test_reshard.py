"""Which changes bring a tensor from one layout to another, in which order."""

from __future__ import annotations

import pytest

from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard
from nnscaler.reshard import Reshard, only_gathers, reshards, without_gradient

ROWS, COLUMNS = Shard(0), Shard(1)


@pytest.mark.parametrize(
    ("source", "target", "changes"),
    [
        ((ROWS,), (ROWS,), []),
        ((ROWS, COLUMNS), (REPLICATE, COLUMNS), [(0, ROWS, REPLICATE)]),
        # Nested: what lies inside is gathered first, and divided again afterwards.
        ((ROWS, ROWS), (REPLICATE, ROWS), [(1, ROWS, REPLICATE), (0, ROWS, REPLICATE), (1, REPLICATE, ROWS)]),
        ((ROWS, ROWS), (SHARED, SHARED), [(1, ROWS, SHARED), (0, ROWS, SHARED)]),
        ((REPLICATE, ROWS), (ROWS, ROWS), [(1, ROWS, REPLICATE), (0, REPLICATE, ROWS), (1, REPLICATE, ROWS)]),
        ((ROWS, COLUMNS), (COLUMNS, ROWS), [(1, COLUMNS, REPLICATE), (0, ROWS, COLUMNS), (1, REPLICATE, ROWS)]),
        ((PARTIAL, ROWS), (SHARED, ROWS), [(0, PARTIAL, SHARED)]),
        # On three axes, the innermost is gathered first.
        (
            (ROWS, ROWS, ROWS),
            (REPLICATE, ROWS, ROWS),
            [
                (2, ROWS, REPLICATE),
                (1, ROWS, REPLICATE),
                (0, ROWS, REPLICATE),
                (1, REPLICATE, ROWS),
                (2, REPLICATE, ROWS),
            ],
        ),
    ],
)
def test_changes_run_from_the_outer_axis_to_the_inner_one(source, target, changes):
    assert reshards(source, target) == tuple(Reshard(*change) for change in changes)


def test_no_change_makes_a_term_of_a_sum():
    assert reshards((REPLICATE,), (PARTIAL,)) is None
    assert reshards((ROWS, REPLICATE), (REPLICATE, PARTIAL)) is None
    assert reshards((PARTIAL,), (PARTIAL,)) == ()


def test_what_runs_beside_computation_is_gathers_whose_gradients_are_scattered():
    def gathers(source, target, with_gradient=True) -> bool:
        return only_gathers(reshards(source, target), with_gradient)

    assert gathers((ROWS,), (SHARED,))
    assert not gathers((ROWS,), (REPLICATE,)), "whose gradient is sliced"
    assert gathers((ROWS,), (REPLICATE,), with_gradient=False)
    assert gathers((ROWS, ROWS), (SHARED, REPLICATE), with_gradient=False)
    assert gathers((ROWS, COLUMNS), (SHARED, SHARED))
    assert not gathers((ROWS, COLUMNS), (SHARED, ROWS))
    assert not gathers((ROWS,), (ROWS,)), "nothing is gathered"
    assert not gathers((SHARED,), (ROWS,))
    assert not gathers((REPLICATE,), (PARTIAL,))
    assert without_gradient((SHARED, ROWS, PARTIAL)) == (REPLICATE, ROWS, PARTIAL)
