"""What is computed in pieces, as a part of the planning problem's program (see `nnscaler.planner.program`).

Sets      r a stretch of units of block b that can be computed in pieces (see `nnscaler.pieces`); k a number of pieces
          Levels with `in_pieces` keep only the inputs of a stretch: these alone allow pieces.
Data      N_b, t_do, x_do, z_dol, y_fps, b_fs, w_do   as there;  g_do the bytes, of w_do, that a piece uses whole
          R_dl      how often d runs at level l in pieces, less how often it runs at l when not in pieces
          p_dok     seconds of one call for launching pieces, joining them, and adding up weights' gradients
Variables c_rk in {0,1}  r is computed in k pieces
          A_r >= 0  seconds that pieces take
          M_r >= 0  bytes of what is made inside one call of r and needed by its backward
          P_r, Q_r >= 0  bytes held while a piece runs: its own; gradients of the inputs and outputs of the stretch

minimise      sum_r A_r, beside the rest
subject to    sum_k c_rk <= 1;  sum_k c_rk + y_fps <= 1 for f inside r;  c_rk + x_do <= 1 if o does not divide  (whole)
              sum of n_bl over the other levels <= N_b (1 - sum_k c_rk)                                        (levels)
              A_r >= sum t_do R_dl z_dol + N_b sum_d p_dok x_do, if c_rk = 1                                     (time)
              M_r >= sum of b_fs x_do of f inside r, if sum_k c_rk = 0;  a k-th of that, if c_rk = 1             (made)
              P_r >= g_do + (w_do - g_do) / k, if c_rk = 1;  Q_r likewise                                     (working)
M_r is a part of what is computed again, and P_r + Q_r takes the place of w_do in U (see `nnscaler.planner.working`).
"""

from __future__ import annotations

from dataclasses import dataclass

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

    name               of the stretch
    decisions, places  those of its units, and the first and the last of their places among the units of its block
    made, most         the variable M_r, and its largest value
    terms              the sum P_r + Q_r
    """

    block: str
    name: str
    decisions: tuple[int, ...]
    places: tuple[int, int]
    made: int
    most: float
    terms: Terms


class InPieces:
    """Adds the variables, rows and charges above to a program.

    counts   (block, name of a stretch) -> number of pieces -> the variable c
    inside   index of a flow that is both made and used inside a stretch, and needed -> the part of it that is not
             there while a piece runs, as a sum
    working  index of a decision -> a sum that is 1 where it is in pieces
    held     what each stretch holds while it runs in pieces
    """

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows, self.problem, self.statement = choices, flows, choices.problem, choices.statement
        self.counts: dict[tuple[str, str], dict[int, int]] = {}
        self.inside: dict[int, Terms] = {}
        self.working: dict[int, Terms] = {}
        self.held: list[Held] = []
        for divisible in self.problem.divisible:
            _Stretch(self, divisible)


class _Stretch:
    def __init__(self, all_: InPieces, stretch: Divisible) -> None:
        self.all, self.stretch = all_, stretch
        self.choices, self.problem, self.statement = all_.choices, all_.problem, all_.statement
        flows = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.block == stretch.block]
        within = {index: {d for d, _ in flow.consumers} <= set(stretch.decisions) for index, flow in flows}
        self.inner = [i for i, flow in flows if flow.producer[0] in stretch.decisions and within[i]]
        self.given = [flow for i, flow in flows if flow.producer[0] in stretch.decisions and not within[i]]
        self.taken = [flow for _, flow in flows if flow.producer[0] not in stretch.decisions and self._uses(flow)]
        counts = {count: self.statement.choice() for count in COUNTS}
        self.counts = all_.counts[stretch.block, stretch.name] = counts
        self._whole()
        self._time()
        made, most = self._made()
        places = [self.problem.decisions[index].place for index in stretch.decisions]
        held = self._working()
        all_.held.append(
            Held(stretch.block, stretch.name, stretch.decisions, (min(places), max(places)), made, most, held)
        )

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
        others = [(n, 1.0) for level, n in self.choices.n[self.stretch.block].items() if not level.in_pieces]
        self.statement.row([*others, *self._any(calls)], upper=calls)

    def _time(self) -> None:
        """The row (time)."""
        costs, calls = self.problem.costs, float(self.problem.calls[self.stretch.block])
        again, most_again, launches = self._again()
        results = [
            self._bytes(flow.producer, flow, "outputs", 2 if self.stretch.ends_block else 4) for flow in self.given
        ]
        taken = [flow for flow in self.taken if flow.meta.requires_grad]
        gradients = [self._bytes(self._uses(f)[0], f, "inputs", 2) for f in taken if f.tensor in self.stretch.dims]
        longer = self.statement.least(Quantity.SECONDS)
        self.statement.charge(
            Account.TIME, Key("again", self.stretch.block, self.stretch.name, "in pieces"), longer, 1.0
        )
        for count in COUNTS:
            added = [
                self._bytes(self._uses(f)[0], f, "inputs", 1 + (2 * count - 1) * GRADIENT_BYTES / f.meta.dtype.itemsize)
                for f in taken
                if f.tensor not in self.stretch.dims
            ]
            moved, most = self._sum([*results, *gradients, *added])
            each = calls / costs.hardware.memory_bandwidth
            launching = 3 * calls * (count - 1) * launches * costs.hardware.launch
            terms = [*again, *((x, each * size) for x, size in moved), (self.counts[count], launching)]
            self._where(longer, count, terms, most_again + each * most + launching)

    def _again(self) -> tuple[Terms, float, int]:
        """(seconds in which pieces run units more often than the level does, the most of them, kernel launches a
        piece)."""
        terms: Terms = []
        most, launches = 0.0, 0
        for index in self.stretch.decisions:
            decision = self.problem.decisions[index]
            if not decision.count:
                continue
            launches += 1 if self.problem.costs.fused else len(decision.options[0].ways)
            for level in self.choices.n[self.stretch.block]:
                # Each piece is for its gradients; the whole, if its results are computed again for what comes after.
                wrapped = level.of_each.call is not None and not self.stretch.ends_block
                more = 1 + wrapped - decision.runs_again[level.of_each]
                if level.in_pieces and more:
                    seconds = [more * option.seconds.forward for option in decision.options]
                    terms += zip(self.choices.z[index, level], seconds)
                    most += self.problem.calls[self.stretch.block] * max(seconds)
        return terms, most, launches

    def _made(self) -> tuple[int, float]:
        """The variable M_r, and its largest value."""
        flows = self.problem.flows
        needed = [index for index in self.inner if flows[index].needed]
        self.all.inside.update((index, [(c, 1 - 1 / count) for count, c in self.counts.items()]) for index in needed)
        terms, most = self._sum([self._bytes(flows[i].producer, flows[i], "outputs") for i in needed])
        kept = [flow for flow in self.taken if not flow.needed and not flow.is_parameter]
        more, most_more = self._sum([self._bytes(flow.producer, flow, "outputs") for flow in kept])
        made = self.statement.least(Quantity.BYTES)
        self.statement.above(made, [*terms, *self._any(-most)])
        for count in COUNTS:
            self._where(made, count, [*((x, size / count) for x, size in terms), *more], most / count + most_more)
        return made, most + most_more

    def _working(self) -> Terms:
        """The variables P_r and Q_r; their sum."""
        own, around = self.statement.least(Quantity.BYTES), self.statement.least(Quantity.BYTES)
        taken = [flow for flow in self.taken if flow.meta.requires_grad]
        parts = [self._bytes(flow.producer, flow, "outputs") for flow in self.given]
        for flow in taken:
            # What is whole gets a gradient of each piece, and their sum in fp32.
            times = 1.0 if flow.tensor in self.stretch.dims else 1 + GRADIENT_BYTES / flow.meta.dtype.itemsize
            parts.append(self._bytes(self._uses(flow)[0], flow, "inputs", times))
        terms, most = self._sum(parts)
        for count in COUNTS:
            self._where(around, count, terms, most)
        for index in self.stretch.decisions:
            decision = self.problem.decisions[index]
            self.all.working[index] = self._any()
            whole = [0.0] * len(decision.options)
            for flow in self.taken:
                for use in self._uses(flow):
                    if use[0] == index and flow.tensor not in self.stretch.dims:
                        sizes = [size for _, size in self._bytes(use, flow, "inputs")[0]]
                        whole = [sum(pair) for pair in zip(whole, sizes)]
            for count in COUNTS:
                held = [all_of + max(o.transient - all_of, 0.0) / count for o, all_of in zip(decision.options, whole)]
                self._where(own, count, list(zip(self.choices.x[index], held)), max(held))
        return [(own, 1.0), (around, 1.0)]
