"""Weights of which only the fp32 master weight is stored, as a part of the planning problem's program.

Such a weight is cast when it is gathered: into the buffer that its gather sends from. So it needs no memory in its own
type, and it can only be used where it is gathered (see `nnscaler.planner.program` for what is not named here). Where it
is gathered in fp8, it is cast once in a step's m micro-batches, and its shard is kept in fp8.

Data      a_fp          seconds of casting this device's shard of parameter f, stored in p
          o             the option of d, which is about f, to store its master alone, in p
          v_i           what f is gathered again by, from p, w_i times for each: the variables Y_fpsl and g_fps
Variables B_i >= 0      seconds of casting f for that

minimise      sum_f n_f a_fp x_do + sum_i B_i, beside the rest: in forward, it is cast once. In fp8: the first sum / m
subject to    x_do + sum of x over c's options that use f in what gathers do not make of p <= 1              (gathered)
              B_i >= a_fp w_i (v_i - its most (1 - x_do))                                                        (cast)
"""

from __future__ import annotations

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import IN_FP8, narrow
from nnscaler.planner.flows import Flows, beside, kept_in_fp8
from nnscaler.planner.problem import Flow, Problem
from nnscaler.planner.statement import Account, Quantity


def may_save_time(problem: Problem) -> bool:
    """Whether weights without a copy may make a plan faster, and not only smaller: where their shards are rounded to
    fp8 once a step, and those of others for each gather.

    In their own type they do not: to cast for each gather takes as long as to write the copy once a step.
    """
    if problem.micro_batches == 1:
        return False
    return any(
        problem.costs.owners(layout) == 1 and kept_in_fp8(problem, flow, layout)
        for flow in problem.flows
        if flow.is_parameter
        for layout in {option.outputs[flow.producer[1]] for option in problem.decisions[flow.producer[0]].options}
    )


class Masters:
    """Adds the variables, rows and charges above to a program."""

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows = choices, flows
        self.problem, self.statement = choices.problem, choices.statement
        for index, flow in enumerate(self.problem.flows):
            if flow.is_parameter:
                for layout, x in self.flows.alone(flow).items():
                    self._only_gathered(flow, layout, x)
                    if kept_in_fp8(self.problem, flow, layout):
                        self._keep_in_fp8(flow, layout, x)
                    else:
                        self._cast(index, layout, x)

    def _only_gathered(self, flow: Flow, layout: Placements, x: int) -> None:
        """The rows (gathered)."""
        for consumer in flow.consumers:
            used = self.flows.layouts(consumer, "inputs")
            other = [term for target, terms in used.items() if not beside(flow, layout, target) for term in terms]
            self.statement.row([(x, 1.0), *other], upper=1.0)

    def _keep_in_fp8(self, flow: Flow, layout: Placements, x: int) -> None:
        owner, costs = self.problem.decisions[flow.producer[0]], self.problem.costs
        once = flow.count * costs.cast(flow.meta, layout) / self.problem.micro_batches
        self.statement.charge(Account.TIME, Key("cast", flow.block, flow.tensor), x, once)
        size = flow.count * costs.local_bytes(narrow(flow.meta), layout)
        self.statement.charge(Account.DEVICE, Key("parameter", owner.block, owner.name, IN_FP8), x, size)

    def _cast(self, index: int, layout: Placements, x: int) -> None:
        """The charges for casts, and the rows (cast)."""
        flow = self.problem.flows[index]
        each = self.problem.costs.cast(flow.meta, layout)
        self.statement.charge(Account.TIME, Key("cast", flow.block, flow.tensor), x, flow.count * each)
        for (other, source, target), again in self.flows.again.items():
            for run, times in again if (other, source) == (index, layout) else ():
                seconds, most = self.statement.least(Quantity.SECONDS), self.statement.bounds[run]
                move = f"{format_placements(source)} -> {format_placements(target)}"
                key = Key("cast again", flow.block, flow.tensor, move)
                self.statement.charge(Account.TIME, key, seconds, 1.0)
                self.statement.above(seconds, [(run, each * times), (x, each * times * most)], -each * times * most)
