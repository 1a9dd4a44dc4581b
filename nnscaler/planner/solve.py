"""Solving programs: the fastest solution within memory, the solution of least memory, and a lower bound for several
problems that share one memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from nnscaler.planner.milp import MixedIntegerProgram
from nnscaler.planner.problem import Problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Account, Quantity, Terms

UNLIMITED = 1e18  # bytes


class OutOfTime(Exception):  # noqa: N818
    """Time was out before the solver found a solution.

    bound  seconds of a micro-batch; no solution takes less
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound


@dataclass(frozen=True)
class Solved:
    """A solution, and a bound: no solution takes fewer seconds of a micro-batch than that. `stopped`: whether time was
    out before the gap was reached"""

    solution: Solution
    bound: float
    stopped: bool = False


def solve(
    program: Program,
    memory: float,
    gap: float = 1e-4,
    below: float | None = None,
    seconds: float = inf,
    watch: Callable[[float, float], bool | None] | None = None,
) -> Solved | None:
    """The solution of least time within `memory` bytes a device. None where there is none, or none below `below`.

    gap      a solution within this relative distance of the best is good enough
    below    only solutions of less than so many seconds of a micro-batch count
    seconds  of processor time, after which the best solution so far is taken
    watch    called during the search with (seconds of a micro-batch of the best so far, or inf; the bound)

    Raises OutOfTime where no solution was found in time.
    """
    milp = stated(program, memory)
    if below is not None:
        milp.row(program.statement.terms(Account.TIME), upper=below, quantity=Quantity.SECONDS)
    answer = milp.solve(gap, seconds=seconds, heuristics=below is None, watch=watch)
    if answer is None:
        return None
    if answer.values is None:
        raise OutOfTime(answer.bound)
    return Solved(program.solution(answer.values), answer.bound, answer.stopped)


def stated(program: Program, memory: float) -> MixedIntegerProgram:
    """The mixed-integer program: least time within `memory` bytes a device."""
    milp = MixedIntegerProgram(_scale(program.problem, memory))
    milp.add(program.statement)
    milp.minimise(program.statement.terms(Account.TIME), Quantity.SECONDS)
    milp.row(program.statement.terms(Account.DEVICE), upper=memory, quantity=Quantity.BYTES)
    _limit_host(milp, program)
    return milp


def _limit_host(milp: MixedIntegerProgram, program: Program) -> None:
    if terms := program.statement.terms(Account.HOST):
        milp.row(terms, upper=program.problem.host, quantity=Quantity.BYTES)


def least_memory(program: Program, seconds: float = inf, enough: float | None = None) -> Solution | None:
    """The solution of least memory, whatever its time; None where none was found in so many seconds.

    enough  bytes a device: the search ends as soon as a solution takes no more, or it is known that none does
    """

    def decided(best: float, bound: float) -> bool:
        return enough is not None and (best <= enough or bound > enough)

    gap = 1e-2 if enough is None else 1e-3  # what nearly fits may be missed, by so little
    answer = _for_least_memory(program).solve(gap, seconds=seconds, watch=decided)
    assert answer is not None, "without a limit there is always a plan"
    return None if answer.values is None else program.solution(answer.values)


def least_seconds(program: Program) -> float:
    """Seconds of a micro-batch that no choice takes less than, whatever memory it has: those where choices may be made
    in parts."""
    answer = stated(program, UNLIMITED).solve(gap=0.0, relaxed=True)
    assert answer is not None, "without a limit there is always a plan"
    return answer.bound


def _for_least_memory(program: Program, categories: Collection[str] | None = None) -> MixedIntegerProgram:
    charges = program.statement.accounts[Account.DEVICE]
    counted = [one for one in charges if categories is None or one.key.category in categories]
    milp = MixedIntegerProgram(_scale(program.problem, None))
    milp.add(program.statement)
    milp.minimise([(one.variable, one.amount) for one in counted], Quantity.BYTES)
    _limit_host(milp, program)
    return milp


def least_bytes(program: Program, categories: Collection[str] | None = None) -> float:
    """Bytes a device that no solution takes less than: those where choices may be made in parts. `categories`: of keys
    that count alone"""
    answer = _for_least_memory(program, categories).solve(gap=0.0, relaxed=True)
    assert answer is not None, "without a limit there is always a plan"
    return answer.bound


class Needs(NamedTuple):
    """Seconds of a micro-batch, bytes of the device, and bytes a device of the host's memory."""

    seconds: float
    device: float
    host: float


def relaxed(programs: Sequence[Program], memory: float) -> list[Needs] | None:
    """What each program needs, where all of them together have `memory` bytes a device, and the host's memory of one.

    A choice may be made in parts here (half of one option, half of another). So no real solution takes less time in
    all. None where nothing fits.
    """
    scales = [_scale(program.problem, memory) for program in programs]
    milp = MixedIntegerProgram({quantity: max(scale[quantity] for scale in scales) for quantity in Quantity})
    accounts = (Account.TIME, Account.DEVICE, Account.HOST)
    charged: dict[Account, list[Terms]] = {account: [] for account in accounts}
    for program in programs:
        statement = program.statement
        shift = milp.add(statement)
        for account in accounts:
            charged[account].append([(variable + shift, amount) for variable, amount in statement.terms(account)])
    time, device, host = ([term for terms in charged[account] for term in terms] for account in accounts)
    milp.minimise(time, Quantity.SECONDS)
    milp.row(device, upper=memory, quantity=Quantity.BYTES)
    if host:
        milp.row(host, upper=max(program.problem.host for program in programs), quantity=Quantity.BYTES)
    answer = milp.solve(gap=1e-4, relaxed=True)
    if answer is None:
        return None
    values = answer.values
    assert values is not None
    totals = [[float(sum(values[v] * each for v, each in terms)) for terms in charged[one]] for one in accounts]
    return [Needs(*figures) for figures in zip(*totals)]


def _scale(problem: Problem, memory: float | None) -> dict[Quantity, float]:
    """How much of each quantity counts as one, so that the solver's numbers are neither large nor small."""
    decisions = problem.decisions
    fastest = sum(d.count * min(o.seconds.forward + o.seconds.backward for o in d.options) for d in decisions)
    largest = sum(max(d.count * (option.held + option.transient) for option in d.options) for d in decisions)
    byte = largest if memory is None else min(memory, 100 * largest)
    return {Quantity.NUMBER: 1.0, Quantity.SECONDS: fastest / 1000 or 1.0, Quantity.BYTES: byte / 1000 or 1.0}
