"""A program in the words of its problem: variables, what they follow from, and what is charged for them.

Everything that costs time or memory is stated once, as a `Charge`: what it is for, a variable, and how much one of it
costs. The mixed-integer program takes its objective and rows from the charges, and a solution is priced by adding the
same charges up.

A variable is a `choice`, which a solution gives; a `product` of sums of choices; or the `least` number that some sums
allow. So the values of the choices give those of all others, whether a solver or somebody else has made the choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from operator import itemgetter

from nnscaler.plan import Key

Terms = list[tuple[int, float]]  # (variable, factor): a sum


class Unit(Enum):
    """What a variable or a row counts: solvers want numbers of about one, so each is scaled."""

    NUMBER = "number"
    SECONDS = "seconds"
    BYTES = "bytes"


class Account(Enum):
    """What a charge is taken from.

    TIME      seconds of a micro-batch
    FORWARD   seconds of exchange beside forward; BACKWARD likewise; LAST, beside that of a step's last micro-batch
    WEIGHTS   of TIME, the seconds in which backward makes gradients of weights
    SENT      seconds of copies to the host beside forward; FETCHED, of copies back beside backward
    DEVICE    bytes of a device's memory; HOST, of the host's, a device
    """

    TIME = "time"
    FORWARD = "beside forward"
    BACKWARD = "beside backward"
    LAST = "beside the last backward"
    WEIGHTS = "gradients of weights"
    SENT = "sent to the host"
    FETCHED = "fetched from the host"
    DEVICE = "device memory"
    HOST = "host memory"


@dataclass(frozen=True, slots=True)
class Charge:
    """`amount` for each of a variable, and what for."""

    key: Key
    variable: int
    amount: float


@dataclass(frozen=True, slots=True)
class Row:
    """lower <= sum <= upper"""

    terms: Terms
    lower: float
    upper: float
    unit: Unit


@dataclass
class Statement:
    """Variables, rows and charges, in the order in which they were stated.

    products  variable -> the two sums that it is the product of
    limits    variable -> (sum, number): it is the least that is none of the sums plus their numbers below
    """

    bounds: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    products: dict[int, tuple[Terms, Terms]] = field(default_factory=dict)
    limits: dict[int, list[tuple[Terms, float]]] = field(default_factory=dict)
    accounts: dict[Account, list[Charge]] = field(default_factory=lambda: {account: [] for account in Account})

    def choice(self, bound: float = 1.0) -> int:
        """A whole number up to `bound` that a solution gives."""
        return self._variable(bound, Unit.NUMBER, integer=True)

    def product(self, a: Terms, b: Terms, bound: float = 1.0) -> int:
        """The product of two sums of choices. Rows must make it so where the choices are whole."""
        variable = self._variable(bound, Unit.NUMBER)
        self.products[variable] = (a, b)
        return variable

    def least(self, unit: Unit = Unit.NUMBER, bound: float = inf) -> int:
        """The least number, at least 0, that is above everything that `above` says of it."""
        variable = self._variable(bound, unit)
        self.limits[variable] = []
        return variable

    def above(self, variable: int, terms: Terms, number: float = 0.0) -> None:
        """variable >= sum + number"""
        self.row([(variable, 1.0), *minus(terms)], number, unit=self.units[variable])
        self.limits[variable].append((terms, number))

    def longer(self, key: Key, beside: Terms, computing: Terms, lost: float, part: float) -> None:
        """Charges the seconds by which what runs beside makes computing longer, in a part of the micro-batches.

        lost  seconds that computing loses for each second beside it
        """
        longer = self.least(Unit.SECONDS)
        self.charge(Account.TIME, key, longer, part)
        self.above(longer, [*beside, *minus([(variable, (1 - lost) * seconds) for variable, seconds in computing])])
        if lost:
            self.above(longer, [(variable, lost * seconds) for variable, seconds in beside])

    def row(self, terms: Terms, lower: float = -inf, upper: float = inf, unit: Unit = Unit.NUMBER) -> None:
        """lower <= sum <= upper. A variable may stand in several terms."""
        self.rows.append(Row(terms, lower, upper, unit))

    def charge(self, account: Account, key: Key, variable: int, amount: float) -> None:
        if amount:
            self.accounts[account].append(Charge(key, variable, amount))

    def terms(self, *accounts: Account) -> Terms:
        """All that is charged to some accounts, as a sum."""
        return [(charge.variable, charge.amount) for account in accounts for charge in self.accounts[account]]

    def values(self, choices: Mapping[int, float]) -> list[float] | None:
        """The values of all variables where choices have those of `choices`, and 0 where not named; None where a row
        does not hold."""
        values = [0.0] * len(self.bounds)

        def total(terms: Terms) -> float:
            return sum(values[variable] * factor for variable, factor in terms)

        for variable, value in choices.items():
            values[variable] = value
        for variable, (a, b) in self.products.items():
            if first := total(a):
                values[variable] = first * total(b)
        for variable, limits in self.limits.items():
            values[variable] = max((total(terms) + number for terms, number in limits), default=0.0)
            if values[variable] < 0.0:
                values[variable] = 0.0
        for row in self.rows:
            amount = total(row.terms)
            slack = 1e-6 * max(1.0, abs(amount))
            if not row.lower - slack <= amount <= row.upper + slack:
                return None
        return values

    def prices(self, values: list[float], shares: Mapping[Account, float]) -> dict[Key, float]:
        """What is charged to some accounts, each with its share, by what it is for; in the order of the variables."""
        totals: dict[Key, float] = {}
        charges = [(one.variable, one, share) for account, share in shares.items() for one in self.accounts[account]]
        for variable, charge, share in sorted(charges, key=itemgetter(0)):
            if value := values[variable]:
                totals[charge.key] = totals.get(charge.key, 0.0) + share * charge.amount * value
        return totals

    def _variable(self, bound: float, unit: Unit, integer: bool = False) -> int:
        self.bounds.append(bound)
        self.integer.append(integer)
        self.units.append(unit)
        return len(self.bounds) - 1


def minus(terms: Terms) -> Terms:
    return [(variable, -factor) for variable, factor in terms]
