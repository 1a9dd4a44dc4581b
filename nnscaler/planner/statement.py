"""A program, stated in the words of its problem: variables, rows that limit them, and what is charged for them.

Everything that costs time or memory is stated once, as a `Charge`: what it is for, a variable, and what one of that
variable costs. The mixed-integer program takes its objective and its memory limits from the charges. A solution is
priced by adding up the same charges. So the two cannot differ.

There are three kinds of variable. A `choice` is given by a solution. A `product` is the product of two sums of choices.
A `least` variable is the least number that is not below some sums. So the values of the choices give those of all
others, whether a solver or a test has made the choices.

    statement = Statement()
    a, b = statement.choice(), statement.choice()
    statement.row([(a, 1.0), (b, 1.0)], lower=1.0, upper=1.0)                     # one of the two
    statement.charge(Account.TIME, Key("forward", "layer", "linear"), a, 0.02)    # a takes 20 ms
    statement.charge(Account.DEVICE, Key("saved", "layer", "linear"), b, 2**20)   # b takes a MiB
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from operator import itemgetter

import numpy as np

from nnscaler.plan import Key

SLACK = 1e-5  # by which a solver may miss a row, as a part of the row's terms

Term = tuple[int, float]  # (variable, factor)
Terms = list[Term]  # the sum of variable * factor


class Quantity(Enum):
    """What a variable or a row measures. A solver works best with numbers near one, so each is scaled."""

    NUMBER = "number"
    SECONDS = "seconds"
    BYTES = "bytes"


class Account(Enum):
    """What a charge is for: time or memory, and where.

    TIME      seconds of a micro-batch
    FORWARD   seconds of exchange that runs beside forward
    BACKWARD  seconds of exchange that runs beside backward
    LAST      seconds of exchange that runs beside the backward of a step's last micro-batch only
    SENT      seconds of copies that run beside forward: to the host; of the optimizer's state, there and back at once;
              of gradients for the update
    FETCHED   seconds of copies that run beside backward: back from the host; of gradients, there and back at once
    DEVICE    bytes of a device's memory
    HOST      bytes of the host's memory, for each device
    """

    TIME = "time"
    FORWARD = "beside forward"
    BACKWARD = "beside backward"
    LAST = "beside the last backward"
    SENT = "sent to the host"
    FETCHED = "fetched from the host"
    DEVICE = "device memory"
    HOST = "host memory"


@dataclass(frozen=True, slots=True)
class Charge:
    """One unit of `variable` costs `amount`; `key` says what for."""

    key: Key
    variable: int
    amount: float


@dataclass(frozen=True, slots=True)
class Row:
    """lower <= sum of the terms <= upper. `quantity`: what the sum measures."""

    terms: Terms
    lower: float
    upper: float
    quantity: Quantity


@dataclass
class Statement:
    """Variables, rows and charges, in the order in which they were stated. A variable is its index.

    bounds, integer, quantities  of each variable: its largest value, whether it is a whole number, what it measures
    products  variable -> the two sums that it is the product of
    limits    variable -> [(sum, number)]: it is the least value >= 0 that is >= sum + number for each of these
    """

    bounds: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    quantities: list[Quantity] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    products: dict[int, tuple[Terms, Terms]] = field(default_factory=dict)
    limits: dict[int, list[tuple[Terms, float]]] = field(default_factory=dict)
    accounts: dict[Account, list[Charge]] = field(default_factory=lambda: {account: [] for account in Account})
    _stated: _Rows | None = field(default=None, repr=False, compare=False)

    def choice(self, bound: float = 1.0) -> int:
        """Makes a variable that a solution gives: a whole number from 0 to `bound`."""
        return self._variable(bound, Quantity.NUMBER, integer=True)

    def product(self, a: Terms, b: Terms, bound: float = 1.0) -> int:
        """Makes a variable for the product of two sums of choices. The caller's rows must force it to be that."""
        variable = self._variable(bound, Quantity.NUMBER)
        self.products[variable] = (a, b)
        return variable

    def least(self, quantity: Quantity = Quantity.NUMBER, bound: float = inf) -> int:
        """Makes a variable for the least number >= 0 that satisfies everything that `above` states of it."""
        variable = self._variable(bound, quantity)
        self.limits[variable] = []
        return variable

    def above(self, variable: int, terms: Terms, number: float = 0.0) -> None:
        """variable >= sum + number"""
        self.row([(variable, 1.0), *minus(terms)], number, quantity=self.quantities[variable])
        self.limits[variable].append((terms, number))

    def longer(
        self, key: Key, beside: Terms, computing: Terms, lost: float, part: float, before: Sequence[Term] = ()
    ) -> int:
        """Charges the seconds by which what runs beside computation makes the computation longer.

        beside     seconds of what runs beside, as a sum
        computing  seconds of the computation, as a sum
        lost       seconds that computation loses for each second of what runs beside it, 0 to 1
        part       of the micro-batches in which this happens, 0 to 1
        before     seconds of what the computation hides first, and what that costs is charged elsewhere, as a sum

        With `lost` = 0 that is max(0, beside - computing): what the computation does not hide.

        Returns the variable.
        """
        longer = self.least(Quantity.SECONDS)
        self.charge(Account.TIME, key, longer, part)
        hiding = [(variable, (1 - lost) * seconds) for variable, seconds in computing]
        self.above(longer, [*beside, *before, *minus(hiding)])
        if lost:
            self.above(longer, [(variable, lost * seconds) for variable, seconds in beside])
        return longer

    def row(self, terms: Terms, lower: float = -inf, upper: float = inf, quantity: Quantity = Quantity.NUMBER) -> None:
        """States lower <= sum <= upper. A variable may occur in several terms."""
        self.rows.append(Row(terms, lower, upper, quantity))

    def charge(self, account: Account, key: Key, variable: int, amount: float) -> None:
        """States that one of `variable` costs `amount` (seconds or bytes) of an account, for `key`."""
        if amount:
            self.accounts[account].append(Charge(key, variable, amount))

    def scaled(self, factor: float, categories: Collection[str]) -> Statement:
        """A copy in which charges of some categories are so many times as high."""
        accounts = {
            account: [
                replace(one, amount=one.amount * factor) if one.key.category in categories else one for one in charges
            ]
            for account, charges in self.accounts.items()
        }
        variables = [*self.bounds], [*self.integer], [*self.quantities]
        return Statement(*variables, [*self.rows], {**self.products}, {**self.limits}, accounts)

    def terms(self, *accounts: Account) -> Terms:
        """All that is charged to some accounts, as one sum."""
        return [(charge.variable, charge.amount) for account in accounts for charge in self.accounts[account]]

    def values(self, choices: Mapping[int, float]) -> list[float] | None:
        """The values of all variables, given those of the choices (0 where not named). None where a row does not
        hold."""
        values = [0.0] * len(self.bounds)

        def total(terms: Terms) -> float:
            amount = 0.0
            for variable, factor in terms:  # most have one or two, for which `sum` takes twice as long
                amount += values[variable] * factor
            return amount

        for variable, value in choices.items():
            values[variable] = value
        for variable, (a, b) in self.products.items():
            if first := total(a):
                values[variable] = first * total(b)
        for variable, limits in self.limits.items():
            values[variable] = max([0.0, *[total(terms) + number for terms, number in limits]])
        return values if self._all_rows().hold(values) else None

    def prices(self, values: list[float], shares: Mapping[Account, float]) -> dict[Key, float]:
        """The total of some accounts, by what it is for, in the order of the variables.

        values  of all variables
        shares  account -> the factor with which its charges count
        """
        totals: dict[Key, float] = {}
        charges = [
            (one.variable, one, share * value)
            for account, share in shares.items()
            for one in self.accounts[account]
            if (value := values[one.variable])
        ]
        for _, charge, factor in sorted(charges, key=itemgetter(0)):
            totals[charge.key] = totals.get(charge.key, 0.0) + charge.amount * factor
        return totals

    def _all_rows(self) -> _Rows:
        if self._stated is None or len(self._stated.lower) < len(self.rows):
            self._stated = _Rows.of(self.rows)
        return self._stated

    def _variable(self, bound: float, quantity: Quantity, integer: bool = False) -> int:
        self.bounds.append(bound)
        self.integer.append(integer)
        self.quantities.append(quantity)
        return len(self.bounds) - 1


@dataclass(frozen=True)
class _Rows:
    """Rows as arrays, for many solutions to be compared with: of each term its row, its variable and its factor."""

    row: np.ndarray
    variable: np.ndarray
    factor: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Rows:
        index = np.repeat(np.arange(len(rows)), [len(row.terms) for row in rows])
        variable = np.fromiter((variable for row in rows for variable, _ in row.terms), int, len(index))
        factor = np.fromiter((factor for row in rows for _, factor in row.terms), float, len(index))
        lower, upper = np.array([one.lower for one in rows]), np.array([one.upper for one in rows])
        return cls(index, variable, factor, lower, upper)

    def hold(self, values: Sequence[float]) -> bool:
        """Whether all do, as nearly as a solver may miss them."""
        parts = np.array(values)[self.variable] * self.factor
        amounts, sizes = (np.bincount(self.row, some, len(self.lower)) for some in (parts, np.abs(parts)))
        slack = SLACK * sizes
        return bool(((self.lower - slack <= amounts) & (amounts <= self.upper + slack)).all())


def minus(terms: Terms) -> Terms:
    """The sum with all factors negated."""
    return [(variable, -factor) for variable, factor in terms]
