"""What a solution costs: the charges of its program, added up by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field

from nnscaler.plan import Key
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Account


@dataclass
class Price:
    """The seconds of a micro-batch, and the bytes of a device.

    seconds  what one micro-batch takes. The key `exchange` is the time by which forward and backward take longer
             because of what is exchanged beside them; `copies` likewise, because of copies to the host and back.
    memory   bytes of a device
    beside   seconds of what is exchanged beside computation: weights that are gathered, and gradients. An exchange that
             happens once a step counts with its part of a micro-batch.
    host     bytes of the host's memory, for each device
    copies   seconds of copies to the host and back, beside computation
    """

    seconds: dict[Key, float]
    memory: dict[Key, float]
    beside: dict[Key, float]
    host: dict[Key, float] = field(default_factory=dict)
    copies: dict[Key, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def price(program: Program, solution: Solution) -> Price | None:
    """The cost of a solution. None where it needs a tensor in a layout that resharding cannot give."""
    values = program.statement.values(program.values(solution))
    if values is None:
        return None
    prices = program.statement.prices
    last = 1 / program.problem.micro_batches
    return Price(
        prices(values, {Account.TIME: 1.0}),
        prices(values, {Account.DEVICE: 1.0}),
        prices(values, {Account.FORWARD: 1.0, Account.BACKWARD: 1.0, Account.LAST: last}),
        prices(values, {Account.HOST: 1.0}),
        prices(values, {Account.SENT: 1.0, Account.FETCHED: 1.0}),
    )
