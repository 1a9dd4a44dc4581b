"""Weights that are gathered in fp8, as a part of the planning problem's program.

A trained weight is so gathered to a layout in which only products in fp8 can use it: each device rounds its shard, and
the products need not. (See `nnscaler.planner.program` for what is not named here.)

Data      a_fp           seconds of rounding this device's shard of parameter f, stored in p
          s_cs, s'_cs    seconds of rounding f in product c, which uses it in layout s: in forward and in backward
Variables w_csl          how many calls at level l have c use f in s, and f gathered in fp8

minimise      sum of n_f a_fp y_fps, and as much for what is gathered again, less the sum of n_c (s_cs + s'_cs) e_fcps
              and of R_cl s_cs w_csl: of what is gathered in fp8
subject to    w_csl <= n_bl;  w_csl <= N_b sum_p e_fcps                                                       (spared)
"""

from __future__ import annotations

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows, in_fp8
from nnscaler.planner.problem import Flow, Port
from nnscaler.planner.statement import Account, Terms


class InFp8:
    """Adds the variables, rows and charges above to a program."""

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows = choices, flows
        self.problem, self.statement = choices.problem, choices.statement
        for index, flow in enumerate(self.problem.flows):
            if flow.is_parameter and flow.meta.requires_grad:
                self._round_shards(index, flow)
                for consumer in flow.consumers:
                    for target, made in self._taken(index, flow, consumer).items():
                        self._spare(consumer, target, made)

    def _round_shards(self, index: int, flow: Flow) -> None:
        for (source, target), y in self.flows.resharded[index].items():
            if in_fp8(self.problem, flow, source, target):
                each = self.problem.costs.rounding(flow.meta, source)
                move = f"{format_placements(source)} -> {format_placements(target)}"
                self.statement.charge(Account.TIME, Key("cast", flow.block, flow.tensor), y, flow.count * each)
                key = Key("cast again", flow.block, flow.tensor, move)
                for run, times in self.flows.again[index, source, target]:
                    self.statement.charge(Account.TIME, key, run, times * each)

    def _taken(self, index: int, flow: Flow, consumer: Port) -> dict[Placements, Terms]:
        """Layout -> whether a product uses what is gathered to it in fp8, as a sum."""
        found: dict[Placements, Terms] = {}
        for (source, target), e in self.flows.pairs[index, consumer].items():
            if in_fp8(self.problem, flow, source, target):
                found.setdefault(target, []).append((e, 1.0))
        return found

    def _spare(self, consumer: Port, target: Placements, taken: Terms) -> None:
        """What a product need not round; and the rows (spared)."""
        index, place = consumer
        product = self.problem.decisions[index]
        spared = next(one.weights[place] for one in product.options if one.inputs[place] == target)
        name, calls = (product.block, product.name), float(self.problem.calls[product.block])
        for e, _ in taken:
            self.statement.charge(Account.TIME, Key("forward", *name), e, -product.count * spared.forward)
            self.statement.charge(Account.TIME, Key("backward", *name), e, -product.count * spared.backward)
        for level, again in product.runs_again.items():
            if not again:
                continue
            if product.block not in self.choices.n:
                run = [(e, calls) for e, _ in taken]
            else:
                n = self.choices.n[product.block][level]
                run = [(self.statement.product([(n, 1.0)], taken, calls), 1.0)]
                self.statement.row([*run, (n, -1.0)], upper=0.0)
                self.statement.row([*run, *((e, -calls) for e, _ in taken)], upper=0.0)
            for variable, times in run:
                key = Key("again", *name, level.name)
                self.statement.charge(Account.TIME, key, variable, -times * again * spared.forward)
