"""Solving programs: the best solution within memory, a bound for several problems together, the least memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from nnscaler.planner.milp import MixedIntegerProgram
from nnscaler.planner.problem import Problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Account, Unit


class OutOfTime(Exception):  # noqa: N818
    """The solver was stopped before it had found anything but a `bound`: seconds that no solution is below."""

    def __init__(self, bound: float) -> None:
        self.bound = bound


@dataclass(frozen=True)
class Solved:
    """A solution, and the seconds of a micro-batch that no other is below."""

    solution: Solution
    bound: float


def solve(
    program: Program,
    memory: float,
    gap: float = 1e-4,
    below: float | None = None,
    seconds: float = inf,
    watch: Callable[[float, float], None] | None = None,
) -> Solved | None:
    """The choice of least time within `memory` bytes a device; None where nothing fits, or takes less than `below`
    seconds of a micro-batch.

    seconds  after which the best that was found is taken; raises OutOfTime where nothing was
    watch    hears of the best seconds of a micro-batch so far (inf: none), and of the bound
    """
    milp = stated(program, memory)
    if below is not None:
        milp.row(program.statement.terms(Account.TIME), upper=below, unit=Unit.SECONDS)
    answer = milp.solve(gap, seconds=seconds, heuristics=below is None, watch=watch)
    if answer is None:
        return None
    if answer.values is None:
        raise OutOfTime(answer.bound)
    return Solved(program.solution(answer.values), answer.bound)


def stated(program: Program, memory: float) -> MixedIntegerProgram:
    """The program of the least time within `memory` bytes a device."""
    milp = MixedIntegerProgram(_scale(program.problem, memory))
    milp.add(program.statement)
    milp.minimise(program.statement.terms(Account.TIME), Unit.SECONDS)
    milp.row(program.statement.terms(Account.DEVICE), upper=memory, unit=Unit.BYTES)
    _limit_host(milp, program)
    return milp


def _limit_host(milp: MixedIntegerProgram, program: Program) -> None:
    if terms := program.statement.terms(Account.HOST):
        milp.row(terms, upper=program.problem.host, unit=Unit.BYTES)


def least_memory(program: Program, seconds: float = inf) -> Solution | None:
    """The choice that takes least memory, whatever its time; None where none was found in so many seconds."""
    milp = MixedIntegerProgram(_scale(program.problem, None))
    milp.add(program.statement)
    milp.minimise(program.statement.terms(Account.DEVICE), Unit.BYTES)
    _limit_host(milp, program)
    answer = milp.solve(gap=1e-2, seconds=seconds)
    assert answer is not None, "without a limit there is always a plan"
    return None if answer.values is None else program.solution(answer.values)


def relaxed(problems: Sequence[Problem], memory: float) -> list[tuple[float, float]] | None:
    """(seconds of a micro-batch, bytes) of each problem, where all together have `memory` bytes a device and a choice
    may be made in parts: no whole choices take less time in all. None where nothing fits."""
    scales = [_scale(problem, memory) for problem in problems]
    milp = MixedIntegerProgram({unit: max(scale[unit] for scale in scales) for unit in Unit})
    times, sizes = [], []
    for problem in problems:
        statement = Program(problem).statement
        shift = milp.add(statement)
        times.append([(variable + shift, seconds) for variable, seconds in statement.terms(Account.TIME)])
        sizes.append([(variable + shift, size) for variable, size in statement.terms(Account.DEVICE)])
    milp.minimise([term for terms in times for term in terms], Unit.SECONDS)
    milp.row([term for terms in sizes for term in terms], upper=memory, unit=Unit.BYTES)
    answer = milp.solve(gap=1e-4, relaxed=True)
    if answer is None:
        return None
    values = answer.values
    assert values is not None
    totals = [[float(sum(values[v] * each for v, each in terms)) for terms in found] for found in (times, sizes)]
    return list(zip(*totals))


def _scale(problem: Problem, memory: float | None) -> dict[Unit, float]:
    """What counts as one, so that numbers are neither large nor small."""
    decisions = problem.decisions
    fastest = sum(d.count * min(o.seconds.forward + o.seconds.backward for o in d.options) for d in decisions)
    largest = sum(max(d.count * (option.held + option.transient) for option in d.options) for d in decisions)
    byte = largest if memory is None else min(memory, 100 * largest)
    return {Unit.NUMBER: 1.0, Unit.SECONDS: fastest / 1000 or 1.0, Unit.BYTES: byte / 1000 or 1.0}
