"""The choices of a plan as variables, with what each costs by itself: a part of the planning problem's program.

The rows (choice), (levels), (groups) and (some) of `nnscaler.planner.program` stand here.
"""

from __future__ import annotations

from collections.abc import Mapping

from nnscaler.plan import Key
from nnscaler.planner.problem import Decision, Problem
from nnscaler.planner.statement import Account, Statement
from nnscaler.recompute import Level


class Choices:
    """States the choices of a problem. Other parts of the program add to the same statement.

    x  x[d][o]: the variable of option o of decision d
    n  n[b][l]: the variable of how many calls of block b have level l; without blocks that have only one level
    m  m[b][l]: the variable of how many groups of calls have level l; without levels of single calls
    u  u[b, l]: the variable of whether any call has level l, for levels of which `used` was asked
    z  z[d, l][o]: the variable of how many calls have level l and, for decision d, option o
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.statement = problem, Statement()
        self.x: list[list[int]] = []
        self.n: dict[str, dict[Level, int]] = {}
        self.m: dict[tuple[str, Level], int] = {}
        self.u: dict[tuple[str, Level], int] = {}
        self.z: dict[tuple[int, Level], list[int]] = {}
        for block, levels in problem.levels.items():
            if len(levels) > 1:
                self._levels(block)
        for decision in problem.decisions:
            self._decision(decision)

    def used(self, block: str, level: Level) -> int:
        """The variable u_bl; it is made, with its row, when it is first asked for."""
        if (block, level) not in self.u:
            self.u[block, level] = self.statement.choice()
            most = -float(self.problem.calls[block])
            self.statement.row([(self.n[block][level], 1.0), (self.u[block, level], most)], upper=0.0)
        return self.u[block, level]

    def values(self, levels: Mapping[str, Mapping[Level, int]]) -> dict[int, float]:
        """The values of n, m and u, for block -> recompute level -> how many of its calls have it."""
        values = {
            n: float(levels[block].get(level, 0)) for block, counts in self.n.items() for level, n in counts.items()
        }
        values |= {m: float(levels[block].get(level, 0) // level.size) for (block, level), m in self.m.items()}
        return values | {u: float(levels[block].get(level, 0) > 0) for (block, level), u in self.u.items()}

    def _levels(self, block: str) -> None:
        """The rows (levels) and (groups) of a block."""
        calls = self.problem.calls[block]
        self.n[block] = {level: self.statement.choice(float(calls)) for level in self.problem.levels[block]}
        self.statement.row([(n, 1.0) for n in self.n[block].values()], calls, calls)
        for level in (level for level in self.n[block] if level.size > 1):
            self.m[block, level] = self.statement.choice(float(calls // level.size))
            self.statement.row([(self.n[block][level], 1.0), (self.m[block, level], -float(level.size))], 0.0, 0.0)

    def _decision(self, decision: Decision) -> None:
        """The row (choice) of a decision, its rows (levels), and charges for its time and memory."""
        index = len(self.x)
        self.x.append([self.statement.choice() for _ in decision.options])
        self.statement.row([(x, 1.0) for x in self.x[index]], 1.0, 1.0)
        if decision.kind == "parameter":
            self._parameter(decision, self.x[index])
            return
        by_level = self._by_level(index, decision)
        place = (decision.block, decision.name)
        for option, (settings, x) in enumerate(zip(decision.options, self.x[index])):
            forward, backward = settings.seconds.forward, settings.seconds.backward
            self.statement.charge(Account.TIME, Key("forward", *place), x, decision.count * forward)
            self.statement.charge(Account.TIME, Key("backward", *place), x, decision.count * backward)
            for level in self.problem.levels[decision.block]:
                # Calls at a level are counted by z; where there is one level, all are, by x.
                calls, each = (by_level[level][option], 1) if by_level else (x, decision.count)
                again = decision.runs_again.get(level, 0.0)
                self.statement.charge(Account.TIME, Key("again", *place, level.name), calls, each * again * forward)
                if level in decision.inner_kept_at:
                    held = each * self.problem.in_flight * settings.inner_bytes
                    where = Account.HOST if level.on_host else Account.DEVICE
                    self.statement.charge(where, Key("inside", *place, level.name), calls, held)

    def _parameter(self, decision: Decision, xs: list[int]) -> None:
        """Charges for a parameter: its update, its memory, and the seconds of its exchange, which `_hide` uses."""
        place = (decision.block, decision.name)
        for option, x in zip(decision.options, xs):
            self.statement.charge(Account.TIME, Key("update", *place), x, decision.count * option.seconds.forward)
            self.statement.charge(
                Account.BACKWARD, Key("exchange", *place), x, decision.count * option.seconds.backward
            )
            self.statement.charge(Account.LAST, Key("exchange", *place), x, decision.count * option.last_exchange)
            for what, size in option.memory.items():
                self.statement.charge(Account.DEVICE, Key("parameter", *place, what), x, decision.count * size)

    def _by_level(self, index: int, decision: Decision) -> dict[Level, list[int]]:
        """Level -> the variables z of a decision. Empty where its block has only one level."""
        if decision.block not in self.n:
            return {}
        calls = float(self.problem.calls[decision.block])
        for level, n in self.n[decision.block].items():
            self.z[index, level] = [self.statement.product([(n, 1.0)], [(x, 1.0)], calls) for x in self.x[index]]
            self.statement.row([*((z, 1.0) for z in self.z[index, level]), (n, -1.0)], 0.0, 0.0)
        by_level = {level: self.z[index, level] for level in self.n[decision.block]}
        for option, x in enumerate(self.x[index]):
            self.statement.row([*((zs[option], 1.0) for zs in by_level.values()), (x, -calls)], 0.0, 0.0)
        return by_level
