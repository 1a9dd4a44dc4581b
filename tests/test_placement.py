"""Layouts as text and as shapes."""

from __future__ import annotations

import pytest

from nnscaler.placement import (
    PARTIAL,
    REPLICATE,
    SHARED,
    Shard,
    format_placements,
    local_shape,
    parse_placement,
    shards,
)


def test_every_placement_is_read_as_it_is_written():
    for placement in (Shard(0), Shard(12), REPLICATE, SHARED, PARTIAL):
        assert parse_placement(str(placement)) == placement
    assert format_placements((Shard(3), SHARED, PARTIAL)) == "S(3),R*,P"


@pytest.mark.parametrize("text", ["S(1),R", "S(1) ", " R", "S()", "S(-1)", "S(1", "RP", ""])
def test_any_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"placement is .*; allowed are 'S\(dim\)', 'R', 'R\*' and 'P'"):
        parse_placement(text)


def test_the_shape_of_a_part():
    assert local_shape((12, 5), (Shard(0), Shard(0)), (2, 3)) == (2, 5)
    assert local_shape((12, 10), (Shard(1), SHARED), (2, 3)) == (12, 5)
    both, sizes = (Shard(0), Shard(1), Shard(0)), (2, 3, 5)
    assert local_shape((20, 6), both, sizes) == (2, 2)
    assert [shards(both, dim, sizes) for dim in range(3)] == [10, 3, 1]
    assert shards((REPLICATE, SHARED, PARTIAL), 0, sizes) == 1
