"""What is computed in pieces, as a part of the planning problem's program (see `nnscaler.planner.program`).

Sets      r a stretch of units of block b that can be computed in pieces (see `nnscaler.pieces`); k a number of pieces
          Levels with `in_pieces` keep only the inputs of a stretch: these alone allow pieces. A stretch r that holds a
          registered operator has another one q within, which may be in pieces too; only levels that keep nothing but a
          call's inputs allow it.
Data      N_b, t_do, x_do, z_dol, y_fps, b_fs, i_do   as there
          R_dlk     how often d runs at level l in k pieces, less how often it runs at l when not in pieces: k times as
                    often where d is not divided, but made whole by each piece (and so its backward)
          p_dok     seconds of one call for launching pieces, joining them, and adding up weights' gradients
          v_fpsk    seconds of resharding f inside r in k pieces, less those when not in pieces: k times a k-th part,
                    each forward as often as what is divided runs, and once backward
Variables c_rk in {0,1}  r is computed in k pieces;  a_r in {0,1}: it, or what it is within, is in pieces at all
          A_r >= 0  seconds that pieces take
          I_r >= 0  bytes by which r makes longer what a call holds that is computed again

minimise      sum_r A_r, beside the rest
subject to    sum_k c_rk <= 1;  c_rk + x_do <= 1 if o does not divide                                          (whole)
              c_rk + y_fps <= 1 for f inside r, unless only r's registered operator uses f, p is no partial sum, and k
                     divides blocks of which both p and s give each device some (see `nnscaler.pieces`)         (blocks)
              a_q >= sum_k c_qk and a_q >= sum_k c_rk, if q is within r;  a_q is not more than both together
              sum of n_bl over the other levels <= N_b (1 - sum_k c_rk)                                        (levels)
              A_r >= sum t_do R_dlk z_dol + N_b sum_d p_dok x_do + N_b sum_fps v_fpsk y_fps, if c_rk = 1         (time)
              I_r >= sum of b_fs x_do of what backward needs of f inside r, and not inside q, as it is used where it is
                     resharded for that and then more, and sum of i_do x_do, if a_r = 0;  and of what r takes and nobody
                     else keeps, if r is in pieces, and what it is within is not                            (computed)
What is held while a piece runs stands in `nnscaler.planner.piecewise`.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from nnscaler.placement import PARTIAL, Placements, shards
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import GRADIENT_BYTES, NO_TIME
from nnscaler.planner.flows import Flows, resharding
from nnscaler.planner.held import Sum, total
from nnscaler.planner.problem import Divisible, Flow, Port
from nnscaler.planner.statement import Account, Quantity, Terms, minus

COUNTS = (2, 4, 16)  # of pieces, beside one


def counts_of(stretch: Divisible) -> list[int]:
    """The numbers of pieces that are tried: those for which each unit has an option.

    Two are enough only for a registered operator, which may have few heads.
    """
    few = COUNTS if stretch.within else COUNTS[1:]
    return [count for count in few if all(any(not size % count for size in sizes) for sizes in stretch.sizes)]


class InPieces:
    """Adds the variables, rows and charges above to a program.

    counts     (block, name of a stretch) -> number of pieces -> the variable c
    inside     index of a flow that is both made and used inside a stretch, and needed -> the stretch; of stretches
               within one another, the inner one
    stretches  (block, name) -> stretch, of all that may be in pieces; those within others come first
    """

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows, self.problem, self.statement = choices, flows, choices.problem, choices.statement
        self.counts: dict[tuple[str, str], dict[int, int]] = {}
        self.inside: dict[int, InStretch] = {}
        self.stretches: dict[tuple[str, str], InStretch] = {}
        for divisible in self.problem.divisible:
            self.stretches[divisible.block, divisible.name] = InStretch(self, divisible)
        for stretch in self.stretches.values():
            stretch.hold()

    def of(self, index: int) -> Terms:
        """A sum that is at least 1 where a decision is in pieces, and else 0."""
        return [term for one in self.stretches.values() if index in one.stretch.decisions for term in one.any()]


class InStretch:
    """One stretch.

    own     its decisions that are not in the stretch within it
    inner   indices of flows that are made and used in it
    given   flows that it makes for others;  taken: that it takes from others
    within  the stretch within it;  around: that which it is within
    in_any  the sum a_r
    again   the variable I_r;  most: its largest value
    """

    around: InStretch | None = None

    def __init__(self, all_: InPieces, stretch: Divisible) -> None:
        self.all, self.stretch = all_, stretch
        self.choices, self.problem, self.statement = all_.choices, all_.problem, all_.statement
        flows = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.block == stretch.block]
        within = {index: {d for d, _ in flow.consumers} <= set(stretch.decisions) for index, flow in flows}
        self.inner = [i for i, flow in flows if flow.producer[0] in stretch.decisions and within[i]]
        self.given = [flow for i, flow in flows if flow.producer[0] in stretch.decisions and not within[i]]
        self.taken = [flow for _, flow in flows if flow.producer[0] not in stretch.decisions and self._uses(flow)]
        self.within = all_.stretches.get((stretch.block, stretch.within or ""))
        self.own = [one for one in stretch.decisions if not self.within or one not in self.within.stretch.decisions]
        if self.within:
            self.within.around = self
        self.counts = {count: self.statement.choice() for count in counts_of(stretch)}
        all_.counts[stretch.block, stretch.name] = self.counts
        self._whole()
        self._time()

    def _uses(self, flow: Flow) -> list[Port]:
        return [use for use in flow.consumers if use[0] in self.stretch.decisions]

    def any(self, amount: float = 1.0) -> Terms:
        """`amount`, if the stretch is in pieces."""
        return [(c, amount) for c in self.counts.values()]

    def _where(self, variable: int, count: int, terms: Terms, most: float) -> None:
        """States variable >= terms for the case that the stretch is in `count` pieces. `most`: the largest value of
        terms."""
        self.statement.above(variable, [*terms, (self.counts[count], most)], -most)

    def _bytes(self, use: Port, flow: Flow, side: str, times: float = 1.0) -> Sum:
        """Bytes of a flow as a decision makes or uses it: a sum over the decision's options, and its largest value."""
        options = self.problem.decisions[use[0]].options
        sizes = [times * self.problem.costs.local_bytes(flow.meta, getattr(o, side)[use[1]]) for o in options]
        return list(zip(self.choices.x[use[0]], sizes)), max(sizes)

    def _inner_bytes(self, index: int) -> Sum:
        sizes = [option.inner_bytes for option in self.problem.decisions[index].options]
        return list(zip(self.choices.x[index], sizes)), max(sizes)

    def _whole(self) -> None:
        """The rows (whole), (blocks) and (levels)."""
        self.statement.row(self.any(), upper=1.0)
        for index in self.inner:
            for (source, target), y in self.all.flows.resharded[index].items():
                counts = [count for count in self.counts if self._moves(index, source, target, count)]
                others = [(c, 1.0) for count, c in self.counts.items() if count not in counts]
                self.statement.row([*others, (y, 1.0)], upper=1.0)
        for decision, sizes in zip(self.stretch.decisions, self.stretch.sizes):
            for count, c in self.counts.items():
                for x, size in zip(self.choices.x[decision], sizes):
                    if size % count:
                        self.statement.row([(c, 1.0), (x, 1.0)], upper=1.0)
        calls = float(self.problem.calls[self.stretch.block])
        others = [(n, 1.0) for level, n in self.choices.n[self.stretch.block].items() if not self.stretch.allows(level)]
        self.statement.row([*others, *self.any(calls)], upper=calls)

    def _moves(self, index: int, source: Placements, target: Placements, count: int) -> bool:
        """Whether a flow inside may be resharded when the stretch is in `count` pieces: see (blocks)."""
        flow, sizes = self.problem.flows[index], self.problem.costs.mesh.sizes
        if self.within is None or PARTIAL in source or not {use for use, _ in flow.consumers} <= set(self.own):
            return False
        dim = self.stretch.dims.get(flow.tensor)
        blocks = 1 if dim is None else lcm(shards(source, dim, sizes), shards(target, dim, sizes))
        return self.stretch.whole % (blocks * count) == 0

    def _time(self) -> None:
        """The row (time)."""
        costs, calls = self.problem.costs, float(self.problem.calls[self.stretch.block])
        longer = self.statement.least(Quantity.SECONDS)
        self.statement.charge(
            Account.TIME, Key("again", self.stretch.block, self.stretch.name, "in pieces"), longer, 1.0
        )
        for count in self.counts:
            again, most_again = total([self._again(count), self._resharded(count)])
            moved, most = self._moved(count)
            each = calls / costs.hardware.memory_bandwidth
            launching = 3 * calls * (count - 1) * self._launches() * costs.hardware.launch
            terms = [*again, *((x, each * size) for x, size in moved), (self.counts[count], launching)]
            self._where(longer, count, terms, most_again + each * most + launching)

    def _moved(self, count: int) -> Sum:
        """Bytes that are read and written to join pieces, and to add up their gradients, in one call."""
        parts = [
            self._bytes(flow.producer, flow, "outputs", 2 if self.stretch.ends_block else 4) for flow in self.given
        ]
        for flow in self.taken:
            if flow.meta.requires_grad:
                in_fp32 = 1 + (2 * count - 1) * GRADIENT_BYTES / flow.meta.dtype.itemsize
                times = 2 if flow.tensor in self.stretch.dims else in_fp32
                times = 3 * count - 1 if flow.tensor in self.stretch.adds_up else times
                parts.append(self._bytes(self._uses(flow)[0], flow, "inputs", times))
        return total(parts)

    def _again(self, count: int) -> Sum:
        """Seconds in which pieces run units more often than the level does, and the most of them."""
        terms: Terms = []
        most = 0.0
        for index, sizes in zip(self.stretch.decisions, self.stretch.sizes):
            decision = self.problem.decisions[index]
            pieces = 1 if any(sizes) else count  # that all run what is not divided
            for level in self.choices.n[self.stretch.block] if decision.count else ():
                # Each piece is for its gradients; the whole, if its results are computed again for what comes after.
                wrapped = level.of_each.call is not None and not self.stretch.ends_block
                more = pieces * (2 + wrapped) - 1 - decision.runs_again[level.of_each]
                if self.stretch.allows(level) and more:
                    seconds = [
                        more * option.seconds.forward + (pieces - 1) * option.seconds.backward
                        for option in decision.options
                    ]
                    terms += zip(self.choices.z[index, level], seconds)
                    most += self.problem.calls[self.stretch.block] * max(seconds)
        return terms, most

    def _resharded(self, count: int) -> Sum:
        """Seconds by which pieces reshard flows inside more often than the level does, each of them less, and the most
        of them."""
        parts: list[Sum] = []
        levels = [level.of_each for level in self.choices.n[self.stretch.block] if self.stretch.allows(level)]
        runs = 2 + (not self.stretch.ends_block)  # as those of units that are divided: see `_again`
        for index in self.inner:
            flow, terms, most = self.problem.flows[index], [], 0.0
            # Without pieces, at any of the levels that allow them.
            before = 1 + min((flow.reshards_again[level] for level in levels), default=0.0)
            for (source, target), y in self.all.flows.resharded[index].items():
                if self._moves(index, source, target, count):
                    whole = resharding(self.problem, flow, source, target) or NO_TIME
                    piece = resharding(self.problem, self._piece(flow, count), source, target) or NO_TIME
                    forward = runs * count * piece.forward - before * whole.forward
                    terms.append((y, flow.count * (forward + count * piece.backward - whole.backward)))
                    most = max(most, terms[-1][1])
            parts.append((terms, most))
        return total(parts)

    def _piece(self, flow: Flow, count: int) -> Flow:
        shape, dim = list(flow.meta.shape), self.stretch.dims.get(flow.tensor)
        if dim is not None:
            shape[dim] //= count
        return replace(flow, meta=replace(flow.meta, shape=tuple(shape)))

    def _launches(self) -> int:
        """Kernel launches of a piece."""
        decisions = [self.problem.decisions[index] for index in self.stretch.decisions]
        return sum(1 if self.problem.costs.fused else len(d.options[0].ways) for d in decisions if d.count)

    def hold(self) -> None:
        """The rows (computed). To be called as soon as all stretches are there."""
        self.in_any = self.any()
        if self.around:
            either = self.statement.least(bound=1.0)
            for one in (self, self.around):
                self.statement.above(either, one.any())
            self.statement.row([(either, 1.0), *minus([*self.any(), *self.around.any()])], upper=0.0)
            self.in_any = [(either, 1.0)]
        flows = self.problem.flows
        needed = [index for index in self.inner if flows[index].needed and index not in self.all.inside]
        self.all.inside.update(dict.fromkeys(needed, self))
        kept = [flow for flow in self.taken if not flow.needed and not flow.is_parameter]
        self.again = self.statement.least(Quantity.BYTES)
        parts = [self._bytes(flows[index].producer, flows[index], "outputs") for index in needed]
        parts += [self.all.flows.more_as_used(index) for index in needed if self.within]
        parts += [self._inner_bytes(index) for index in self.own]
        terms, made = total(parts)
        self.statement.above(self.again, [*terms, *((a, -made * share) for a, share in self.in_any)])
        terms, more = total([self._bytes(flow.producer, flow, "outputs") for flow in kept])
        outer = self.around.any(-more) if self.around else []
        self.statement.above(self.again, [*terms, *self.any(more), *outer], -more)
        self.most = max(made, more)
