"""Mixed-integer programs whose optimum is found by hand, in the units that they are stated in."""

from __future__ import annotations

import math
import random

import highspy
import pytest

from nnscaler.planner import milp
from nnscaler.planner.milp import MixedIntegerProgram, _rounded
from nnscaler.planner.statement import Quantity, Statement

MILLISECOND, GIGABYTE = 1e-3, 1e9
SCALE = {Quantity.NUMBER: 1.0, Quantity.SECONDS: MILLISECOND, Quantity.BYTES: GIGABYTE}
COSTS, SIZES = (5.0, 4.0, 3.0), (6.0, 5.0, 4.0)  # in milliseconds and gigabytes


def cover(size: float) -> tuple[Statement, list[int]]:
    """Some of three things, which have `size` gigabytes together at least."""
    statement = Statement()
    things = [statement.choice() for _ in SIZES]
    terms = [(thing, each * GIGABYTE) for thing, each in zip(things, SIZES)]
    statement.row(terms, lower=size * GIGABYTE, quantity=Quantity.BYTES)
    return statement, things


@pytest.mark.parametrize(("size", "chosen", "least", "in_parts"), [
    (10.0, [1, 0, 1], 8.0, 3 + 4 + 5 / 6), (9.0, [0, 1, 1], 7.0, 7.0), (4.0, [0, 0, 1], 3.0, 3.0),
    (5.0, [0, 1, 0], 4.0, 3 + 4 / 5), (0.0, [0, 0, 0], 0.0, 0.0), (15.0, [1, 1, 1], 12.0, 12.0),
])  # fmt: skip
def test_the_cheapest_cover(size, chosen, least, in_parts):
    statement, things = cover(size)
    program = MixedIntegerProgram(SCALE)
    assert program.add(statement) == 0
    program.minimise([(thing, cost * MILLISECOND) for thing, cost in zip(things, COSTS)], Quantity.SECONDS)
    found = program.solve(0.0)
    assert found is not None
    assert found.values is not None
    assert [round(value) for value in found.values] == chosen
    assert (found.bound, found.stopped) == (pytest.approx(least * MILLISECOND), False)
    parts = program.solve(0.0, relaxed=True)
    assert parts is not None
    assert parts.bound == pytest.approx(in_parts * MILLISECOND)


def test_a_solution_that_is_good_enough_proves_no_more_than_is_true():
    """Of 16 things, half of all bytes; a thing costs its size and 100. The least cost is that of some set of them."""
    draws = random.Random(1)
    sizes = [draws.randint(100, 999) for _ in range(16)]
    statement = Statement()
    terms = [(statement.choice(), float(size)) for size in sizes]
    statement.row(
        [(thing, size * GIGABYTE) for thing, size in terms], sum(sizes) // 2 * GIGABYTE, math.inf, Quantity.BYTES
    )
    program = MixedIntegerProgram(SCALE)
    program.add(statement)
    program.minimise([(thing, (size + 100) * MILLISECOND) for thing, size in terms], Quantity.SECONDS)
    ended = program.solve(gap=0.0, watch=lambda best, bound: best < math.inf)
    assert ended is not None
    assert ended.stopped
    assert ended.values is not None, "the first that it found"
    assert ended.bound / MILLISECOND < 0.9999 * sum((size + 100) * round(v) for size, v in zip(sizes, ended.values))
    found = program.solve(gap=0.3, heuristics=False)
    assert found is not None
    assert found.values is not None
    cost = sum((size + 100) * round(value) for size, value in zip(sizes, found.values))
    cheapest = {0: 0}  # bytes -> the least cost of things that have so many together
    for size in sizes:
        for held, least in list(cheapest.items()):
            cheapest[held + size] = min(least + size + 100, cheapest.get(held + size, 10**9))
    best = min(least for held, least in cheapest.items() if held >= sum(sizes) // 2)
    assert best < cost, "else nothing is tested here"
    assert 0.7 * cost <= found.bound / MILLISECOND <= best
    assert not found.stopped


def test_several_statements_share_a_row():
    """Each has to cover something, and both have room for two things together."""
    program, every = MixedIntegerProgram(SCALE), []
    for size in (9.0, 4.0):
        statement, things = cover(size)
        shift = program.add(statement)
        every.append([thing + shift for thing in things])
    assert every == [[0, 1, 2], [3, 4, 5]]
    costs = [(thing, cost * MILLISECOND) for things in every for thing, cost in zip(things, COSTS)]
    program.minimise(costs, Quantity.SECONDS)
    program.row([(thing, 1.0) for things in every for thing in things], lower=2.0, upper=2.0)
    assert program.solve(0.0) is None, "two of the first alone take all room"
    program.upper[-1] = 3.0
    found = program.solve(0.0)
    assert found is not None
    assert found.bound == pytest.approx((7.0 + 3.0) * MILLISECOND)
    program.minimise([(every[1][0], MILLISECOND)], Quantity.SECONDS)
    again = program.solve(0.0)
    assert again is not None
    assert again.bound == 0.0, "what was to be least before no longer counts"


def test_values_are_in_bytes_and_terms_of_a_variable_add_up():
    statement = Statement()
    calls = statement.choice(5.0)
    held = statement.least(Quantity.BYTES)
    statement.above(held, [(calls, 2 * GIGABYTE)], GIGABYTE)
    statement.row([(calls, 1.0), (calls, 1.0)], lower=5.0, upper=8.0)
    program = MixedIntegerProgram(SCALE)
    program.add(statement)
    for factor, number in ((1.0, 3), (-1.0, 4)):
        program.minimise([(held, 1.0), (calls, (1.0 - factor) * -3 * GIGABYTE)], Quantity.BYTES)
        found = program.solve(0.0)
        assert found is not None
        assert found.values is not None
        assert found.values.tolist() == pytest.approx([number, (2 * number + 1) * GIGABYTE])
    program.minimise([(held, MILLISECOND / GIGABYTE)], Quantity.SECONDS)
    found = program.solve(0.0)
    assert found is not None
    assert found.bound == pytest.approx(7 * MILLISECOND), "a gigabyte takes a millisecond"
    for most, fits in ((7.0, True), (6.0, False)):
        program.row([(held, 1.0)], upper=most * GIGABYTE, quantity=Quantity.BYTES)
        assert (program.solve(0.0) is not None) == fits


@pytest.mark.parametrize(("most", "heuristics", "presolve"), [
    (7.5, False, ["off"]), (7.9, False, ["off", "choose", "off"]), (8.1, False, ["off", "choose"]),
    (7.5, True, ["choose", "off"]), (7.9, True, ["choose", "off", "off"]), (8.1, True, ["choose"]),
])  # fmt: skip
def test_where_few_solutions_are_expected_those_in_parts_are_looked_for_first(monkeypatch, most, heuristics, presolve):
    """Which cost 7.83 at least, and whole ones cost 8."""
    runs = []

    class Highs(highspy.Highs):
        def run(self):
            runs.append(self.getOptionValue("presolve")[1])
            return super().run()

    monkeypatch.setattr(milp.highspy, "Highs", Highs)
    program = MixedIntegerProgram(SCALE)
    statement, things = cover(10.0)
    program.add(statement)
    costs = [(thing, cost * MILLISECOND) for thing, cost in zip(things, COSTS)]
    program.minimise(costs, Quantity.SECONDS)
    program.row(costs, upper=most * MILLISECOND, quantity=Quantity.SECONDS)
    found = program.solve(0.0, heuristics=heuristics)
    assert (found and found.bound) == (None if most < 8 else pytest.approx(8 * MILLISECOND))
    assert runs == presolve


def test_numbers_that_differ_in_their_last_digits_are_one():
    numbers = [0.1 + 0.2, 0.3, 1e12 + 1, 1e12, 1.0, 1 + 1e-8, -0.5, 0.0]
    found = _rounded(numbers).tolist()
    assert found == pytest.approx(numbers, rel=1e-9)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[4] != found[5]


@pytest.mark.parametrize(("seconds", "load", "limit"), [
    (3.0, 0.5, 6.0), (3.0, 4.0, 6.0), (3.0, 12.0, 18.0), (math.inf, 12.0, None),
])  # fmt: skip
def test_the_clock_has_more_time_where_others_compute_too(monkeypatch, seconds, load, limit):
    given = {}

    class Highs(highspy.Highs):
        def setOptionValue(self, option, value):  # noqa: N802
            given[option] = value
            return super().setOptionValue(option, value)

    monkeypatch.setattr(milp.highspy, "Highs", Highs)
    monkeypatch.setattr(milp.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(milp.os, "cpu_count", lambda: 4)
    program = MixedIntegerProgram(SCALE)
    program.add(cover(9.0)[0])
    program.minimise([(0, MILLISECOND)], Quantity.SECONDS)
    assert program.solve(0.0, seconds=seconds) is not None
    assert given.get("time_limit") == limit
