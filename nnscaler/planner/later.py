"""What waits for gradients of weights that are computed later, as a part of the planning problem's program.

A stage of a pipeline may run backward of a micro-batch in two parts (see `nnscaler.runtime.later`). After the first,
what was kept for backward is free; but each product y = x W^T, whose W is trained, holds x and the gradient of y for
the second part.

Sets      i a product whose weight's gradient can be computed later; k a moment of the stage's schedule
Data      a_k      micro-batches of which, at k, is held what is kept for backward; A the most at any moment
          b_k      micro-batches of which, at k, products hold x and dy; one whose first part runs counts in both
          n_f, n_i, b_fs   as in `nnscaler.planner.program`;  y_io bytes of i's result
Variables r_fs >= 0   whether flow f, in layout s, is x of a product that is not in fp8
          L >= 0      bytes that products hold, beyond those of what is kept for backward that are not held by then

subject to    r_fs >= sum of x_io over i's options, not in fp8, that use f in s, for each i of which f is x       (read)
              L >= b_k (sum of n_f b_fs r_fs + sum of n_i y_io x_io over options not in fp8) - (A - a_k) S, where S is
                   what is kept on the device for backward of one micro-batch                                  (moment)
and L is charged. A product in fp8, or one whose weight is not used as it is stored, computes its gradient at once; that
the latter is not left out makes L too large rather than too small. So do weights that are gathered, levels that keep on
the host, and pieces, with which a stage does not split its backward.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnscaler.placement import Placements
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import storage
from nnscaler.planner.options import Option
from nnscaler.planner.statement import Account, Quantity, Terms, minus

WAITING = Key("saved", "", "", "for gradients of weights")


class Later:
    """Adds the variables, rows and the charge above to a program, after all that is kept for backward is charged."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.problem, self.statement = choices, choices.problem, choices.statement
        self.read: dict[tuple[int, Placements], int] = {}
        kept = [
            (charge.variable, charge.amount / self.problem.in_flight)
            for charge in self.statement.accounts[Account.DEVICE]
            if charge.key.category in ("saved", "inside")
        ]
        held = [*self._multiplied(), *self._results()]
        waiting = self.statement.least(Quantity.BYTES)
        for kept_of, held_of in self.problem.waiting:
            free = minus([(variable, (self.problem.in_flight - kept_of) * size) for variable, size in kept])
            self.statement.above(waiting, [*((variable, held_of * size) for variable, size in held), *free])
        self.statement.charge(Account.DEVICE, WAITING, waiting, 1.0)

    def _multiplied(self) -> Terms:
        """Bytes of what products multiply, and the rows (read)."""
        terms: Terms = []
        for index, flow in enumerate(self.problem.flows):
            for use, place in flow.consumers:
                layouts: dict[Placements, Terms] = {}
                for option, x in self._options(use) if self.problem.decisions[use].later == place else ():
                    layouts.setdefault(storage(option.inputs[place]), []).append((x, 1.0))
                for layout, xs in layouts.items():
                    if (index, layout) not in self.read:
                        self.read[index, layout] = self.statement.least(bound=1.0)
                        size = flow.count * self.problem.costs.local_bytes(flow.meta, layout)
                        terms.append((self.read[index, layout], size))
                    self.statement.above(self.read[index, layout], xs)
        return terms

    def _results(self) -> Terms:
        """Bytes of the gradients of what products give."""
        return [
            (x, self.problem.decisions[index].count * self.problem.costs.local_bytes(flow.meta, option.outputs[place]))
            for flow in self.problem.flows
            for index, place in [flow.producer]
            if self.problem.decisions[index].later is not None and place == 0
            for option, x in self._options(index)
        ]

    def _options(self, index: int) -> Iterator[tuple[Option, int]]:
        """The options of a product that are not in fp8, with their variables."""
        for option, x in zip(self.problem.decisions[index].options, self.choices.x[index]):
            if not any(way.in_fp8 for _, way in option.ways):
                yield option, x
