"""What a solution costs: the charges of its program, added up by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field

from nnscaler.plan import Key
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Account


@dataclass
class Evaluation:
    """Seconds a micro-batch and bytes a device.

    beside  seconds of what runs beside computation: gathering weights, and the exchange of each parameter's gradient
            (once a step, or in each micro-batch). By how much forward and backward take longer for all of it is among
            the seconds, as `exchange`
    weights  of the seconds, those in which backward makes gradients of weights
    host     bytes a device of the host's memory; copies: seconds of copying to it and back, beside computation. By how
             much that takes longer for them is among the seconds, as `copies`
    """

    seconds: dict[Key, float]
    memory: dict[Key, float]
    beside: dict[Key, float]
    weights: float
    host: dict[Key, float] = field(default_factory=dict)
    copies: dict[Key, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def evaluate(program: Program, solution: Solution) -> Evaluation | None:
    """The cost of a solution; None where a tensor cannot be resharded as needed."""
    values = program.statement.values(program.choices(solution))
    if values is None:
        return None
    prices = program.statement.prices
    last = 1 / program.problem.micro_batches
    return Evaluation(
        prices(values, {Account.TIME: 1.0}),
        prices(values, {Account.DEVICE: 1.0}),
        prices(values, {Account.FORWARD: 1.0, Account.BACKWARD: 1.0, Account.LAST: last}),
        sum(prices(values, {Account.WEIGHTS: 1.0}).values()),
        prices(values, {Account.HOST: 1.0}),
        prices(values, {Account.SENT: 1.0, Account.FETCHED: 1.0}),
    )
