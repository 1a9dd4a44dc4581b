"""The search over divisions, on meshes of one axis and of two: what fits on two alone, and what is proven on all."""

from __future__ import annotations

import pytest

from nnscaler.batch import Division
from nnscaler.errors import UserError
from nnscaler.plan import GIB
from nnscaler.planner import NothingFits
from nnscaler.report.divisions import division_rows
from tests.test_division_search import BOUNDS, World


def test_what_fits_on_two_axes_alone_is_found(monkeypatch):
    """As a bound says, or only the search does, or where nothing else has a plan."""
    full, one = NothingFits("no"), {(2, 4): 8.1}
    full.needed = 5 * GIB
    bounds = {**BOUNDS, (4, 2): full, (4, 4): UserError("dp cannot")}
    wide = {(4, 2): 7.5, (4, 4): 7.6}
    world = World(monkeypatch, bounds, one, {(4, 2): 7.7, (4, 4): 7.8}, wide=wide)
    found = world.divide()
    assert (found.tried[0].division, found.plan.step_seconds) == (Division(4, 2, 4), 7.7)
    assert world.asked[:2] == [("more", 4, 2, float("inf")), ("more", 4, 4, float("inf"))], "by bound, as all others"
    found = World(monkeypatch, BOUNDS, {**one, (4, 4): full}, {(4, 4): 7.0}).divide()
    assert (found.tried[0].division, found.plan.step_seconds) == (Division(4, 4, 2), 7.0)
    unfit = dict.fromkeys(BOUNDS, full)
    found = World(monkeypatch, {**unfit, (4, 1): 20.0}, {(4, 1): full}, {(4, 1): 21.0}).divide()
    assert (found.tried[0].division, found.plan.step_seconds) == (Division(4, 1, 8), 21.0)


@pytest.mark.parametrize(
    ("more", "wide", "seconds", "bound"),
    [
        ({}, {}, 8.0, 7.49),  # no plan on two axes takes less than 7.99 - 0.5 s
        ({(4, 4): 7.7}, {}, 7.7, 7.45),  # the plan on two axes may take 0.25 s less, that on one
        ({(4, 4): 7.92}, {}, 7.92, 7.67),
    ],
)
def test_what_is_proven_of_the_plan_that_is_taken_is_so_on_all_meshes(more, wide, seconds, bound, monkeypatch):
    found = World(monkeypatch, BOUNDS, {(4, 4): 8.0}, more, wide=wide).divide()
    assert (found.tried[0].division, found.plan.step_seconds) == (Division(4, 4, 2), seconds)
    assert found.plan.bound == pytest.approx(bound)


def test_where_time_was_out_for_two_axes_a_bound_on_them_is_still_found(monkeypatch):
    """And of what is not taken, it is said of which meshes its bound is."""
    world = World(monkeypatch, BOUNDS, {(4, 4): 8.0}, {(4, 4): 7.0}, wide={(4, 4): 6.5})
    found = world.divide(search_seconds=4.0)
    assert [kind for kind, *_ in world.asked] == ["one", "one"]
    assert (found.plan.step_seconds, found.plan.bound) == (8.0, 6.5)
    why = {(row["plan_ngpus"], row["micro_batch_size"]): row["why"] for row in division_rows(found, 32)}
    assert why[4, 1] == "at least 150.0 % slower on one mesh: time was out for others"
    assert why[1, 1] == "at least 25.0 % slower"
