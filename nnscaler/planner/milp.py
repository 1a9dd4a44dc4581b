"""A mixed-integer program of one statement or of several, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import highspy
import numpy as np

from nnscaler.planner.statement import Statement, Terms, Unit


@dataclass
class MixedIntegerProgram:
    """minimise cost . v   subject to   lower <= A v <= upper,   0 <= v <= bound,   v integer where asked.

    scale  what counts as one second and one byte: HiGHS's tolerances are absolute
    """

    scale: Mapping[Unit, float]
    cost: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def add(self, statement: Statement) -> int:
        """Adds the variables and rows of a statement. Returns how many variables were there before: by so much the
        statement's are shifted."""
        shift = len(self.cost)
        self.cost += [0.0] * len(statement.bounds)
        self.bound += statement.bounds
        self.integer += statement.integer
        self.units += statement.units
        for row in statement.rows:
            self.row([(variable + shift, factor) for variable, factor in row.terms], row.lower, row.upper, row.unit)
        return shift

    def row(self, terms: Terms, lower: float = -inf, upper: float = inf, unit: Unit = Unit.NUMBER) -> None:
        """Adds lower <= sum <= upper. A variable may stand in several terms."""
        together = self._scaled(terms, unit)
        self.columns.extend(together)
        self.factors.extend(together.values())
        self.starts.append(len(self.columns))
        self.lower.append(lower / self.scale[unit])
        self.upper.append(upper / self.scale[unit])

    def minimise(self, terms: Terms, unit: Unit) -> None:
        """Makes a sum what is minimised."""
        self.cost = [0.0] * len(self.cost)
        for variable, factor in self._scaled(terms, unit).items():
            self.cost[variable] = factor

    def _scaled(self, terms: Terms, unit: Unit) -> dict[int, float]:
        """Variable -> its factor in a sum that counts `unit`."""
        together: dict[int, float] = {}
        one = self.scale[unit]
        for variable, factor in terms:
            own = self.units[variable]
            scaled = factor if own is unit else factor * self.scale[own] / one
            together[variable] = together.get(variable, 0.0) + scaled
        return together

    def solve(self, gap: float, relaxed: bool = False) -> np.ndarray | None:
        """Values of the variables at an optimum within the relative `gap`; None where there is no solution.

        relaxed  no variable needs to be an integer: the optimum is no higher, and soon found
        """
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.cost), len(self.lower)
        model.col_cost_ = _rounded(self.cost)
        model.col_lower_ = np.zeros(len(self.cost))
        model.col_upper_ = _rounded(self.bound)
        model.row_lower_, model.row_upper_ = _rounded(self.lower), _rounded(self.upper)
        model.integrality_ = [
            highspy.HighsVarType.kInteger if integer and not relaxed else highspy.HighsVarType.kContinuous
            for integer in self.integer
        ]
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self.starts)
        model.a_matrix_.index_ = np.array(self.columns)
        model.a_matrix_.value_ = _rounded(self.factors)
        solver = highspy.Highs()
        # One thread and a fixed seed: the same inputs give the same plan on every machine.
        for option, value in (("output_flag", False), ("threads", 1), ("random_seed", 0), ("mip_rel_gap", gap)):
            solver.setOptionValue(option, value)
        solver.passModel(model)
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        assert status == highspy.HighsModelStatus.kOptimal, f"HiGHS ended with {solver.modelStatusToString(status)}"
        return np.array(solver.getSolution().col_value) * [self.scale[unit] for unit in self.units]


def _rounded(numbers: list[float]) -> np.ndarray:
    """With nine digits: the plan shall not hang on the order in which costs were added up."""
    mantissas, exponents = np.frexp(numbers)
    return np.ldexp(np.round(mantissas * 2**30) / 2**30, exponents)
