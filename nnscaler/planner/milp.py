"""A mixed-integer program, made of one statement or several, and solved by HiGHS (https://highs.dev)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import highspy
import numpy as np

from nnscaler.planner.statement import Quantity, Statement, Terms


@dataclass
class MixedIntegerProgram:
    """minimise cost . v   subject to   lower <= A v <= upper,   0 <= v <= bound,   v integer where asked.

    scale  how many seconds, and how many bytes, count as one: the tolerances of HiGHS are absolute
    units  of each variable, what counts as one of it
    """

    scale: Mapping[Quantity, float]
    cost: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    objective: Quantity = Quantity.NUMBER  # what is minimised

    def add(self, statement: Statement) -> int:
        """Adds the variables and rows of a statement.

        Returns how many variables there were before. Variable i of the statement is variable i plus this number here.
        """
        shift = len(self.cost)
        self.cost += [0.0] * len(statement.bounds)
        self.bound += statement.bounds
        self.integer += statement.integer
        self.units += [self.scale[quantity] for quantity in statement.quantities]
        for row in statement.rows:
            self.row(row.terms, row.lower, row.upper, row.quantity, shift)
        return shift

    def row(
        self,
        terms: Terms,
        lower: float = -inf,
        upper: float = inf,
        quantity: Quantity = Quantity.NUMBER,
        shift: int = 0,
    ) -> None:
        """Adds lower <= sum <= upper. A variable may occur in several terms. `shift`: what `add` returned, where the
        variables are a statement's."""
        together, one = self._scaled(terms, quantity, shift), self.scale[quantity]
        self.columns.extend(together)
        self.factors.extend(together.values())
        self.starts.append(len(self.columns))
        self.lower.append(lower / one)
        self.upper.append(upper / one)

    def minimise(self, terms: Terms, quantity: Quantity) -> None:
        """Makes this sum the objective."""
        self.objective = quantity
        self.cost = [0.0] * len(self.cost)
        for variable, factor in self._scaled(terms, quantity).items():
            self.cost[variable] = factor

    def _scaled(self, terms: Terms, quantity: Quantity, shift: int = 0) -> dict[int, float]:
        """Variable -> its factor, in a sum that measures `quantity`."""
        together: dict[int, float] = {}
        one, units = self.scale[quantity], self.units
        for variable, factor in terms:
            index = variable + shift
            unit = units[index]
            scaled = factor if unit == one else factor * unit / one
            together[index] = together[index] + scaled if index in together else scaled
        return together

    def solve(
        self,
        gap: float,
        relaxed: bool = False,
        seconds: float = inf,
        heuristics: bool = True,
        watch: Callable[[float, float], bool | None] | None = None,
    ) -> Answer | None:
        """An optimum within the relative `gap`, or the best that was found in `seconds`; None where there is no
        solution.

        seconds     of processor time, so that the result does not depend on what else the machine does
        relaxed     no variable needs to be a whole number. The optimum is then no higher, and soon found.
        heuristics  whether to look for good solutions before the search proper. Where few are expected, that takes
                    long; it is rather seen first whether there are any with variables that are no whole numbers.
        watch       called during the search with (objective of the best solution so far, or inf; its lower bound);
                    the search ends where it returns True
        """
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.cost), len(self.lower)
        model.col_cost_ = _rounded(self.cost)
        model.col_lower_ = np.zeros(len(self.cost))
        model.col_upper_ = _rounded(self.bound)
        model.row_lower_, model.row_upper_ = _rounded(self.lower), _rounded(self.upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self.starts)
        model.a_matrix_.index_ = np.array(self.columns)
        model.a_matrix_.value_ = _rounded(self.factors)
        solver = highspy.Highs()
        # One thread and a fixed seed: the same inputs give the same plan on every machine.
        options = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": gap}
        if not heuristics:
            options |= dict.fromkeys(
                ("mip_heuristic_run_rins", "mip_heuristic_run_rens", "mip_heuristic_run_root_reduced_cost"), False
            )
        if seconds < inf:
            # Inside its first relaxation it does not call `hear`. This limit is of the clock's time, of which a process
            # takes more where others compute beside it.
            options["time_limit"] = 2 * seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        for option, value in options.items():
            solver.setOptionValue(option, value)
        one, until = self.scale[self.objective], time.process_time() + seconds

        def hear(event: Any) -> None:
            best, bound = event.data_out.mip_primal_bound * one, event.data_out.mip_dual_bound * one
            enough = watch is not None and watch(best, bound)
            event.data_in.user_interrupt = enough or time.process_time() > until

        solver.cbMipInterrupt.subscribe(hear)

        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)

        def run(in_parts: bool, presolve: str) -> bool:
            """Leaves in the solver what it finds. Returns whether there may be a solution."""
            model.integrality_ = [kinds[integer and not in_parts] for integer in self.integer]
            solver.setOptionValue("presolve", presolve)
            solver.passModel(model)
            solver.run()
            return bool(solver.getModelStatus() != highspy.HighsModelStatus.kInfeasible)

        # Whether there is one where choices may be made in parts is soon known, and sooner without presolve.
        looked, denied = relaxed or not heuristics, False
        if (not looked or run(True, "off")) and not relaxed:
            # HiGHS's presolve (1.15) denies that some programs have solutions.
            denied = not run(False, "choose")
            if denied and (looked or run(True, "off")):
                run(False, "off")
        # What the last run has left.
        status, found = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        stopped = status in (highspy.HighsModelStatus.kInterrupt, highspy.HighsModelStatus.kTimeLimit)
        optimal = status == highspy.HighsModelStatus.kOptimal
        assert optimal or stopped, f"HiGHS ended with {solver.modelStatusToString(status)}"
        feasible = found.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        values = np.array(solver.getSolution().col_value) if optimal or feasible else None
        if denied and values is None:  # time was out before it was said again
            return None
        if values is not None:
            values = values * self.units
        whole = any(self.integer) and not relaxed
        bound = found.mip_dual_bound if whole else found.objective_function_value if optimal else 0.0
        return Answer(values, max(bound, 0.0) * one, stopped)


@dataclass(frozen=True)
class Answer:
    """What the solver found.

    values   of the variables; None where it was stopped before it found any
    bound    no solution has an objective below this
    stopped  whether it ended before the gap was reached
    """

    values: np.ndarray | None
    bound: float
    stopped: bool


def _rounded(numbers: list[float]) -> np.ndarray:
    """The numbers with nine digits, so that the plan does not depend on the order in which costs were added up."""
    mantissas, exponents = np.frexp(numbers)
    return np.ldexp(np.round(mantissas * 2**30) / 2**30, exponents)
