"""A statement gives the values that follow from choices, refuses those that rows forbid, and prices the rest."""

from __future__ import annotations

from math import inf

import pytest

from nnscaler.plan import Key
from nnscaler.planner.statement import Account, Quantity, Statement


def test_values_and_prices_follow_from_choices():
    statement = Statement()
    a, b = statement.choice(3), statement.choice(3)
    product = statement.product([(a, 2.0)], [(b, 1.0), (a, 1.0)], bound=100.0)
    least = statement.least(Quantity.SECONDS)
    statement.above(least, [(product, 1.0)], -20.0)
    statement.above(least, [(b, 0.5)])
    statement.row([(a, 1.0), (b, 1.0)], lower=2.0, upper=5.0)
    assert (statement.integer, statement.bounds) == ([True, True, False, False], [3, 3, 100, inf])
    assert statement.quantities == [Quantity.NUMBER] * 3 + [Quantity.SECONDS]
    assert statement.values({a: 2.0, b: 3.0}) == [2.0, 3.0, 20.0, 1.5]
    assert statement.values({a: 3.0, b: 2.0}) == [3.0, 2.0, 30.0, 10.0]
    assert statement.values({a: 3.0, b: 3.0}) is None, "above the row's upper bound"
    assert statement.values({a: 1.0}) is None, "below its lower one: b is 0"
    key, other = Key("forward", "block", "one"), Key("forward", "block", "other")
    for variable, amount, what in ((a, 2.0, key), (least, 1.0, key), (b, 5.0, other), (b, 0.0, key)):
        statement.charge(Account.TIME, what, variable, amount)
    statement.charge(Account.LAST, key, product, 1.0)
    values = statement.values({a: 2.0, b: 3.0})
    assert values is not None
    shares = {Account.TIME: 1.0, Account.LAST: 0.25}
    assert statement.prices(values, shares) == pytest.approx({key: 2 * 2 + 1.5 + 20 / 4, other: 15.0})
    assert len(statement.terms(Account.TIME)) == 3, "what costs nothing is no charge"


@pytest.mark.parametrize(("size", "allowed"), [(6e4, True), (2e6, False)])
@pytest.mark.parametrize(("sign", "upper"), [(1.0, 1.2e10), (-1.0, 0.0)])
def test_a_row_may_be_missed_by_what_a_solver_cannot_tell_from_its_terms(size, allowed, sign, upper):
    """Of 12 GB in 64 parts, 60 kB are nothing, whether a sum is as large, or two large terms leave nothing."""
    statement = Statement()
    parts, small, large = statement.choice(64), statement.choice(), statement.choice()
    statement.row([(parts, 1.2e10 / 64), (small, size), (large, min(sign, 0.0) * 1.2e10)], upper=upper)
    chosen = {parts: 64.0, small: 1.0, large: 1.0}
    assert (statement.values(chosen) is not None) == allowed
    assert statement.values({**chosen, small: 0.0}) is not None
    assert statement.values({**chosen, parts: 63.0}) is not None


def test_what_runs_beside_makes_longer_what_it_is_not_hidden_by():
    """Of 6 s beside 10 s, which lose a tenth of what runs beside them; then of 12 s, and with 3 s hidden before."""
    for beside, before, lost, longer in (
        (6.0, 0.0, 0.1, 0.6), (12.0, 0.0, 0.1, 12 - 9.0), (12.0, 3.0, 0.1, 12 + 3 - 9.0), (6.0, 0.0, 0.0, 0.0),
        (12.0, 0.0, 0.0, 2.0), (6.0, 5.0, 0.0, 1.0), (0.0, 0.0, 0.1, 0.0),
    ):  # fmt: skip
        statement = Statement()
        runs, computes, hidden = (statement.choice() for _ in range(3))
        key = Key("copies", "", "update")
        variable = statement.longer(key, [(runs, beside)], [(computes, 10.0)], lost, 0.25, [(hidden, before)])
        values = statement.values({runs: 1.0, computes: 1.0, hidden: 1.0})
        assert values is not None
        assert values[variable] == pytest.approx(longer)
        found = statement.prices(values, {Account.TIME: 1.0})
        assert found == ({key: pytest.approx(longer / 4)} if longer else {}), "in a quarter of the micro-batches"
