"""What is held while operators run, as a part of the planning problem's program (see `nnscaler.planner.program`).

Memory is at its peak in backward: while a unit runs backward, there are the gradients that it reads and writes, others
that wait for theirs, and what its call computes again. What later units and calls kept is free by then. Calls that keep
most on the device run backward first, and those that keep on the host, or in groups, after them: so what comes back
from the host is there when what others kept is not. (In forward they come first, when nothing else is kept.)

Sets      i a unit of block b, in the region that is compiled with its neighbours; after(l) the levels of the calls
          that come after those of level l, and so run backward before them: those that keep more on the device
Data      w_i   bytes held while i runs. Of a fused cluster: the gradients of its outputs, one for each unit beside it
                that makes one, since what adds them up is fused; and of its inputs. In a cluster that combines no
                elements, one is written over the other, but where all that is computed again is fused too (w'_i).
                What is made for products in fp8 is other memory: the gradients of their results, rounded in two
                orders, and what they read, once more.
          t_i   gradients that wait while i runs: of tensors from before i that are used after it too; and of the
                region's results after i, which whoever called the region's backward holds
          h_i   gradients of what the products after i make of i's output: they wait for it to be computed again, or
                rounded again for products in fp8 (these wait rounded too)
          f_i   what is made by i and after it, and kept on the device, and which no backward reads from i on; f what
                is made after the last call of any block
          K_l   what the calls after(l) keep
          D_bl, W_bl  what is on its way to the host or back, and what others of a group keep, while calls at l run: see
                `nnscaler.planner.on_host` and `nnscaler.planner.groups`
          c_fi  bytes of the copy in fp8 that a product i has of f, where i's region is given f; 0 where i does not run
                again
          E_il  gradients of weights that wait for their exchange: see `nnscaler.planner.deferred`
Variables V_b >= 0  what one call of b computes again as a whole, beyond what calls after it kept
          A_l >= 0  bytes that a call of level l holds beside what it keeps, if it computes nothing again as a whole
          U >= 0    what is held beside that
          u_bl      whether any call has level l

subject to    V_b >= sum of b_fs of what backward needs and l does not keep, and of c_fi, + D_bl + W_bl - K_l, if
                   u_bl = 1, for levels l that compute a call again as a whole                                  (whole)
              U + sum_b V_b >= V_b + w_i + t_i - f_i - f + E_i, and + h_i where products in fp8 read i's output (kept)
              A_l >= w'_i + t_i + h_i - f_i - f + b_fs of what is needed, made in i's region, and not kept at l,
                   + c_fi of the region's, for levels l that compute each region again by itself,
                   w_i + t_i - f_i - f for those that compute nothing again; of groups, for the level inside    (again)
              U + sum_b V_b >= A_l + D_bl + W_bl + E_il - K_l, if u_bl = 1, for the same levels               (in call)
              U + sum_b V_b >= V_b + H_r + t_r - f_r - f, for each stretch r that may be in pieces, with H_r as
                   in `nnscaler.planner.piecewise`, and f_r what is likewise free then; A_l likewise           (pieces)
              U >= w_i for what is in no call; after the last one, with the gradients of its weights on their way
and U + sum_b V_b is charged. Weights that are gathered to be computed with again count as what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.deferred import Deferred, When
from nnscaler.planner.flows import Flows, storage
from nnscaler.planner.groups import InGroups
from nnscaler.planner.held import Held, Sum, total
from nnscaler.planner.on_host import OnHost
from nnscaler.planner.pieces import InPieces, InStretch
from nnscaler.planner.piecewise import Piece, pieces_of, waiting_and_freed
from nnscaler.planner.problem import Decision, Flow
from nnscaler.planner.statement import Account, Quantity, Terms, minus
from nnscaler.recompute import Level, rank


class Working:
    """Adds the variables, rows and charges above to a program."""

    def __init__(
        self, choices: Choices, flows: Flows, pieces: InPieces, groups: InGroups, on_host: OnHost | None
    ) -> None:
        self.choices, self.flows, self.pieces = choices, flows, pieces
        self.extra = [groups.inside, on_host.on_its_way if on_host else {}]
        self.problem, self.statement = choices.problem, choices.statement
        self.whole = {
            block: self.statement.least(Quantity.BYTES)
            for block, levels in self.problem.levels.items()
            if any(level.as_a_whole for level in levels)
        }
        for block, variable in self.whole.items():
            self._charge(Key("working", block, "backward"), variable)
        self.freed_first = self._freed_first()
        bodies = [
            _Body(self, Held(choices, flows, block), Deferred(flows, block, self._kept_after(block)))
            for block in self.problem.levels
        ]
        self.held = self.statement.least(Quantity.BYTES)
        self._charge(Key("working"), self.held)
        for body in bodies:
            body.hold()

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

    def there(self, block: str, level: Level) -> Terms:
        """The sum D_bl + W_bl - K_l."""
        extra = [(found[block, level], 1.0) for found in self.extra if (block, level) in found]
        return [*extra, *minus(self.kept_after(block, level))]

    def _kept_after(self, block: str) -> dict[Level | None, Terms]:
        levels = [level for level in self.problem.levels[block] if _is_in_parts(level)]
        return {None: [], **{level: self.kept_after(block, level) for level in levels}}

    def kept_after(self, block: str, level: Level) -> Terms:
        """Bytes on the device that the calls keep that run backward before those of this level, and others do not: the
        sum K_l."""
        before = (level.size, rank(level))
        after = {other.name for other in self.problem.levels[block] if (other.size, rank(other)) < before}
        shared = {flow.tensor for flow in self.problem.flows if flow.block == block and self.flows.is_shared(flow)}
        return [
            (charge.variable, charge.amount / self.problem.in_flight)
            for charge in self.statement.accounts[Account.DEVICE]
            if charge.key.category in ("saved", "inside")
            and charge.key.block == block
            and charge.key.detail in after
            and charge.key.name not in shared
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


def _is_in_parts(level: Level) -> bool:
    """Whether a call at this level computes nothing again as a whole, and others may run backward before it."""
    return not level.as_a_whole and (level.on_host or not level.everything)


def _alike(level: Level) -> Level:
    """The level of whose calls backward runs as at this one."""
    return level if level.size == 1 else level.of_each


def _keeps_here(level: Level, flow: Flow) -> bool:
    """Whether a level keeps a tensor on the device."""
    return (level in flow.as_made or level in flow.as_used) and not level.on_host


def _runs_again(level: Level, unit: Decision) -> bool:
    """Whether a unit runs again at a level. A call that does as a whole runs all units of a region."""
    return level.as_a_whole or unit.runs_again.get(level, 0.0) > 0


def _is_in(region: int | None, unit: Decision) -> bool:
    return unit.region == region


class _Body:
    """The rows of one block."""

    def __init__(self, working: Working, held: Held, deferred: Deferred) -> None:
        self.working, self.held, self.deferred = working, held, deferred
        self.block, self.units, self.levels = held.block, held.units, working.problem.levels[held.block]
        self.problem, self.pieces, self.statement = working.problem, working.pieces, working.statement
        # (level, when it is that units run) -> the variable A, and its largest value
        self.in_call: dict[tuple[Level, When], tuple[int, float]] = {}
        self.of_stretch: dict[InStretch, list[Piece]] = {}
        if self.problem.has_calls(self.block):
            return
        # What waits does not depend on the level.
        self.beside = {
            index: [self.held.waiting(unit.place, unit.place), self.held.held_by_caller(unit)]
            for index, unit in self.units.items()
        }
        stretches = [one for one in self.pieces.stretches.values() if one.stretch.block == self.block]
        self.of_stretch = {one: pieces_of(one, held) for one in stretches}
        for level in dict.fromkeys(_alike(level) for level in self.levels if _is_in_parts(level)):
            self._again(level)
            for stretch, pieces in self.of_stretch.items():
                if stretch.stretch.allows(level):
                    self._again_in_pieces(pieces, level)

    def hold(self) -> None:
        """The rows of U and V. To be called as soon as the variables of all bodies are there."""
        if self.problem.has_calls(self.block):
            for index in self.units:
                terms, _ = self.held.alone(index)
                self.working.hold([*terms, *self.deferred.of_last(index)])
            return
        for level in self.levels:
            if level.as_a_whole:
                self._whole(level)
            elif _is_in_parts(level):
                self._in_call(level)
        for index, decision in self.units.items():
            self._kept(index, decision)
        for pieces in self.of_stretch.values():
            self._kept_in_pieces(pieces)

    def _whole(self, level: Level) -> None:
        """The row (whole) of one level."""
        terms, most = self._made_again(level, lambda decision: True)
        used, number = self.working.if_used(self.block, level, most)
        there = self.working.there(self.block, level)
        self.statement.above(self.working.whole[self.block], [*terms, *there, *used], number)

    def _kept(self, index: int, decision: Decision) -> None:
        """The row (kept) of one unit."""
        freed = self._freed(self.held.freed(decision.place, decision.place))
        waiting = [self.held.waiting_for(index)] if self.held.makes_for_fp8(index) else []
        held, _ = self._unless_in_pieces(index, [self.held.alone(index), *waiting, *self.beside[index]])
        deferred = self.deferred.during(self.deferred.when(decision.place))
        self.working.hold([*held, *freed, *deferred, *self.working.freed_first], self.block)

    def _kept_in_pieces(self, pieces: list[Piece]) -> None:
        """The rows (pieces) of one stretch."""
        for piece in pieces:
            (waiting, _), free = waiting_and_freed(piece.of, self.held)
            held = [(piece.variable, 1.0), *waiting, *self._freed(free)]
            self.working.hold([*held, *self.working.freed_first], self.block)

    def _in_call(self, level: Level) -> None:
        """The rows (in call) of one level."""
        there = self.working.there(self.block, level)
        for (alike, when), (variable, most) in self.in_call.items():
            if alike is _alike(level):
                used, number = self.working.if_used(self.block, level, most)
                deferred = self.deferred.during(when, level)
                self.working.hold([(variable, 1.0), *there, *deferred, *used], number=number)

    def _above(self, level: Level, when: When, terms: Terms, most: float) -> None:
        """States A >= terms for what runs in a call. `most`: the largest value of terms."""
        variable, before = self.in_call.get((level, when)) or (self.statement.least(Quantity.BYTES), 0.0)
        self.in_call[level, when] = variable, max(before, most)
        self.statement.above(variable, [*terms, *self.working.freed_first])

    def _again(self, level: Level) -> None:
        """The rows (again) of one level."""
        made_again: dict[int | None, Sum] = {None: ([], 0.0)}
        for index, decision in self.units.items():
            region, place = decision.region, decision.place
            if region not in made_again:
                made_again[region] = self._made_again(level, partial(_is_in, region))
            held = [self.held.alone(index, over=level.everything), *self.beside[index]]
            held += [] if level.everything else [self.held.waiting_for(index)]
            terms, most = self._unless_in_pieces(index, [*held, made_again[region]])
            freed = [one for one in self.held.freed(place, place) if self._is_freed(level, region, one[1])]
            self._above(level, self.deferred.when(place), [*terms, *self._freed(freed)], most)

    def _again_in_pieces(self, pieces: list[Piece], level: Level) -> None:
        """The rows (pieces) of one stretch and level. What is made again there is a piece's, and free with that."""
        for piece in pieces:
            (waiting, most), free = waiting_and_freed(piece.of, self.held)
            freed = self._freed([one for one in free if _keeps_here(level, one[1])])
            held = [(piece.variable, 1.0), *waiting, *freed]
            self._above(level, When.IN_PIECES, held, piece.most + most)

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

    def _is_freed(self, level: Level, region: int | None, flow: Flow) -> bool:
        """Whether a tensor is free as soon as no backward reads it, at a level that computes each region again.

        What is fetched from the host is let go of when backward of the call is done. What a region computes again waits
        until the region's last work, gradients of weights.
        """
        if level in flow.as_made or level in flow.as_used:
            return _keeps_here(level, flow)
        made_in = self.held.region(flow.producer[0])
        return made_in == region and not {use for use, _ in flow.consumers} & self.held.weighted

    def _made_again(self, level: Level, of: Callable[[Decision], bool]) -> Sum:
        """What backward needs and a level does not keep, of what certain units make, or gather for themselves."""
        terms: Terms = []
        most = 0.0
        for index, flow in self.held.flows:
            if flow.is_parameter:
                if level not in flow.as_used and self._is_used(flow, of):
                    for (source, target), y in self.working.flows.resharded[index].items():
                        if storage(source) == storage(target):
                            continue
                        size = self.working.flows.gathered_bytes(flow, source, target)
                        g = self.working.flows.gathered.get((index, source, target))
                        terms += [(y, size), *([(g, -size)] if g is not None else [])]
                        most += size
            elif flow.needed and level not in flow.as_used:
                inside = self.pieces.inside.get(index)
                inside = inside if inside and inside.stretch.allows(level) else None
                producer = self.problem.decisions[flow.producer[0]]
                parts = []
                if not inside and level not in flow.as_made and producer.kind == "unit" and of(producer):
                    parts.append(self.working.flows.size(flow))
                # A stretch with nothing within is not in pieces where this is not 0.
                alone = not inside or not inside.within
                if alone and level not in flow.as_resharded and self._is_used(flow, of):
                    parts.append(self.working.flows.more_as_used(index))
                part, largest = total(parts)
                terms += part
                most += largest
            # Of what a region is given, products that run again have their copies in fp8 beside.
            copies, largest = self.held.copies(flow, lambda unit: of(unit) and _runs_again(level, unit))
            terms += copies
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

    def _is_used(self, flow: Flow, of: Callable[[Decision], bool]) -> bool:
        """Whether certain units use a flow."""
        return any(of(self.units[use]) for use, _ in flow.consumers if use in self.units)
