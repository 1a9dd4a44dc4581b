"""What is held while operators run, as a part of the planning problem's program (see `nnscaler.planner.program`).

Memory is at its peak in backward: while a unit runs backward, there are the gradients that it reads and writes, others
that wait for theirs, and what its call computes again. What later units and calls kept is free by then.

Sets      i a unit of block b, in the region that is compiled with its neighbours; after(l) the levels of the calls
          that come after those of level l, and so run backward before them: those that keep more on the device
Data      w_i   bytes held while i runs. Of a fused cluster: the gradients of its outputs, one for each unit beside it
                that makes one, since what adds them up is fused; and of its inputs. Where all that is computed again
                is fused too, these are other memory (w'_i); else one is written over the other.
          t_i   gradients that wait while i runs: of tensors from before i that are used after it too; and of the
                region's results after i, which whoever called the region's backward holds
          h_i   gradients of what the products after i make of i's output: they wait for it to be computed again
          f_i   what is made by i and after it, and kept on the device, and which no backward reads from i on; f what
                is made after the last call of any block
Variables V_b >= 0  what one call of b computes again as a whole, beyond what calls after it kept
          U >= 0    what is held beside that
          u_bl      whether any call has level l

subject to    V_b >= sum of b_fs of what backward needs and l does not keep - K_l, if u_bl = 1                  (whole)
                   for levels l that compute a call again as a whole; K_l is what the calls after(l) keep
              U + sum_b V_b >= V_b + w_i + t_i - f_i - f                                                        (kept)
              U + sum_b V_b >= w'_i + t_i + h_i - f_i - f - K_l + b_fs of what is needed, made in i's region, and
                   not kept at l, if u_bl = 1, for levels l that compute each region again by itself             (again)
              U + sum_b V_b >= V_b + H_r + t_r - f_r - f, for each stretch r that may be in pieces, with H_r as in
                   `nnscaler.planner.piecewise`, and f_r what is likewise free then                            (pieces)
              U >= w_i for what is in no call
and U + sum_b V_b is charged. Weights that are gathered to be computed with again count as what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows, storage
from nnscaler.planner.held import Held, Sum, total
from nnscaler.planner.pieces import InPieces, InStretch
from nnscaler.planner.piecewise import Piece, pieces_of, waiting_and_freed
from nnscaler.planner.problem import Decision, Flow
from nnscaler.planner.statement import Account, Quantity, Terms, minus
from nnscaler.recompute import Level, rank


class Working:
    """Adds the variables, rows and charges above to a program."""

    def __init__(self, choices: Choices, flows: Flows, pieces: InPieces) -> None:
        self.choices, self.flows, self.pieces = choices, flows, pieces
        self.problem, self.statement = choices.problem, choices.statement
        self.whole = {
            block: self.statement.least(Quantity.BYTES)
            for block, levels in self.problem.levels.items()
            if any(_as_a_whole(level) for level in levels)
        }
        for block, variable in self.whole.items():
            self._charge(Key("working", block, "backward"), variable)
        of_block = {block: Held(choices, flows, block) for block in self.problem.levels}
        of_stretch = {one: pieces_of(one, of_block[one.stretch.block]) for one in pieces.stretches.values()}
        self.held = self.statement.least(Quantity.BYTES)
        self._charge(Key("working"), self.held)
        self.freed_first = self._freed_first()
        for held in of_block.values():
            _Body(self, held, of_stretch)

    def _charge(self, key: Key, variable: int) -> None:
        self.statement.charge(Account.DEVICE, key, variable, 1.0)

    def hold(self, terms: Terms, block: str | None = None, number: float = 0.0) -> None:
        """States U + sum_b V_b >= terms + number, and V of `block`."""
        others = [(v, -1.0) for name, v in self.whole.items() if name != block]
        self.statement.above(self.held, [*terms, *others], number)

    def if_used(self, block: str, level: Level, most: float) -> tuple[Terms, float]:
        """A sum and a number that together are 0 where a call of `block` has this level, and else -most."""
        if block not in self.choices.n:
            return [], 0.0
        return [(self.choices.used(block, level), most)], -most

    def kept_after(self, block: str, level: Level) -> Terms:
        """Bytes on the device that the calls keep that run backward before those of this level: the sum K_l."""
        before = (level.size, rank(level))
        after = {other.name for other in self.problem.levels[block] if (other.size, rank(other)) < before}
        return [
            (charge.variable, charge.amount / self.problem.in_flight)
            for charge in self.statement.accounts[Account.DEVICE]
            if charge.key.category in ("saved", "inside") and charge.key.block == block and charge.key.detail in after
        ]

    def _freed_first(self) -> Terms:
        """The sum f, with factors negated."""
        return minus(
            [
                term
                for flow in self.problem.flows
                if flow.freed_first
                for term in self.flows.size(flow, smallest=True)[0]
            ]
        )


def _as_a_whole(level: Level) -> bool:
    """Whether calls at this level are computed again as a whole, or partly as nobody here knows."""
    return level.call is not None or bool(level.named)


def _by_region(level: Level) -> bool:
    """Whether calls at this level compute each region again by itself."""
    return not level.everything and not _as_a_whole(level)


def _is_in(region: int | None, unit: Decision) -> bool:
    return unit.region == region


class _Body:
    """The rows of one block."""

    def __init__(self, working: Working, held: Held, of_stretch: Mapping[InStretch, list[Piece]]) -> None:
        self.working, self.held, self.block, self.units = working, held, held.block, held.units
        self.problem, self.pieces = working.problem, working.pieces
        block = self.block
        if self.problem.has_calls(block):
            for index in self.units:
                terms, _ = self.held.alone(index)
                working.hold(terms)
            return
        # What waits does not depend on the level.
        self.beside = {
            index: [self.held.waiting(unit.place, unit.place), self.held.held_by_caller(unit)]
            for index, unit in self.units.items()
        }
        levels = self.problem.levels[block]
        for level in filter(_as_a_whole, levels):
            self._whole(level)
        for index, decision in self.units.items():
            self._kept(index, decision)
        by_region = [level for level in levels if _by_region(level)]
        self.again = {
            index: [self.held.alone(index, over=False), *self.beside[index], self.held.waiting_for(index)]
            for index in self.units
            if by_region
        }
        for level in by_region:
            self._again(level)
        for stretch, pieces in of_stretch.items():
            if stretch.stretch.block == block:
                self._in_pieces(stretch, pieces, [level for level in by_region if stretch.stretch.allows(level)])

    def _in_pieces(self, stretch: InStretch, pieces: list[Piece], by_region: list[Level]) -> None:
        """The rows (pieces) of one stretch."""
        for piece in pieces:
            waiting, free = waiting_and_freed(piece.of, self.held)
            held = [(piece.variable, 1.0), *waiting, *self.working.freed_first]
            self.working.hold([*held, *self._freed(free)], self.block)
            for level in by_region:
                region = self.units[stretch.stretch.decisions[0]].region
                freed = self._freed([one for one in free if self._is_freed(level, region, one[1])])
                used, number = self.working.if_used(self.block, level, piece.most)
                self.working.hold([*held, *freed, *used], number=number)

    def _whole(self, level: Level) -> None:
        """The row (whole) of one level."""
        terms, most = self._made_again(level, lambda decision: True)
        used, number = self.working.if_used(self.block, level, most)
        after = minus(self.working.kept_after(self.block, level))
        self.working.statement.above(self.working.whole[self.block], [*terms, *after, *used], number)

    def _kept(self, index: int, decision: Decision) -> None:
        """The row (kept) of one unit."""
        freed = self._freed(self.held.freed(decision.place, decision.place))
        held, _ = self._unless_in_pieces(index, [self.held.alone(index), *self.beside[index]])
        self.working.hold([*held, *freed, *self.working.freed_first], self.block)

    def _unless_in_pieces(self, index: int, parts: list[Sum]) -> Sum:
        """The sum of `parts`, less its largest value where a unit is computed in pieces."""
        terms, most = total(parts)
        return [*terms, *((c, -most * share) for c, share in self.pieces.of(index))], most

    def _freed(self, free: list[tuple[int, Flow]]) -> Terms:
        """Bytes of flows that are free, where they are not made in pieces: a sum, with factors negated."""
        terms: Terms = []
        for index, flow in free:
            sizes, most = self.working.flows.size(flow, smallest=True)
            in_pieces = self.pieces.inside[index].in_any if index in self.pieces.inside else []
            terms += [*minus(sizes), *((a, most * share) for a, share in in_pieces)]
        return terms

    def _again(self, level: Level) -> None:
        """The rows (again) of one level."""
        after = minus(self.working.kept_after(self.block, level))
        made_again: dict[int | None, Sum] = {None: ([], 0.0)}
        for index, decision in self.units.items():
            region = decision.region
            if region not in made_again:
                made_again[region] = self._made_again(level, partial(_is_in, region))
            terms, most = self._unless_in_pieces(index, [*self.again[index], made_again[region]])
            used, number = self.working.if_used(self.block, level, most)
            free = self.held.freed(decision.place, decision.place)
            freed = self._freed([one for one in free if self._is_freed(level, region, one[1])])
            self.working.hold([*terms, *after, *used, *freed, *self.working.freed_first], number=number)

    def _is_freed(self, level: Level, region: int | None, flow: Flow) -> bool:
        """Whether a tensor is free as soon as no backward reads it, at a level that computes each region again.

        What is fetched from the host is let go of when backward of the call is done. What a region computes again waits
        until the region's last work, gradients of weights.
        """
        if level in flow.as_made or level in flow.as_used:
            return not level.on_host
        made_in = self.held.region(flow.producer[0])
        return made_in == region and not {use for use, _ in flow.consumers} & self.held.weighted

    def _made_again(self, level: Level, of: Callable[[Decision], bool]) -> Sum:
        """What backward needs and a level does not keep, of what certain units make, or gather as their weights."""
        terms: Terms = []
        most = 0.0
        for index, flow in self.held.flows:
            if flow.is_parameter:
                if level not in flow.as_used and any(
                    of(self.units[use]) for use, _ in flow.consumers if use in self.units
                ):
                    for (source, target), y in self.working.flows.resharded[index].items():
                        if storage(source) == storage(target):
                            continue
                        size = self.problem.costs.local_bytes(flow.meta, target)
                        g = self.working.flows.gathered.get((index, source, target))
                        terms += [(y, size), *([(g, -size)] if g is not None else [])]
                        most += size
            elif flow.needed and level not in flow.as_made and level not in flow.as_used:
                producer = self.problem.decisions[flow.producer[0]]
                inside = self.pieces.inside.get(index)
                alone = inside is None or not inside.stretch.allows(level)
                if alone and producer.kind == "unit" and of(producer):
                    part, largest = self.working.flows.size(flow)
                    terms += part
                    most += largest
        in_stretches = {i for one in self.pieces.stretches.values() if one.stretch.allows(level) for i in one.own}
        for index, decision in self.units.items():
            if level not in decision.inner_kept_at and index not in in_stretches and of(decision):
                inner, largest = self.held.inner(index)
                terms += inner
                most += largest
        for one in self.pieces.stretches.values():
            decisions = one.stretch.decisions if one.stretch.block == self.block else ()
            if one.stretch.allows(level) and any(of(self.units[index]) for index in decisions):
                terms.append((one.again, 1.0))
                most += one.most
        return terms, most
