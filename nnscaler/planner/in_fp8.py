"""Weights that are gathered in fp8, as a part of the planning problem's program.

A trained weight is so gathered to a layout in which only products in fp8 can use it: each device rounds its shard, and
the products need not. A master weight without a copy beside it is rounded once in a step's m micro-batches, others for
each gather. (See `nnscaler.planner.program` for what is not named here.)

Data      a_fp           seconds of rounding this device's shard of parameter f, stored in p
          s_cs, s'_cs    seconds of rounding f in product c, which uses it in layout s: in forward and in backward
          o              the option of d, which is about f, to store its master alone, in p
          v_i            what f is gathered again by, from p, w_i times for each: the variables Y_fpsl and g_fps
Variables w_csl          how many calls at level l have c use f in s, and f gathered in fp8
          B_i >= 0       seconds of rounding f's shard, in forward or again

minimise      sum_i B_i, less the sum of n_c (s_cs + s'_cs) e_fcps and of R_cl s_cs w_csl: of what is gathered in fp8
subject to    B_i >= a_fp w_i (v_i - its most x_do)                                                            (again)
              B_i >= a_fp n_f (y_fps - (1 - 1/m) x_do)                                                         (first)
              w_csl <= n_bl;  w_csl <= N_b sum_p e_fcps                                                       (spared)
"""

from __future__ import annotations

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows, in_fp8, kept_in_fp8
from nnscaler.planner.problem import Flow, Port
from nnscaler.planner.statement import Account, Quantity, Terms


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
        """The charges for rounding shards, and the rows (first) and (again)."""
        alone, once = self.flows.alone(flow), 1 / self.problem.micro_batches
        kept = {layout: x for layout, x in alone.items() if kept_in_fp8(self.problem, flow, layout)}
        key = Key("cast", flow.block, flow.tensor)
        for (source, target), y in self.flows.resharded[index].items():
            if in_fp8(self.problem, flow, source, target):
                each, x = self.problem.costs.rounding(flow.meta, source), kept.get(source)
                self._round(key, y, flow.count * each, x, once)
                move = f"{format_placements(source)} -> {format_placements(target)}"
                for run, times in self.flows.again[index, source, target]:
                    self._round(key._replace(category="cast again", detail=move), run, times * each, x, 0.0)

    def _round(self, key: Key, run: int, seconds: float, kept: int | None, part: float) -> None:
        """Charges the seconds of each `run`; only a part of them where `kept` is 1."""
        charged, most = self.statement.least(Quantity.SECONDS), self.statement.bounds[run]
        self.statement.charge(Account.TIME, key, charged, 1.0)
        spared = [] if kept is None else [(kept, -seconds * most * (1 - part))]
        self.statement.above(charged, [(run, seconds), *spared])

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
