"""Gradients of gathered weights on their way to their shards, as a part of the planning problem's program.

While backward goes on, some of them wait for their exchange (see `nnscaler.runtime.buckets.GradientReducer.defer`),
but none while units run in pieces (see `settle` there). See `nnscaler.planner.working` for what is not named here.

Sets      f a weight that is gathered from p to s; last, those used after the last call of any block
Data      e_fps  bytes of its gradient in fp32: whole, as it is sent, and this device's part, which comes
          d      how many wait, at most
Variables E_b, E_bl >= 0  bytes of those that wait while a call of b runs backward; and in the call that does so first
                 of those at level l, as long as units run after which fewer than d other weights of b are used

subject to    E_b >= d e_fps y_fps for each f of b                                                           (waiting)
              E_bl >= E_b;  E_bl >= sum over f in last of e_fps y_fps, less K_l: they wait in the first call only
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from nnscaler.planner.costs import GRADIENT_BYTES
from nnscaler.planner.flows import Flows, beside
from nnscaler.planner.problem import Flow
from nnscaler.planner.statement import Quantity, Terms, minus
from nnscaler.recompute import Level
from nnscaler.sizes import MOST_DEFERRED


class When(Enum):
    """When units of a call run backward.

    FIRST      as long as gradients of weights from after the last call may be on their way
    LATER      after that
    IN_PIECES  when none are
    """

    FIRST = "first"
    LATER = "later"
    IN_PIECES = "in pieces"


class Deferred:
    """Adds the variables and rows above, of one block, to a program.

    kept_after  level -> the sum K_l; None: of the first call of all, where K is 0
    always      the sum E_b
    waits       level -> the sum E_bl
    """

    def __init__(self, flows: Flows, block: str, kept_after: Mapping[Level | None, Terms]) -> None:
        self.flows, self.problem, self.block, statement = flows, flows.problem, block, flows.statement
        weights = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.is_parameter]
        self.exchanged = [(flow, terms) for index, flow in weights if (terms := self._exchanged(index, flow))]
        last = [term for flow, terms in self.exchanged if flow.used_last for term in terms]
        self.own = [(flow, terms) for flow, terms in self.exchanged if flow.block == block]
        self.always: Terms = []
        self.waits: dict[Level | None, Terms] = {level: [] for level in kept_after}
        if self.own:
            waiting = statement.least(Quantity.BYTES)
            for _, terms in self.own:
                statement.above(waiting, [(y, MOST_DEFERRED * size) for y, size in terms])
            self.always = [(waiting, 1.0)]
        for level in self.waits if self.exchanged else ():
            first = statement.least(Quantity.BYTES)
            statement.above(first, self.always)
            statement.above(first, [*last, *minus(kept_after[level])])
            self.waits[level] = [(first, 1.0)]

    def _exchanged(self, index: int, flow: Flow) -> Terms:
        """Bytes of a weight's gradient while it is exchanged, where the weight is gathered."""
        bytes_of, wider = self.problem.costs.local_bytes, GRADIENT_BYTES / flow.meta.dtype.itemsize
        return [
            (y, wider * (bytes_of(flow.meta, source) + bytes_of(flow.meta, target)))
            for (source, target), y in self.flows.resharded[index].items()
            if flow.meta.requires_grad and beside(flow, source, target)
        ]

    def of_last(self, unit: int) -> Terms:
        """Bytes of the gradients of a unit's weights while they are exchanged, if it runs after the last call."""
        used = [(terms, {use for use, _ in flow.consumers}) for flow, terms in self.own if flow.used_last]
        return [term for terms, uses in used if unit in uses for term in terms]

    def when(self, place: float) -> When:
        """When the unit at a place runs, if it is not in pieces."""
        decisions = self.problem.decisions
        after = [flow for flow, _ in self.own if any(decisions[use].place > place for use, _ in flow.consumers)]
        return When.LATER if not self.exchanged or len(after) >= MOST_DEFERRED else When.FIRST

    def during(self, when: When, level: Level | None = None) -> Terms:
        """Bytes of gradients that wait in the first call at a level."""
        return {When.FIRST: self.waits[level], When.LATER: self.always, When.IN_PIECES: []}[when]
