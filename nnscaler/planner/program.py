"""The planning problem as a mixed-integer program.

Sets      d decision, o its option; b block, l recompute level; f flow, p a layout its producer can give, c a consumer,
          s a layout c can need
Data      n_d, n_f, N_b  how often a decision, a flow, a block occurs in a micro-batch
          h              seconds that computation loses for each second of exchange beside it
          t_do, t'_do    seconds of an option: forward, backward
          r_fps, r'_fps  seconds of resharding flow f from p to s: forward, backward
          q_do, u_do     seconds of a parameter's gradient exchange, which runs beside backward, and of its update
          l_do           seconds of such an exchange that is made in the last of a step's m micro-batches only
          c_do, C        bytes of buffers for exchanging a gradient in each micro-batch, and at most for all of them
          m_do, w_do     bytes that an option holds all the time, and while it runs
          i_do           bytes of inner tensors that an unfused cluster, or an operator that exchanges parts, keeps
          b_fs           bytes of flow f in layout s;  M bytes of device memory
          A           micro-batches whose activations are held at a time: 1 but for stages of a pipeline
          level l keeps f as made, as used by c, or as moved to c (see `levels`), and runs d, and resharding, again
Variables x_do in {0,1}  option o is chosen for d
          n_bl integer   calls of block b at level l
          z_dol >= 0     calls at level l in which d has option o
          e_fcps >= 0    f is made in p and used by c in s
          y_fps >= 0     f is resharded from p to s (for whichever consumers: once)
          Y_fpsl >= 0    calls at level l in which that is done again in backward
          k_fsl >= 0     calls at level l that keep f in layout s
          g_fps in {0,1} backward gathers f again, from p to s, rather than keep it
          E, L, F >= 0   seconds by which exchange beside backward, beside that of the last micro-batch, and beside
                         forward, makes them longer
          H >= 0         bytes of buffers for exchanging gradients in each micro-batch;  v in {0,1}: all of C
          G >= 0         whether weights are gathered, some (a bytes) before they are needed
          U >= 0         most bytes that one operator holds while it runs
          V_b >= 0       bytes that backward computes again of one call of b, where no call keeps them

minimise      sum_d n_d (t_do + t'_do) x_do + sum_f n_f (r_fps + r'_fps) y_fps + sum_d n_d u_do x_do + F          (time)
              + (1 - 1/m) E + L/m
              + sum over what is run again of t_do z_dol and r_fps n_f / N_b Y_fpsl;  without gathered weights
subject to    sum_o x_do = 1                                                                                    (choice)
              sum_l n_bl = N_b;  sum_o z_dol = n_bl;  sum_l z_dol = N_b x_do                                    (levels)
              sum_s e_fcps = sum of x over the producer's options that make f in p                              (making)
              sum_p e_fcps = sum of x over c's options that use f in s                                           (using)
              y_fps >= e_fcps                                                   for p != s                  (resharding)
              Y_fpsl >= n_bl - N_b (1 - y_fps)                                                                  (again)
              k_fsl >= sum of z_l over the producer's options that make f in s     if l keeps f as made       (keeping)
              k_fsl >= sum of z_l over c's options that use f in s, less N_b sum_p g_fps   if l keeps f as used by c,
                       and less that over the producer's options that make f in s          if as moved to c
              g_fps <= sum of x over the producer's options that make f in p, if all-gathers make s of it  (gathering)
              E >= h B, E >= B - (1 - h) sum_d n_d t'_do x_do, where B = sum_d n_d q_do x_do
                   + sum over gathered weights of n_f r'_fps y_fps, and what of r_fps is done again;  F likewise,
                   with B = sum over gathered weights of n_f r_fps y_fps, and t for t'; and L,
                   with B + sum_d n_d l_do x_do                                                                (hiding)
              G >= y_fps of gathered weights                                                                    (early)
              U >= sum_o w_do x_do                                                                            (working)
              H >= C v, H >= S - c v, S <= C + c v, where S = sum_d n_d c_do x_do, c its most                  (buffers)
              V_b >= B_b (1 - n_b,none), where B_b = sum_f b_fs x_do of what level `none` keeps of one call      (again)
              sum_d n_d m_do x_do + A (sum_f b_fs n_f / N_b k_fsl + sum_d i_do z_dol), where l keeps it,
                       + U + sum_b V_b + a G + H <= M                                                          (memory)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nnscaler.placement import Placements
from nnscaler.planner.costs import NO_TIME, Seconds
from nnscaler.planner.milp import INFINITY, MixedIntegerProgram
from nnscaler.planner.problem import Decision, Flow, Problem, Use
from nnscaler.reshard import brings_together, reshard_steps, without_gradient

Terms = list[tuple[int, float]]


@dataclass(frozen=True)
class Solution:
    """Index of the chosen option of each decision, how many calls of each block have which level, and indices of the
    flows that backward gathers again where all-gathers made them."""

    chosen: list[int]
    levels: dict[str, dict[str, int]]
    gathered_again: frozenset[int] = frozenset()


def solve(problem: Problem, memory: float, gap: float = 1e-4, below: float | None = None) -> Solution | None:
    """The choice of least time within `memory` bytes a device; None where nothing fits, or takes less than `below`
    seconds of a micro-batch."""
    program = Program(problem)
    program.build(memory)
    if below is not None:
        milp = program.milp
        milp.row([(v, cost) for v, cost in enumerate(milp.cost) if cost], upper=program._time(below))
    values = program.milp.solve(gap)
    return None if values is None else program.solution(values)


def relaxed(problems: Sequence[Problem], memory: float) -> list[tuple[float, float]] | None:
    """(seconds of a micro-batch, bytes) of each problem, where all together have `memory` bytes a device and a choice
    may be made in parts: no whole choices take less time in all. None where nothing fits."""
    programs = [Program(problem) for problem in problems]
    milp = MixedIntegerProgram()
    for program in programs:
        program.scale(memory)
    second, byte = max(program.second for program in programs), max(program.byte for program in programs)
    times: list[Terms] = []
    sizes: list[Terms] = []
    for program in programs:
        begin = len(milp.cost)
        program.milp, program.second, program.byte = milp, second, byte
        program.state()
        sizes.append(program.memory_total())
        times.append([(variable, milp.cost[variable]) for variable in range(begin, len(milp.cost))])
    milp.row([term for size in sizes for term in size], upper=memory / byte)
    values = milp.solve(gap=1e-4, relaxed=True)
    if values is None:
        return None

    def total(terms: Terms) -> float:
        return float(sum(values[variable] * value for variable, value in terms))

    return [(total(time) * second, total(size) * byte) for time, size in zip(times, sizes)]


def least_memory(problem: Problem) -> Solution:
    """The choice that takes least memory, whatever its time."""
    program = Program(problem)
    program.build(None)
    values = program.milp.solve(gap=1e-2)
    assert values is not None, "without a limit there is always a plan"
    return program.solution(values)


def resharding(problem: Problem, flow: Flow, source: Placements, target: Placements) -> Seconds | None:
    """Seconds of bringing a flow from one layout to another; None where that is impossible."""
    key = flow.meta, flow.held, source, target
    if key not in problem.resharding:
        problem.resharding[key] = _resharding(problem, flow, source, target)
    return problem.resharding[key]


def _resharding(problem: Problem, flow: Flow, source: Placements, target: Placements) -> Seconds | None:
    steps = reshard_steps(source, target)
    if steps is None:
        return None
    seconds = problem.costs.steps(flow.meta, source, steps)
    if not beside(flow, source, target):
        return seconds
    exact = replace(flow.meta, dtype=torch.promote_types(flow.meta.dtype, torch.float32))  # gradients are added in fp32
    return Seconds(seconds.forward, problem.costs.steps(exact, source, steps).backward)


def beside(flow: Flow, source: Placements, target: Placements) -> bool:
    """Whether a flow is brought from one layout to another beside computation: a weight that is gathered."""
    return flow.held and brings_together(reshard_steps(source, target))


def storage(layout: Placements) -> Placements:
    """The layout as far as memory goes: whose gradient is whole does not matter."""
    return without_gradient(layout)


@dataclass
class Program:
    """Builds the program of a problem; `x[d][o]` are the variables of the choices, `n[b][l]` those of the levels."""

    problem: Problem
    milp: MixedIntegerProgram = field(default_factory=MixedIntegerProgram)
    x: list[list[int]] = field(default_factory=list)
    n: dict[str, dict[str, int]] = field(default_factory=dict)
    z: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    kept: dict[tuple[int, Placements, str], int] = field(default_factory=dict)
    gathered: dict[tuple[int, Placements, Placements], int] = field(default_factory=dict)
    memory_terms: Terms = field(default_factory=list)
    beside: dict[str, Terms] = field(default_factory=dict)  # forward, backward -> seconds of gathers beside it
    second: float = 1.0  # what counts as one in the objective, and in the memory row: HiGHS's tolerances are absolute
    byte: float = 1.0

    def build(self, memory: float | None) -> None:
        """States the program for a limit of memory; without one, memory is what is minimised."""
        self.scale(memory)
        self.state()
        self._memory(memory)

    def scale(self, memory: float | None) -> None:
        """Chooses the measures of time and memory."""
        decisions = self.problem.decisions
        fastest = sum(d.count * min(o.seconds.forward + o.seconds.backward for o in d.options) for d in decisions)
        largest = sum(max(d.count * (option.memory + option.transient) for option in d.options) for d in decisions)
        self.second = fastest / 1000 or 1.0
        self.byte = (largest if memory is None else min(memory, 100 * largest)) / 1000 or 1.0

    def state(self) -> None:
        """Everything but the memory row."""
        self.beside = {"forward": [], "backward": []}
        for block, levels in self.problem.levels.items():
            if len(levels) > 1:
                self._levels(block)
        for index in range(len(self.problem.decisions)):
            self._choice(index)
        for index in range(len(self.problem.flows)):
            self._flow(index)
        self._hide()

    def solution(self, values: np.ndarray) -> Solution:
        """What the variables' values mean."""
        chosen = [max(range(len(xs)), key=lambda option: values[xs[option]]) for xs in self.x]
        levels = {block: {levels[0]: self.problem.calls[block]} for block, levels in self.problem.levels.items()}
        for block, counts in self.n.items():
            levels[block] = {level: round(values[n]) for level, n in counts.items() if round(values[n])}
        again = frozenset(index for (index, _, _), g in self.gathered.items() if values[g] > 0.5)
        return Solution(chosen, levels, again)

    def _time(self, seconds: float) -> float:
        return seconds / self.second

    def _levels(self, block: str) -> None:
        """levels, of a block"""
        calls = float(self.problem.calls[block])
        self.n[block] = {level: self.milp.variable(bound=calls, integer=True) for level in self.problem.levels[block]}
        self.milp.row([(n, 1.0) for n in self.n[block].values()], calls, calls)

    def _choice(self, index: int) -> None:
        """time, choice, and levels of a decision"""
        decision = self.problem.decisions[index]
        xs = [
            self.milp.variable(self._time(decision.count * self._seconds(decision, option.seconds)), integer=True)
            for option in decision.options
        ]
        self.milp.row([(x, 1.0) for x in xs], 1.0, 1.0)
        self.x.append(xs)
        if decision.block in self.n and decision.kind != "parameter":
            self._choice_by_level(index, decision, xs)
        elif decision.again:
            for x, option in zip(xs, decision.options):
                self.milp.cost[x] += self._time(decision.count * option.seconds.forward)

    @staticmethod
    def _seconds(decision: Decision, seconds: Seconds) -> float:
        # By how much a parameter's exchange makes backward longer is for `_hide` to count.
        return seconds.forward + (0.0 if decision.kind == "parameter" else seconds.backward)

    def _choice_by_level(self, index: int, decision: Decision, xs: list[int]) -> None:
        calls = float(self.problem.calls[decision.block])
        for level, n in self.n[decision.block].items():
            again = level in decision.again
            self.z[index, level] = [
                self.milp.variable(self._time(option.seconds.forward) if again else 0.0, bound=calls)
                for option in decision.options
            ]
            self.milp.row([*((z, 1.0) for z in self.z[index, level]), (n, -1.0)], 0.0, 0.0)
        for option, x in enumerate(xs):
            by_level = [(self.z[index, level][option], 1.0) for level in self.n[decision.block]]
            self.milp.row([*by_level, (x, -calls)], 0.0, 0.0)

    def _calls(self, block: str, use: Use, level: str, fits: Callable[[Placements], bool], side: str) -> Terms:
        """Calls of `block` at `level` in which a decision makes or uses a tensor in a layout that fits."""
        index, position = use
        decision = self.problem.decisions[index]
        matching = [o for o, option in enumerate(decision.options) if fits(getattr(option, side)[position])]
        if decision.block == block and (index, level) in self.z:
            return [(self.z[index, level][option], 1.0) for option in matching]
        return [(self.x[index][option], float(self.problem.calls[block])) for option in matching]

    def _layouts(self, use: Use, side: str) -> dict[Placements, Terms]:
        """Layout -> the options of a decision that make (side `outputs`) or use (`inputs`) a tensor in it."""
        decision, index = use
        found: dict[Placements, Terms] = {}
        for option, x in zip(self.problem.decisions[decision].options, self.x[decision]):
            found.setdefault(getattr(option, side)[index], []).append((x, 1.0))
        return found

    def _flow(self, index: int) -> None:
        """making, using, resharding, again, keeping"""
        flow = self.problem.flows[index]
        made = self._layouts(flow.producer, "outputs")
        resharded: dict[tuple[Placements, Placements], int] = {}
        for consumer in flow.consumers:
            for (source, target), e in self._pairs(flow, made, self._layouts(consumer, "inputs")).items():
                if source == target:
                    continue
                if (source, target) not in resharded:
                    resharded[source, target] = self._reshard(flow, source, target)
                self.milp.row([(resharded[source, target], 1.0), (e, -1.0)], 0.0)
        again = self._gather_again(index, made, resharded)
        for level in self.problem.levels[flow.block]:
            self._keep(index, level, set(map(storage, made)), again)

    def _reshard(self, flow: Flow, source: Placements, target: Placements) -> int:
        """The variable y_fps."""
        seconds = resharding(self.problem, flow, source, target) or NO_TIME
        y = self.milp.variable()
        hidden = beside(flow, source, target)
        self._take_time(y, flow.count * seconds.forward, "forward" if hidden else None)
        self._take_time(y, flow.count * seconds.backward, "backward" if hidden else None)
        calls = float(self.problem.calls[flow.block])
        for level in sorted(flow.again):
            if flow.block not in self.n:
                self._take_time(y, flow.count * seconds.forward, "backward" if hidden else None)
            elif seconds.forward:
                repeated = self.milp.variable(bound=calls)
                self._take_time(repeated, flow.count / calls * seconds.forward, "backward" if hidden else None)
                self.milp.row([(repeated, 1.0), (self.n[flow.block][level], -1.0), (y, -calls)], -calls)
        return y

    def _take_time(self, variable: int, seconds: float, beside: str | None) -> None:
        """Counts seconds for a variable: by themselves, or beside forward's or backward's computation."""
        if beside is None:
            self.milp.cost[variable] += self._time(seconds)
        elif seconds:
            self.beside[beside].append((variable, self._time(seconds)))

    def _pairs(
        self, flow: Flow, made: dict[Placements, Terms], used: dict[Placements, Terms]
    ) -> dict[tuple[Placements, Placements], int]:
        pairs = {
            (source, target): self.milp.variable()
            for source in made
            for target in used
            if source == target or resharding(self.problem, flow, source, target) is not None
        }
        for source, xs in made.items():
            self.milp.row([(e, 1.0) for (p, _), e in pairs.items() if p == source] + _minus(xs), 0.0, 0.0)
        for target, xs in used.items():
            self.milp.row([(e, 1.0) for (_, s), e in pairs.items() if s == target] + _minus(xs), 0.0, 0.0)
        return pairs

    def _keep(self, index: int, level: str, made: set[Placements], again: dict[Placements, Terms]) -> None:
        """keeping, for one flow and level"""
        flow = self.problem.flows[index]

        def making(layout: Placements) -> Terms:
            return self._calls(flow.block, flow.producer, level, lambda made: storage(made) == layout, "outputs")

        if level in flow.made and not flow.held:
            for layout in made:
                self._keep_row(index, layout, level, making(layout))
        for use in [*flow.used.get(level, ()), *flow.moved.get(level, ())]:
            options = self.problem.decisions[use[0]].options
            for used in dict.fromkeys(option.inputs[use[1]] for option in options):
                calls = self._calls(flow.block, use, level, used.__eq__, "inputs")
                if flow.held or use in flow.moved.get(level, ()):
                    calls = calls + _minus(making(storage(used)))
                self._keep_row(index, storage(used), level, calls + again.get(used, []))

    def _gather_again(
        self, index: int, made: dict[Placements, Terms], resharded: dict[tuple[Placements, Placements], int]
    ) -> dict[Placements, Terms]:
        """gathering: target -> minus N_b sum_p g_fps"""
        flow = self.problem.flows[index]
        terms: dict[Placements, Terms] = {}
        if not (flow.used or flow.moved):
            return terms
        for source, target in resharded:
            if beside(flow, source, target):
                seconds = resharding(self.problem, flow, source, target) or NO_TIME
                g = self.milp.variable(integer=True)
                self._take_time(g, flow.count * seconds.forward, "backward")
                self.milp.row([(g, 1.0), *_minus(made[source])], upper=0.0)
                terms.setdefault(target, []).append((g, -float(self.problem.calls[flow.block])))
                self.gathered[index, source, target] = g
        return terms

    def _keep_row(self, index: int, layout: Placements, level: str, calls: Terms) -> None:
        self.milp.row([(self._kept(index, layout, level), 1.0), *_minus(calls)], 0.0)

    def _kept(self, index: int, layout: Placements, level: str) -> int:
        """The variable k_fsl."""
        if (index, layout, level) not in self.kept:
            flow = self.problem.flows[index]
            variable = self.milp.variable(bound=float(self.problem.calls[flow.block]))
            size = self.problem.costs.local_bytes(flow.meta, layout) / self.byte
            held = flow.count / self.problem.calls[flow.block] * self.problem.in_flight
            self.memory_terms.append((variable, held * size))
            self.kept[index, layout, level] = variable
        return self.kept[index, layout, level]

    def _hide(self) -> None:
        """hiding"""
        computing: dict[str, Terms] = {"forward": [], "backward": []}
        exchange: dict[str, Terms] = {side: list(gathers) for side, gathers in self.beside.items()}
        last: Terms = []
        for decision, xs in zip(self.problem.decisions, self.x):
            for x, option in zip(xs, decision.options):
                forward = self._time(decision.count * option.seconds.forward)
                backward = self._time(decision.count * option.seconds.backward)
                if decision.kind == "parameter":  # whose forward is its update
                    exchange["backward"].append((x, backward))
                    last.append((x, self._time(decision.count * option.last)))
                else:
                    computing["forward"].append((x, forward))
                    computing["backward"].append((x, backward))
        part = 1 / self.problem.micro_batches
        self._longer(exchange["forward"], computing["forward"], 1.0)
        if part < 1:
            self._longer(exchange["backward"], computing["backward"], 1 - part)
        self._longer([*exchange["backward"], *last], computing["backward"], part)

    def _longer(self, exchange: Terms, computing: Terms, part: float) -> None:
        """Counts the seconds by which exchange makes computing longer, in a part of the micro-batches."""
        lost = self.problem.costs.hardware.interference
        exchange = [(variable, seconds) for variable, seconds in exchange if seconds]
        hidden = [(variable, (1 - lost) * seconds) for variable, seconds in computing if seconds]
        longer = self.milp.variable(part, bound=INFINITY)
        self.milp.row([(longer, 1.0), *_minus(exchange), *hidden], 0.0)
        if lost:
            self.milp.row([(longer, 1.0), *_minus([(x, lost * seconds) for x, seconds in exchange])], 0.0)

    def memory_total(self) -> Terms:
        """working, buffers, and the left side of memory"""
        working = self.milp.variable(bound=INFINITY)
        for index, (decision, xs) in enumerate(zip(self.problem.decisions, self.x)):
            transient = [
                (x, -option.transient / self.byte) for x, option in zip(xs, decision.options) if option.transient
            ]
            if transient:
                self.milp.row([(working, 1.0), *transient], 0.0)
            for option, x in zip(decision.options, xs):
                if option.memory:
                    self.memory_terms.append((x, decision.count * option.memory / self.byte))
            self._inside(index, decision)
        total = [*self.memory_terms, (working, 1.0), *((self._again(block), 1.0) for block in self._computing_again())]
        if self.beside["forward"]:
            early = self.milp.variable()
            for y, _ in self.beside["forward"]:
                self.milp.row([(early, 1.0), (y, -1.0)], 0.0)
            total.append((early, self.problem.early / self.byte))
        return [*total, (self._buffers(), 1.0)]

    def _buffers(self) -> int:
        """The variable H."""
        size = [
            (x, decision.count * option.buffers / self.byte)
            for decision, xs in zip(self.problem.decisions, self.x)
            for x, option in zip(xs, decision.options)
            if option.buffers
        ]
        every, most = sum(each for _, each in size), self.problem.buffers / self.byte
        held, full = self.milp.variable(bound=INFINITY), self.milp.variable(integer=True)
        self.milp.row([(held, 1.0), (full, -most)], 0.0)
        self.milp.row([(held, 1.0), (full, every), *_minus(size)], 0.0)
        self.milp.row([(full, -every), *size], upper=most)
        return held

    def _memory(self, memory: float | None) -> None:
        """memory"""
        total = self.memory_total()
        if memory is not None:
            self.milp.row(total, upper=memory / self.byte)
            return
        self.milp.cost = [0.0] * len(self.milp.cost)
        for variable, size in total:
            self.milp.cost[variable] += size

    def _inside(self, index: int, decision: Decision) -> None:
        """Inner tensors, at the levels that keep them."""
        for option, (settings, x) in enumerate(zip(decision.options, self.x[index])):
            if not settings.inside:
                continue
            held = self.problem.in_flight * settings.inside / self.byte
            for level in sorted(decision.inside):
                if (index, level) in self.z:
                    self.memory_terms.append((self.z[index, level][option], held))
                else:
                    self.memory_terms.append((x, decision.count * held))

    def _computing_again(self) -> list[str]:
        """Blocks of which some call may not keep everything."""
        return [block for block, levels in self.problem.levels.items() if levels != ("none",)]

    def _again(self, block: str) -> int:
        """The variable V_b"""
        terms: Terms = []
        most = 0.0
        for flow in self.problem.flows:
            if flow.block == block and flow.needed:
                sizes = {
                    layout: self.problem.costs.local_bytes(flow.meta, layout) / self.byte
                    for layout in self._layouts(flow.producer, "outputs")
                }
                most += max(sizes.values())
                terms += [
                    (x, sizes[layout]) for layout, xs in self._layouts(flow.producer, "outputs").items() for x, _ in xs
                ]
        again = self.milp.variable(bound=INFINITY)
        keeping = [(self.n[block]["none"], most)] if "none" in self.n.get(block, {}) else []
        self.milp.row([(again, 1.0), *keeping, *_minus(terms)], 0.0)
        return again


def _minus(terms: Terms) -> Terms:
    return [(variable, -value) for variable, value in terms]
