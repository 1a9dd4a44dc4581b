"""What is computed in pieces, as a part of the planning problem's program (see `nnscaler.planner.program`).

Sets      r a stretch of units of block b that can be computed in pieces (see `nnscaler.pieces`); k a number of pieces
          Levels with `in_pieces` keep only the inputs of a stretch: these alone allow pieces. A stretch r that holds a
          registered operator has another one q within, which may be in pieces too; only levels that keep nothing but a
          call's inputs allow it.
Data      N_b, t_do, x_do, z_dol, y_fps, b_fs   as there
          w_do      bytes that d holds while it runs whole;  g_do those, of these, that a piece uses whole
          R_dlk     how often d runs at level l in k pieces, less how often it runs at l when not in pieces: k times as
                    often where d is not divided, but made whole by each piece (and so its backward)
          p_dok     seconds of one call for launching pieces, joining them, and adding up weights' gradients
Variables c_rk in {0,1}  r is computed in k pieces
          A_r >= 0  seconds that pieces take
          M_r >= 0  bytes of what is made inside one call of r and needed by its backward
          P_r, Q_r >= 0  bytes held while a piece runs: its own; gradients of the inputs and outputs of the stretch

minimise      sum_r A_r, beside the rest
subject to    sum_k c_rk <= 1;  sum_k c_rk + y_fps <= 1 for f inside r;  c_rk + x_do <= 1 if o does not divide  (whole)
              sum of n_bl over the other levels <= N_b (1 - sum_k c_rk)                                        (levels)
              A_r >= sum t_do R_dlk z_dol + N_b sum_d p_dok x_do, if c_rk = 1                                    (time)
              M_r >= sum of b_fs x_do of f inside r, and not inside q, if sum_k c_rk = 0;  a k-th of that, if
                     c_rk = 1                                                                                    (made)
              P_r >= g_do + (w_do - g_do) / k, if c_rk = 1;  Q_r likewise                                     (working)
M_r is a part of what is computed again, and P_r + Q_r takes the place of w_do in U (see `nnscaler.planner.working`).
What is both in r and in q counts in P_q, if q is in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import GRADIENT_BYTES
from nnscaler.planner.flows import Flows
from nnscaler.planner.problem import Divisible, Flow, Port
from nnscaler.planner.statement import Account, Quantity, Terms

COUNTS = (4, 16)  # of pieces, beside one


@dataclass(frozen=True)
class Held:
    """What a stretch holds.

    places      the first and the last of its units' places among the units of its block
    made, most  the variable M_r, and its largest value
    terms       the sum P_r + Q_r
    """

    stretch: Divisible
    places: tuple[int, int]
    made: int
    most: float
    terms: Terms


class Inside(NamedTuple):
    """A flow inside a stretch.

    gone  the part of it that is not there while a piece runs, as a sum
    """

    stretch: Divisible
    gone: Terms


class InPieces:
    """Adds the variables, rows and charges above to a program.

    counts   (block, name of a stretch) -> number of pieces -> the variable c
    inside   index of a flow that is both made and used inside a stretch, and needed -> how; of stretches within one
             another, the inner one counts
    working  index of a decision -> a sum that is at least 1 where it is in pieces
    held     what each stretch holds while it runs in pieces
    """

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows, self.problem, self.statement = choices, flows, choices.problem, choices.statement
        self.counts: dict[tuple[str, str], dict[int, int]] = {}
        self.inside: dict[int, Inside] = {}
        self.working: dict[int, Terms] = {}
        self.held: list[Held] = []
        self.stretches: dict[tuple[str, str], _Stretch] = {}
        for divisible in self.problem.divisible:  # those within others come first
            self.stretches[divisible.block, divisible.name] = _Stretch(self, divisible)


class _Stretch:
    def __init__(self, all_: InPieces, stretch: Divisible) -> None:
        self.all, self.stretch = all_, stretch
        self.choices, self.problem, self.statement = all_.choices, all_.problem, all_.statement
        flows = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.block == stretch.block]
        within = {index: {d for d, _ in flow.consumers} <= set(stretch.decisions) for index, flow in flows}
        self.inner = [i for i, flow in flows if flow.producer[0] in stretch.decisions and within[i]]
        self.given = [flow for i, flow in flows if flow.producer[0] in stretch.decisions and not within[i]]
        self.taken = [flow for _, flow in flows if flow.producer[0] not in stretch.decisions and self._uses(flow)]
        self.within = all_.stretches.get((stretch.block, stretch.within or ""))
        counts = {count: self.statement.choice() for count in COUNTS}
        self.counts = all_.counts[stretch.block, stretch.name] = counts
        self._whole()
        self._time()
        made, most = self._made()
        places = [self.problem.decisions[index].place for index in stretch.decisions]
        all_.held.append(Held(stretch, (min(places), max(places)), made, most, self._working()))

    def _uses(self, flow: Flow) -> list[Port]:
        return [use for use in flow.consumers if use[0] in self.stretch.decisions]

    def _any(self, amount: float = 1.0) -> Terms:
        """`amount`, if the run is in pieces."""
        return [(c, amount) for c in self.counts.values()]

    def _where(self, variable: int, count: int, terms: Terms, most: float) -> None:
        """States variable >= terms for the case that the stretch is in `count` pieces. `most`: the largest value of
        terms."""
        self.statement.above(variable, [*terms, (self.counts[count], most)], -most)

    def _bytes(self, use: Port, flow: Flow, side: str, times: float = 1.0) -> tuple[Terms, float]:
        """Bytes of a flow as a decision makes or uses it: a sum over the decision's options, and its largest value."""
        options = self.problem.decisions[use[0]].options
        sizes = [times * self.problem.costs.local_bytes(flow.meta, getattr(o, side)[use[1]]) for o in options]
        return list(zip(self.choices.x[use[0]], sizes)), max(sizes)

    def _sum(self, parts: list[tuple[Terms, float]]) -> tuple[Terms, float]:
        """The sum of several sums, and its largest value."""
        return [term for terms, _ in parts for term in terms], sum(most for _, most in parts)

    def _whole(self) -> None:
        """The rows (whole) and (levels)."""
        self.statement.row(self._any(), upper=1.0)
        for index in self.inner:
            for y in self.all.flows.resharded[index].values():
                self.statement.row([*self._any(), (y, 1.0)], upper=1.0)
        for decision, sizes in zip(self.stretch.decisions, self.stretch.sizes):
            for count, c in self.counts.items():
                for x, size in zip(self.choices.x[decision], sizes):
                    if size % count:
                        self.statement.row([(c, 1.0), (x, 1.0)], upper=1.0)
        calls = float(self.problem.calls[self.stretch.block])
        others = [(n, 1.0) for level, n in self.choices.n[self.stretch.block].items() if not self.stretch.allows(level)]
        self.statement.row([*others, *self._any(calls)], upper=calls)

    def _time(self) -> None:
        """The row (time)."""
        costs, calls = self.problem.costs, float(self.problem.calls[self.stretch.block])
        longer = self.statement.least(Quantity.SECONDS)
        self.statement.charge(
            Account.TIME, Key("again", self.stretch.block, self.stretch.name, "in pieces"), longer, 1.0
        )
        for count in COUNTS:
            again, most_again = self._again(count)
            moved, most = self._moved(count)
            each = calls / costs.hardware.memory_bandwidth
            launching = 3 * calls * (count - 1) * self._launches() * costs.hardware.launch
            terms = [*again, *((x, each * size) for x, size in moved), (self.counts[count], launching)]
            self._where(longer, count, terms, most_again + each * most + launching)

    def _moved(self, count: int) -> tuple[Terms, float]:
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
        return self._sum(parts)

    def _again(self, count: int) -> tuple[Terms, float]:
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

    def _launches(self) -> int:
        """Kernel launches of a piece."""
        decisions = [self.problem.decisions[index] for index in self.stretch.decisions]
        return sum(1 if self.problem.costs.fused else len(d.options[0].ways) for d in decisions if d.count)

    def _made(self) -> tuple[int, float]:
        """The variable M_r, and its largest value."""
        flows = self.problem.flows
        needed = [index for index in self.inner if flows[index].needed and index not in self.all.inside]
        gone = [(c, 1 - 1 / count) for count, c in self.counts.items()]
        for index in needed:
            divided = flows[index].tensor in self.stretch.dims
            self.all.inside[index] = Inside(self.stretch, gone if divided else [])
        kept = [flow for flow in self.taken if not flow.needed and not flow.is_parameter]
        more, most_more = self._sum([self._bytes(flow.producer, flow, "outputs") for flow in kept])

        def inside(count: int) -> tuple[Terms, float]:
            parts = [(flows[i], count if flows[i].tensor in self.stretch.dims else 1) for i in needed]
            return self._sum([self._bytes(flow.producer, flow, "outputs", 1 / pieces) for flow, pieces in parts])

        made = self.statement.least(Quantity.BYTES)
        terms, largest = inside(1)
        self.statement.above(made, [*terms, *self._any(-largest)])
        for count in COUNTS:
            terms, most = inside(count)
            self._where(made, count, [*terms, *more], most + most_more)
        return made, largest + most_more

    def _working(self) -> Terms:
        """The variables P_r and Q_r; their sum."""
        own, around = self.statement.least(Quantity.BYTES), self.statement.least(Quantity.BYTES)
        taken = [flow for flow in self.taken if flow.meta.requires_grad]
        parts = [self._bytes(flow.producer, flow, "outputs") for flow in self.given]
        for flow in taken:
            # What is whole gets a gradient of each piece, and their sum, mostly in fp32.
            times = 1.0 if flow.tensor in self.stretch.dims else 1 + GRADIENT_BYTES / flow.meta.dtype.itemsize
            times = 2.0 if flow.tensor in self.stretch.adds_up else times
            parts.append(self._bytes(self._uses(flow)[0], flow, "inputs", times))
        terms, most = self._sum(parts)
        for count in COUNTS:
            self._where(around, count, terms, most)
        for index in self.stretch.decisions:
            options = self.problem.decisions[index].options
            self.all.working.setdefault(index, []).extend(self._any())
            whole = self._whole_bytes(index)
            for count in COUNTS:
                held = [all_of + max(o.transient - all_of, 0.0) / count for o, all_of in zip(options, whole)]
                within = self.within._any(-max(held)) if self.within and index in self.within.stretch.decisions else []
                self._where(own, count, [*zip(self.choices.x[index], held), *within], max(held))
        return [(own, 1.0), (around, 1.0)]

    def _whole_bytes(self, index: int) -> list[float]:
        """For each option of a decision, bytes of the inputs and outputs that are not divided."""
        whole = [0.0] * len(self.problem.decisions[index].options)
        inner = [self.problem.flows[i] for i in self.inner]
        for flow in [*self.taken, *inner, *self.given]:
            if flow.tensor in self.stretch.dims:
                continue
            ports = [(use, "inputs") for use in flow.consumers if use[0] == index]
            ports += [(flow.producer, "outputs")] if flow.producer[0] == index else []
            for port, side in ports:
                sizes = (size for _, size in self._bytes(port, flow, side)[0])
                whole = [sum(pair) for pair in zip(whole, sizes)]
        return whole
