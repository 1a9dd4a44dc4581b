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
              U >= w_i for what is in no call
and U + sum_b V_b is charged. Weights that are gathered to be computed with again count as what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows, storage
from nnscaler.planner.options import Option
from nnscaler.planner.pieces import InPieces
from nnscaler.planner.problem import Decision, Flow
from nnscaler.planner.statement import Account, Quantity, Terms, minus
from nnscaler.recompute import Level, rank

OUTSIDE = inf  # the place of a block's results among its units


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
        self.held = self.statement.least(Quantity.BYTES)
        self._charge(Key("working"), self.held)
        self.freed_first = self._freed_first()
        for block in self.problem.levels:
            _Body(self, block)

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

    def size(self, flow: Flow, smallest: bool = False) -> tuple[Terms, float]:
        """Bytes of a flow as it is made, as a sum, and its largest value.

        smallest  at most as many as it has in any layout that it is used in
        """
        layouts = self.flows.layouts(flow.producer, "outputs")
        sizes = {layout: self.problem.costs.local_bytes(flow.meta, layout) for layout in layouts}
        if smallest:
            used = [layout for use in flow.consumers for layout in self.flows.layouts(use, "inputs")]
            least = min((self.problem.costs.local_bytes(flow.meta, layout) for layout in used), default=inf)
            sizes = {layout: int(min(size, least)) for layout, size in sizes.items()}
        return [(x, sizes[layout]) for layout, xs in layouts.items() for x, _ in xs], max(sizes.values())

    def _freed_first(self) -> Terms:
        """The sum f, with factors negated."""
        return minus(
            [term for flow in self.problem.flows if flow.freed_first for term in self.size(flow, smallest=True)[0]]
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

    def __init__(self, working: Working, block: str) -> None:
        self.working, self.block = working, block
        self.problem, self.pieces = working.problem, working.pieces
        self.flows = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.block == block]
        decisions = enumerate(self.problem.decisions)
        self.units = {index: one for index, one in decisions if one.block == block and one.kind == "unit"}
        weights = [flow for _, flow in self.flows if flow.is_parameter and flow.meta.requires_grad]
        self.weighted = {use for flow in weights for use, _ in flow.consumers}
        if self.problem.has_calls(block):
            for index, decision in self.units.items():
                terms, _ = self._alone(index, decision)
                working.hold(terms)
            return
        # What waits does not depend on the level.
        self.beside = {
            index: [self._waiting(unit.place, unit.place), self._held_by_caller(unit)]
            for index, unit in self.units.items()
        }
        levels = self.problem.levels[block]
        for level in filter(_as_a_whole, levels):
            self._whole(level)
        for index, decision in self.units.items():
            self._kept(index, decision)
        by_region = [level for level in levels if _by_region(level)]
        self.again = {
            index: [self._alone(index, unit, over=False), *self.beside[index], self._waiting_for(unit, index)]
            for index, unit in self.units.items()
            if by_region
        }
        for level in by_region:
            self._again(level)
        for held in self.pieces.held:
            if held.stretch.block == block:
                around = [*held.terms, *self._waiting(*held.places)[0], *working.freed_first]
                working.hold(around, block)
                if any(map(held.stretch.allows, by_region)):
                    in_pieces = [(c, held.most) for c in self.pieces.counts[block, held.stretch.name].values()]
                    working.hold([(held.made, 1.0), *around, *in_pieces], number=-held.most)

    def _whole(self, level: Level) -> None:
        """The row (whole) of one level."""
        terms, most = self._made_again(level, lambda decision: True)
        used, number = self.working.if_used(self.block, level, most)
        after = minus(self.working.kept_after(self.block, level))
        self.working.statement.above(self.working.whole[self.block], [*terms, *after, *used], number)

    def _kept(self, index: int, decision: Decision) -> None:
        """The row (kept) of one unit."""
        freed = self._freed(decision.place, lambda flow: True)
        held, _ = self._unless_in_pieces(index, [self._alone(index, decision), *self.beside[index]])
        self.working.hold([*held, *freed, *self.working.freed_first], self.block)

    def _unless_in_pieces(self, index: int, parts: list[tuple[Terms, float]]) -> tuple[Terms, float]:
        """The sum of `parts`, less its largest value where a unit is computed in pieces."""
        most = sum(largest for _, largest in parts)
        in_pieces = [(c, -most * share) for c, share in self.pieces.working.get(index, ())]
        return [*(term for terms, _ in parts for term in terms), *in_pieces], most

    def _freed(self, place: float, freed: Callable[[Flow], bool]) -> Terms:
        """Bytes of what is made by the unit at `place` and after it, and read by the backward of none before or itself,
        if `freed` says that it is free then: a sum, with factors negated."""
        terms: Terms = []
        for index, flow in self.flows:
            if flow.needed and self._place(flow.producer[0]) >= place and flow.read_from > place and freed(flow):
                sizes, most = self.working.size(flow, smallest=True)
                gone = self.pieces.inside[index].gone if index in self.pieces.inside else []
                terms += [*minus(sizes), *((c, most * part) for c, part in gone)]
        return terms

    def _again(self, level: Level) -> None:
        """The rows (again) of one level."""
        after = minus(self.working.kept_after(self.block, level))
        made_again: dict[int | None, tuple[Terms, float]] = {None: ([], 0.0)}
        for index, decision in self.units.items():
            region = decision.region
            if region not in made_again:
                made_again[region] = self._made_again(level, partial(_is_in, region))
            terms, most = self._unless_in_pieces(index, [*self.again[index], made_again[region]])
            used, number = self.working.if_used(self.block, level, most)
            freed = self._freed(decision.place, partial(self._is_freed, level, region))
            self.working.hold([*terms, *after, *used, *freed, *self.working.freed_first], number=number)

    def _is_freed(self, level: Level, region: int | None, flow: Flow) -> bool:
        """Whether a tensor is free as soon as no backward reads it, at a level that computes each region again.

        What is fetched from the host is let go of when backward of the call is done. What a region computes again waits
        until the region's last work, gradients of weights.
        """
        if level in flow.as_made or level in flow.as_used:
            return not level.on_host
        return self._region(flow.producer[0]) == region and not {use for use, _ in flow.consumers} & self.weighted

    def _place(self, index: int) -> float:
        """The place of a decision among the units: -1 for the block's inputs and weights, OUTSIDE for its results."""
        decision = self.problem.decisions[index]
        if decision.kind == "unit":
            return decision.place
        return OUTSIDE if decision.kind == "output" else -1

    def _sum(self, flows: list[Flow]) -> tuple[Terms, float]:
        parts = [self.working.size(flow) for flow in flows]
        return [term for terms, _ in parts for term in terms], sum(most for _, most in parts)

    def _alone(self, index: int, decision: Decision, over: bool = True) -> tuple[Terms, float]:
        """w_i, or w'_i where not `over`."""
        xs = self.working.choices.x[index]
        sizes = [option.transient for option in decision.options]
        if decision.fused:
            sizes = [self._fused(index, option, over) for option in decision.options]
        most = max(sizes)
        return [(x, size) for x, size in zip(xs, sizes) if size], most

    def _fused(self, index: int, option: Option, over: bool) -> float:
        """Bytes that a fused cluster holds beside what is kept."""
        costs = self.problem.costs
        given = made = forward = rewritten = 0.0
        for _, flow in self.flows:
            for use in flow.consumers:
                if use[0] == index and not flow.is_parameter:
                    size = costs.local_bytes(flow.meta, option.inputs[use[1]])
                    forward += 0.0 if flow.needed else size
                    made += size if flow.meta.requires_grad else 0.0
            if flow.producer[0] == index:
                size = costs.local_bytes(flow.meta, option.outputs[flow.producer[1]])
                forward += size
                beside = self._beside(index, flow)
                given += size * max(len(beside), 1) if flow.meta.requires_grad else 0.0
                rewritten += size if flow.meta.requires_grad and len(beside) == len(flow.consumers) else 0.0
        return max(forward, given + made - (min(rewritten, made) if over else 0.0))

    def _beside(self, index: int, flow: Flow) -> set[int]:
        """The units that use a flow in the region of the unit that makes it."""
        region = self.problem.decisions[index].region
        return {use for use, _ in flow.consumers if self._region(use) == region} if region is not None else set()

    def _region(self, index: int) -> int | None:
        decision = self.problem.decisions[index]
        return decision.region if decision.kind == "unit" else None

    def _waiting(self, first: int, last: int) -> tuple[Terms, float]:
        """Gradients of tensors from before the unit at place `first` that are used after the one at `last`."""
        return self._sum([
            flow
            for _, flow in self.flows
            if flow.meta.requires_grad and not flow.is_parameter and self._place(flow.producer[0]) < first
            and any(self._place(use) > last for use, _ in flow.consumers)
        ])  # fmt: skip

    def _held_by_caller(self, decision: Decision) -> tuple[Terms, float]:
        """Gradients of the region's results, which backward of its first units needs no more."""
        if not self.problem.costs.fused or decision.region is None:
            return [], 0.0
        return self._sum([
            flow
            for _, flow in self.flows
            if flow.meta.requires_grad and self._region(flow.producer[0]) == decision.region
            and self._place(flow.producer[0]) > decision.place
            and any(self._region(use) != decision.region for use, _ in flow.consumers)
        ])  # fmt: skip

    def _waiting_for(self, decision: Decision, index: int) -> tuple[Terms, float]:
        """h_i: of units that make the gradient of a weight from this unit's output, the gradients of their outputs."""
        if not decision.fused:
            return [], 0.0
        readers = {
            use
            for _, flow in self.flows
            if flow.producer[0] == index
            for use in self._beside(index, flow) & self.weighted
        }
        return self._sum([
            flow
            for _, flow in self.flows
            if flow.producer[0] in readers
            and all(use in self.units and self.units[use].region == decision.region and self.units[use].reads
                    for use, _ in flow.consumers)
        ])  # fmt: skip

    def _made_again(self, level: Level, of: Callable[[Decision], bool]) -> tuple[Terms, float]:
        """What backward needs and a level does not keep, of what certain units make, or gather as their weights."""
        terms: Terms = []
        most = 0.0
        for index, flow in self.flows:
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
                alone = inside is None or not inside.stretch.makes_again(level)
                if alone and producer.kind == "unit" and of(producer):
                    part, largest = self.working.size(flow)
                    terms += part
                    most += largest
        for index, decision in self.units.items():
            if level not in decision.inner_kept_at and of(decision):
                inner = [(x, option.inner_bytes) for x, option in zip(self.working.choices.x[index], decision.options)]
                terms += [(x, size) for x, size in inner if size]
                most += max(size for _, size in inner)
        for held in self.pieces.held:
            decisions = held.stretch.decisions if held.stretch.block == self.block else ()
            if held.stretch.makes_again(level) and any(of(self.units[index]) for index in decisions):
                terms.append((held.made, 1.0))
                most += held.most
        return terms, most
