"""A mixed-integer program put together row by row, and solved by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np

INFINITY = highspy.kHighsInf


@dataclass
class MixedIntegerProgram:
    """minimise cost . v   subject to   lower <= A v <= upper,   0 <= v <= bound,   v integer where asked."""

    cost: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def variable(self, cost: float = 0.0, bound: float = 1.0, integer: bool = False) -> int:
        self.cost.append(cost)
        self.bound.append(bound)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(self, terms: list[tuple[int, float]], lower: float = -INFINITY, upper: float = INFINITY) -> None:
        """Adds lower <= sum of value * variable over `terms` <= upper. A variable may stand in several terms."""
        together: dict[int, float] = {}
        for column, value in terms:
            together[column] = together.get(column, 0.0) + value
        self.columns.extend(together)
        self.values.extend(together.values())
        self.starts.append(len(self.columns))
        self.lower.append(lower)
        self.upper.append(upper)

    def solve(self, gap: float, relaxed: bool = False) -> np.ndarray | None:
        """Values of the variables at an optimum within the relative `gap`; None where there is no solution.

        relaxed  no variable needs to be an integer: the optimum is no higher, and soon found
        """
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.cost), len(self.lower)
        model.col_cost_ = np.array(self.cost)
        model.col_lower_ = np.zeros(len(self.cost))
        model.col_upper_ = np.array(self.bound)
        model.row_lower_, model.row_upper_ = np.array(self.lower), np.array(self.upper)
        model.integrality_ = [
            highspy.HighsVarType.kInteger if integer and not relaxed else highspy.HighsVarType.kContinuous
            for integer in self.integer
        ]
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self.starts)
        model.a_matrix_.index_ = np.array(self.columns)
        model.a_matrix_.value_ = np.array(self.values)
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
        return np.array(solver.getSolution().col_value)
