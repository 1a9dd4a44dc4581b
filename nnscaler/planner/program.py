"""The planning problem as a mixed-integer program.

Sets      d decision, o its option; f flow, p a layout its producer can give, c a consumer, s a layout c can need.
Data      n_d, n_f      how often a decision or flow occurs in a micro-batch
          t_do          seconds of an option: forward, once more where it is recomputed, and backward
          r_fps         seconds of resharding flow f from p to s, likewise
          m_do, w_do    bytes that an option holds all the time, and while it runs
          b_fs          bytes of flow f in layout s
          M             bytes of device memory
Variables x_do in {0, 1}   option o is chosen for d
          e_fcps >= 0      f is made in p and used by c in s
          y_fps  >= 0      f is resharded from p to s (for whichever consumers: once)
          k_fs   >= 0      f is kept for backward in layout s
          a_fs   >= 0      f is kept in s while its part is recomputed
          h_fp   >= 0      f, a view, is kept in the layout in which it is made: what it views is kept
          W, A   >= 0      most bytes that one operator, and one recomputed part, hold while they run

minimise      sum_d n_d t_do x_do + sum_f n_f r_fps y_fps                                             (time)
subject to    sum_o x_do = 1                                                                          (choice)
              sum_s e_fcps = sum of x over the producer's options that make f in p                    (making)
              sum_p e_fcps = sum of x over c's options that use f in s                                (using)
              y_fps >= e_fcps                                              for p != s                 (resharding)
              k_fs >= sum_p e_fcps                                         for c that saves f         (keeping)
              k_fp >= sum of x over the producer's options that make f in p    if f itself is saved
              for a view f of g, made in p from g's layout q(p): the two right-hand sides bound h_fp for
              e_fcpp, k_fs for e_fcps with p != s, and k_gq(p) >= h_fp
              a_fs likewise from the consumers that save f while their part is recomputed
              W >= sum_o w_do x_do                                                                    (working)
              A >= sum_f b_fs a_fs                                         for each block
              sum_d n_d m_do x_do + sum_f n_f b_fs k_fs + W + A <= M                                  (memory)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from nnscaler.placement import Placements
from nnscaler.planner.costs import Seconds
from nnscaler.planner.milp import MixedIntegerProgram
from nnscaler.planner.problem import Decision, Flow, Problem, Use
from nnscaler.reshard import reshard_steps, without_gradient

Terms = list[tuple[int, float]]


@dataclass
class Solution:
    """Index of the chosen option of each decision."""

    chosen: list[int]


def solve(problem: Problem, memory: float, gap: float = 1e-4) -> Solution | None:
    """The choice of least time within `memory` bytes a device; None where nothing fits."""
    program = Program(problem)
    program.build(memory)
    values = program.milp.solve(gap)
    if values is None:
        return None
    return program.solution(values)


def least_memory(problem: Problem) -> Solution:
    """The choice that takes least memory, whatever its time."""
    program = Program(problem)
    program.build(None)
    values = program.milp.solve(gap=1e-2)
    assert values is not None, "without a limit there is always a plan"
    return program.solution(values)


def decision_seconds(decision: Decision, seconds: Seconds) -> float:
    """t_do: seconds of an option in one place."""
    return seconds.forward * (2 if decision.recomputed else 1) + seconds.backward


def flow_seconds(problem: Problem, flow: Flow, source: Placements, target: Placements) -> float | None:
    """r_fps: seconds of one resharding; None where it is impossible."""
    steps = reshard_steps(source, target)
    if steps is None:
        return None
    seconds = problem.costs.steps(flow.meta, source, steps)
    return seconds.forward * (2 if flow.recomputed else 1) + seconds.backward


def storage(layout: Placements) -> Placements:
    """The layout as far as memory goes: whose gradient is whole does not matter."""
    return without_gradient(layout)


@dataclass
class Program:
    """Builds the program of a problem; `x[d][o]` are the variables of the choices."""

    problem: Problem
    milp: MixedIntegerProgram = field(default_factory=MixedIntegerProgram)
    x: list[list[int]] = field(default_factory=list)
    kept: dict[tuple[int, Placements], int] = field(default_factory=dict)
    again: dict[tuple[int, Placements], int] = field(default_factory=dict)
    memory_terms: Terms = field(default_factory=list)
    again_terms: dict[str, Terms] = field(default_factory=lambda: defaultdict(list))
    second: float = 1.0  # what counts as one in the objective, and in the memory row: HiGHS's tolerances are absolute
    byte: float = 1.0

    def build(self, memory: float | None) -> None:
        """States the program for a limit of memory; without one, memory is what is minimised."""
        decisions = self.problem.decisions
        fastest = sum(min(d.count * decision_seconds(d, option.seconds) for option in d.options) for d in decisions)
        largest = sum(max(d.count * (option.memory + option.transient) for option in d.options) for d in decisions)
        self.second = fastest / 1000 or 1.0
        self.byte = (largest if memory is None else memory) / 1000 or 1.0
        for decision in self.problem.decisions:
            self._choice(decision)
        for index in reversed(range(len(self.problem.flows))):  # a view before what it views
            self._flow(index)
        self._memory(memory)

    def _choice(self, decision: Decision) -> None:
        """time, choice"""
        xs = [
            self.milp.variable(decision.count * decision_seconds(decision, option.seconds) / self.second, integer=True)
            for option in decision.options
        ]
        self.milp.row([(x, 1.0) for x in xs], 1.0, 1.0)
        self.x.append(xs)

    def _layouts(self, use: Use, side: str) -> dict[Placements, Terms]:
        """Layout -> the options of a decision that make (side `outputs`) or use (`inputs`) a tensor in it."""
        decision, index = use
        found: dict[Placements, Terms] = {}
        for option, x in zip(self.problem.decisions[decision].options, self.x[decision]):
            found.setdefault(getattr(option, side)[index], []).append((x, 1.0))
        return found

    def _flow(self, index: int) -> None:
        """making, using, resharding, keeping"""
        flow = self.problem.flows[index]
        made = self._layouts(flow.producer, "outputs")
        resharded: dict[tuple[Placements, Placements], int] = {}
        for consumer in flow.consumers:
            used = self._layouts(consumer, "inputs")
            pairs = self._pairs(flow, made, used)
            for (source, target), e in pairs.items():
                if source == target:
                    continue
                if (source, target) not in resharded:
                    seconds = flow_seconds(self.problem, flow, source, target) or 0.0
                    resharded[source, target] = self.milp.variable(flow.count * seconds / self.second)
                self.milp.row([(resharded[source, target], 1.0), (e, -1.0)], 0.0)
            if consumer in flow.saved_by:
                self._keep(index, pairs, self.kept)
            if consumer in flow.again_by:
                self._keep(index, pairs, self.again)
        if flow.saved:
            for layout, xs in made.items():
                self._keep_made(index, layout, xs, self.kept)

    def _pairs(
        self, flow: Flow, made: dict[Placements, Terms], used: dict[Placements, Terms]
    ) -> dict[tuple[Placements, Placements], int]:
        pairs = {
            (source, target): self.milp.variable()
            for source in made
            for target in used
            if source == target or flow_seconds(self.problem, flow, source, target) is not None
        }
        for source, xs in made.items():
            self.milp.row([(e, 1.0) for (p, _), e in pairs.items() if p == source] + _minus(xs), 0.0, 0.0)
        for target, xs in used.items():
            self.milp.row([(e, 1.0) for (_, s), e in pairs.items() if s == target] + _minus(xs), 0.0, 0.0)
        return pairs

    def _keep(
        self, index: int, pairs: dict[tuple[Placements, Placements], int], kept: dict[tuple[int, Placements], int]
    ) -> None:
        """keeping, for one consumer that saves the flow in the layout it uses"""
        flow = self.problem.flows[index]
        resharded: dict[Placements, Terms] = defaultdict(list)
        for (source, target), e in pairs.items():
            if storage(source) == storage(target) and (flow.held or flow.view_of is not None):
                self._keep_made(index, source, [(e, 1.0)], kept)
            else:
                resharded[storage(target)].append((e, 1.0))
        for layout, terms in resharded.items():
            self.milp.row([(self._kept(index, layout, kept), 1.0), *_minus(terms)], 0.0)

    def _keep_made(self, index: int, layout: Placements, terms: Terms, kept: dict[tuple[int, Placements], int]) -> None:
        """keeping the layout in which a flow is made: of a view, what it views; of a parameter, nothing more"""
        flow = self.problem.flows[index]
        while flow.view_of is not None:
            layout, index = self._viewed(flow, layout), flow.view_of
            flow = self.problem.flows[index]
        if not flow.held:
            self.milp.row([(self._kept(index, storage(layout), kept), 1.0), *_minus(terms)], 0.0)

    def _viewed(self, flow: Flow, layout: Placements) -> Placements:
        """q(p): the layout of what is viewed when the view lies in `layout`."""
        decision, output = flow.producer
        for option in self.problem.decisions[decision].options:
            if option.outputs[output] == layout:
                return option.inputs[0]
        raise AssertionError("a layout that no option makes")

    def _kept(self, index: int, layout: Placements, kept: dict[tuple[int, Placements], int]) -> int:
        """The variable k_fs or a_fs."""
        if (index, layout) not in kept:
            flow = self.problem.flows[index]
            variable = self.milp.variable()
            size = self.problem.costs.local_bytes(flow.meta, layout) / self.byte
            if kept is self.kept:
                self.memory_terms.append((variable, flow.count * size))
            else:
                self.again_terms[flow.block].append((variable, size))
            kept[index, layout] = variable
        return kept[index, layout]

    def solution(self, values: np.ndarray) -> Solution:
        return Solution([max(range(len(xs)), key=lambda option: values[xs[option]]) for xs in self.x])

    def _memory(self, memory: float | None) -> None:
        """working, memory"""
        working, again = self.milp.variable(bound=1e9), self.milp.variable(bound=1e9)
        for decision, xs in zip(self.problem.decisions, self.x):
            transient = [
                (x, -option.transient / self.byte) for x, option in zip(xs, decision.options) if option.transient
            ]
            if transient:
                self.milp.row([(working, 1.0), *transient], 0.0)
            self.memory_terms += [
                (x, decision.count * option.memory / self.byte)
                for x, option in zip(xs, decision.options)
                if option.memory
            ]
        for terms in self.again_terms.values():
            self.milp.row([(again, 1.0), *_minus(terms)], 0.0)
        total = [*self.memory_terms, (working, 1.0), (again, 1.0)]
        if memory is not None:
            self.milp.row(total, upper=memory / self.byte)
            return
        self.milp.cost = [0.0] * len(self.milp.cost)
        for variable, size in total:
            self.milp.cost[variable] += size


def _minus(terms: Terms) -> Terms:
    return [(variable, -value) for variable, value in terms]
