"""What is told of a search that is over."""

from __future__ import annotations

import pytest

from nnscaler.searched import Findings, Searched


def test_only_what_is_faster_than_all_before_is_a_finding():
    one = Findings(began=5.0)
    for now, step in ((6.0, 3.0), (7.0, 3.0), (8.0, 3.5), (9.0, 2.0)):
        one.add(now, step)
    assert one.found == [(1.0, 3.0), (4.0, 2.0)]


def test_what_a_looser_limit_bought():
    """Of 8 s; the last plan came a little later."""
    values = Searched(8.0, True, [(1.5, 5.0), (2.0, 4.0), (8.5, 3.0)]).to_json()
    assert values["found_within"] == [
        {"limit_seconds": limit, "step_seconds": step} for limit, step in ((1, None), (2, 4.0), (4, 4.0), (8, 3.0))
    ]


@pytest.mark.parametrize("found", [[(1.0, 5.0)], [(2.0, 5.0)]])
def test_a_search_that_was_done_says_nothing_that_depends_on_the_computer(found):
    assert Searched(8.0, False, found).to_json() == {"limit_seconds": 8.0, "stopped": False}
