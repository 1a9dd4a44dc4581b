"""Gradients of gathered weights on their way to their shards, as a part of the planning problem's program.

While backward goes on, some of them wait for their exchange (see `nnscaler.runtime.buckets.GradientReducer.defer`). See
`nnscaler.planner.working` for what is not named here.

Sets      f a weight that is gathered from p to s; last, those used after the last call of any block
Data      e_fps  bytes of its gradient in fp32: whole, as it is sent, and this device's part, which comes
          e'_fps that part alone
          d      how many wait, at most
Variables E_b, E_bl >= 0  bytes of those that wait while a call of b runs backward; and in the call that does so first
                 of those at level l, as long as units run after which fewer than d other weights of b are used
          E'_bl  likewise, while units run in pieces: for so long that what is sent has come

subject to    E_b >= d e_fps y_fps for each f of b                                                           (waiting)
              E_bl >= E_b;  E_bl >= sum over f in last of e_fps y_fps, less K_l: they wait in the first call only
              E'_bl likewise, with e'_fps for those in last
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

    FIRST    as long as gradients of weights from after the last call may be on their way
    ARRIVED  when these have come, and wait to be added
    LATER    after that
    """

    FIRST = "first"
    ARRIVED = "arrived"
    LATER = "later"


class Deferred:
    """Adds the variables and rows above, of one block, to a program.

    kept_after  level -> the sum K_l; None: of the first call of all, where K is 0
    always      the sum E_b
    waits       (when, level) -> the sum E_bl, or E'_bl where they have arrived
    """

    def __init__(self, flows: Flows, block: str, kept_after: Mapping[Level | None, Terms]) -> None:
        self.flows, self.problem, self.block, statement = flows, flows.problem, block, flows.statement
        weights = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.is_parameter]
        self.exchanged = [(flow, terms) for index, flow in weights if (terms := self._exchanged(index, flow))]
        parts = [term for index, flow in weights if flow.used_last for term in self._exchanged(index, flow, sent=False)]
        last = {When.FIRST: [t for flow, terms in self.exchanged if flow.used_last for t in terms], When.ARRIVED: parts}
        self.own = [(flow, terms) for flow, terms in self.exchanged if flow.block == block]
        self.always: Terms = []
        self.waits: dict[tuple[When, Level | None], Terms]
        self.waits = {(when, level): [] for when in last for level in kept_after}
        if self.own:
            waiting = statement.least(Quantity.BYTES)
            for _, terms in self.own:
                statement.above(waiting, [(y, MOST_DEFERRED * size) for y, size in terms])
            self.always = [(waiting, 1.0)]
        for when, level in self.waits if self.exchanged else ():
            first = statement.least(Quantity.BYTES)
            statement.above(first, self.always)
            statement.above(first, [*last[when], *minus(kept_after[level])])
            self.waits[when, level] = [(first, 1.0)]

    def _exchanged(self, index: int, flow: Flow, sent: bool = True) -> Terms:
        """Bytes of a weight's gradient while it is exchanged, where the weight is gathered. `sent`: the whole, too."""
        bytes_of, wider = self.problem.costs.local_bytes, GRADIENT_BYTES / flow.meta.dtype.itemsize
        return [
            (y, wider * (bytes_of(flow.meta, source) + sent * bytes_of(flow.meta, target)))
            for (source, target), y in self.flows.resharded[index].items()
            if flow.meta.requires_grad and beside(flow, source, target)
        ]

    def of_last(self, unit: int) -> Terms:
        """Bytes of the gradients of a unit's weights while they are exchanged, if it runs after the last call."""
        used = [(terms, {use for use, _ in flow.consumers}) for flow, terms in self.own if flow.used_last]
        return [term for terms, uses in used if unit in uses for term in terms]

    def when(self, last: float, in_pieces: bool = False) -> When:
        """When units run of which the last is at place `last`. Those in pieces give no weights' gradients until all
        are done."""
        decisions = self.problem.decisions
        after = [flow for flow, _ in self.own if any(decisions[use].place > last for use, _ in flow.consumers)]
        if not self.exchanged or len(after) >= MOST_DEFERRED:
            return When.LATER
        return When.ARRIVED if in_pieces else When.FIRST

    def during(self, when: When, level: Level | None = None) -> Terms:
        """Bytes of gradients that wait in the first call at a level."""
        return self.always if when is When.LATER else self.waits[when, level]
