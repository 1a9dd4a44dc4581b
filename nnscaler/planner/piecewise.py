"""What is held while a piece runs, as a part of the planning problem's program (see `nnscaler.planner.working`).

Sets      r a stretch, in k pieces; q the stretch within it, if it has one, in k' pieces; i a unit of r
          pieces(i): r in k pieces, for all i where q is whole, else for those not in q; q in k' pieces, for i in q,
          where r is whole; both, for i in q
Data      w_i, b_fs  as there
          of a tensor that is divided, a piece has the k-th part, or the k'-th, or both
Variables H_r >= 0   bytes held while a piece of r runs; and one while a piece of q runs within one of r

subject to    H_r >= W_i + M_i + F_i + G for i in r, if its pieces are pieces(i); all of them as a piece has them:
                   W_i  w_i
                   M_i  what is made inside and needed, as it is used where it is resharded for that and then more;
                        inner tensors, and results that are needed again; less what is free by then
                   F_i  gradients that later units of the stretch have made, of what comes from before i
                   G    around the piece: gradients of all results, and of all that the stretch takes. Those of what is
                        divided are put together; others are added up, mostly in fp32.                     (piece)
              Within a piece of r, G of q is that of a piece of r, and beside it lies G of r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from nnscaler.planner.costs import GRADIENT_BYTES
from nnscaler.planner.held import Held, Sum, total
from nnscaler.planner.pieces import InStretch
from nnscaler.planner.problem import Flow
from nnscaler.planner.statement import Quantity

Counts = Mapping[InStretch, int]  # stretch -> in how many pieces it is


@dataclass
class Piece:
    """What is held while a piece runs.

    of        the stretch that is in pieces; of stretches within one another, the outer one
    variable  H
    most      its largest value
    """

    of: InStretch
    variable: int
    most: float = 0.0


def pieces_of(stretch: InStretch, held: Held) -> list[Piece]:
    """The rows (piece) of a stretch."""
    within, around = stretch.within, stretch.around
    units = set(stretch.stretch.decisions)
    inner = units & set(within.stretch.decisions) if within else set()
    alone = _Rows(held, stretch, stretch)
    for count in stretch.counts:
        alone.state({stretch: count}, units - inner, [], around)
        if within:
            alone.state({stretch: count}, units, [within], around)
    if around is None:
        return [alone.piece]
    both = _Rows(held, stretch, around)
    for count in stretch.counts:
        for outer in around.counts:
            both.state({stretch: count, around: outer}, units, [], None)
    return [alone.piece, both.piece]


class _Rows:
    """The rows of one variable H.

    stretch  whose pieces run
    outer    the stretch that it is within, if that is in pieces too; else itself
    """

    def __init__(self, held: Held, stretch: InStretch, outer: InStretch) -> None:
        self.held, self.stretch, self.outer = held, stretch, outer
        self.statement = stretch.statement
        self.piece = Piece(outer, self.statement.least(Quantity.BYTES))

    def state(self, counts: Counts, units: Iterable[int], whole: list[InStretch], unless: InStretch | None) -> None:
        """The rows for some units, if stretches are in so many pieces.

        whole   stretches within that are computed whole by each piece; the rows hold only then
        unless  likewise a stretch around
        """
        stretches = [self.stretch, *whole]

        def part(flow: Flow) -> float:
            return _part(flow, counts)

        always = [self._around(self.stretch, counts)]
        if self.outer is not self.stretch:
            always.append(self._around(self.outer, counts))
        for index in sorted(units):
            made, found = self._made(index, stretches, counts), self._found(index, counts)
            terms, most = total([*always, self.held.alone(index, part=part), made, found])
            conditions = [(one.counts[count], most) for one, count in counts.items()]
            for one in [*whole, *([unless] if unless else [])]:
                conditions += one.any(-most)
            self.statement.above(self.piece.variable, [*terms, *conditions], -most * len(counts))
            self.piece.most = max(self.piece.most, most)

    def _made(self, index: int, stretches: list[InStretch], counts: Counts) -> Sum:
        """What is made inside and needed, and results that are needed again, less what is free as a unit runs."""
        flows, own, place = self.held.problem.flows, _places(self.stretch), self.held.place(index)
        free = {one for one, _ in self.held.freed(place, place)}
        inside = self.stretch.all.inside
        there = [one for one, where in inside.items() if where in stretches and one not in free]
        made = [flows[one] for one in there]
        made += [flow for flow in self.stretch.given if min(flow.read_by & own, default=inf) <= place]
        parts = [self.held.made([flow], lambda flow: _part(flow, counts)) for flow in made]
        parts += [self.held.of_flows.more_as_used(one, _part(flows[one], counts)) for one in there]
        run = [one for where in stretches for one in where.own if self.held.place(one) <= place]
        return total([*parts, *(self.held.inner(one, lambda flow: _part(flow, counts)) for one in run)])

    def _found(self, index: int, counts: Counts) -> Sum:
        """Gradients of tensors from before a unit that later units of the stretch have made."""
        decisions, place = set(self.stretch.stretch.decisions), self.held.place(index)
        found = []
        for _, flow in self.held.flows:
            later = [use for use, _ in flow.consumers if use in decisions and self.held.place(use) > place]
            if later and flow.meta.requires_grad and self.held.place(flow.producer[0]) < place:
                found.append(self.held.used(flow, later[0], _part(flow, counts)))
        return total(found)

    def _around(self, stretch: InStretch, counts: Counts) -> Sum:
        outside = {one: count for one, count in counts.items() if one is stretch.around}
        parts = [self.held.made([flow], lambda flow: _part(flow, outside)) for flow in stretch.given]
        for flow in stretch.taken:
            if flow.meta.requires_grad:
                own_type = flow.tensor in stretch.stretch.dims or flow.tensor in stretch.stretch.adds_up
                times = 1.0 if own_type else GRADIENT_BYTES / flow.meta.dtype.itemsize
                user = next(use for use, _ in flow.consumers if use in stretch.stretch.decisions)
                parts.append(self.held.used(flow, user, times * _part(flow, outside)))
        return total(parts)


def _places(stretch: InStretch) -> frozenset[int]:
    return frozenset(stretch.problem.decisions[index].place for index in stretch.stretch.decisions)


def _part(flow: Flow, counts: Counts) -> float:
    """Which part of a tensor a piece has."""
    part = 1.0
    for stretch, count in counts.items():
        part /= count if flow.tensor in stretch.stretch.dims else 1
    return part


def waiting_and_freed(stretch: InStretch, held: Held) -> tuple[Sum, list[tuple[int, Flow]]]:
    """Gradients that wait while a stretch runs backward; and what is free by then."""
    places = _places(stretch)
    first, last = min(places), max(places)
    return held.waiting(first, last), held.freed(first, last, places)
