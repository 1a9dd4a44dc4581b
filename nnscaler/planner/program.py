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
          A              micro-batches whose activations are held at a time: 1 but for stages of a pipeline
          a flow is away at a level that keeps on the host, but for weights and what all calls of a block get
          level l keeps f as made, as used by c, or as moved to c (see `recompute`), and runs d, and resharding, again;
          K_b            the levels that keep everything
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
              V_b >= B_b (1 - sum of n_bl over K_b), where B_b = sum_f b_fs x_do of what K_b keep of one call    (again)
              sum_d n_d m_do x_do + A (sum_f b_fs n_f / N_b k_fsl + sum_d i_do z_dol), where l keeps it on the device,
                       + U + sum_b V_b + a G + H <= M                                                          (memory)
What the host does is stated in `nnscaler.planner.on_host`, and what pieces do in `nnscaler.planner.pieces`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.costs import NO_TIME, Seconds
from nnscaler.planner.on_host import OnHost
from nnscaler.planner.pieces import InPieces
from nnscaler.planner.problem import Decision, Flow, Port, Problem
from nnscaler.planner.statement import Account, Quantity, Statement, Terms, minus
from nnscaler.recompute import Level
from nnscaler.reshard import only_gathers, reshards, without_gradient


@dataclass(frozen=True)
class Solution:
    """Index of the chosen option of each decision, how many calls of each block have which level, indices of the flows
    that backward gathers again where all-gathers made them, how many parts (`on_host.PARTS` in all) of the optimizer's
    state lie on the host, and in how many pieces runs of a block are computed, where it is more than one."""

    chosen: list[int]
    levels: dict[str, dict[Level, int]]
    gathered_again: frozenset[int] = frozenset()
    state_on_host: int = 0
    pieces: Mapping[tuple[str, str], int] = field(default_factory=dict)


def resharding(problem: Problem, flow: Flow, source: Placements, target: Placements) -> Seconds | None:
    """Seconds of bringing a flow from one layout to another; None where that is impossible."""
    key = flow.meta, flow.is_parameter, source, target
    if key not in problem.resharding:
        problem.resharding[key] = _resharding(problem, flow, source, target)
    return problem.resharding[key]


def _resharding(problem: Problem, flow: Flow, source: Placements, target: Placements) -> Seconds | None:
    needed = reshards(source, target)
    if needed is None:
        return None
    seconds = problem.costs.resharding(flow.meta, source, needed)
    if not beside(flow, source, target):
        return seconds
    exact = replace(flow.meta, dtype=torch.promote_types(flow.meta.dtype, torch.float32))  # gradients are added in fp32
    return Seconds(seconds.forward, problem.costs.resharding(exact, source, needed).backward)


def beside(flow: Flow, source: Placements, target: Placements) -> bool:
    """Whether a flow is brought from one layout to another beside computation: a weight that is gathered."""
    return flow.is_parameter and only_gathers(reshards(source, target))


def storage(layout: Placements) -> Placements:
    """The layout as far as memory goes: whose gradient is whole does not matter."""
    return without_gradient(layout)


@dataclass
class Program:
    """The statement of a problem. `x[d][o]` are the variables of the choices, `n[b][l]` those of the levels, and
    `gathered[f, p, s]` those of gathering again."""

    problem: Problem
    statement: Statement = field(default_factory=Statement)
    x: list[list[int]] = field(default_factory=list)
    n: dict[str, dict[Level, int]] = field(default_factory=dict)
    z: dict[tuple[int, Level], list[int]] = field(default_factory=dict)
    kept: dict[tuple[int, Placements, Level], int] = field(default_factory=dict)
    in_call: dict[tuple[int, Placements, Level], int] = field(default_factory=dict)  # of one call, whether it is kept
    gathered: dict[tuple[int, Placements, Placements], int] = field(default_factory=dict)
    full: int = 0  # the variable v
    on_host: OnHost | None = None
    resharded: dict[int, list[int]] = field(default_factory=dict)  # flow -> the variables y

    def __post_init__(self) -> None:
        for block, levels in self.problem.levels.items():
            if len(levels) > 1:
                self._levels(block)
        for decision in self.problem.decisions:
            self._choice(decision)
        for index in range(len(self.problem.flows)):
            self._flow(index)
        self._weigh()
        self._hide()
        self.pieces = InPieces(self)
        self._work()
        for block in self.problem.levels:
            self._compute_again(block)
        self._gather_early()
        self._buffer()
        self.on_host = OnHost(self) if self.problem.host else None

    def solution(self, values: np.ndarray) -> Solution:
        """What the variables' values mean."""
        chosen = [max(range(len(xs)), key=lambda option: values[xs[option]]) for xs in self.x]
        levels = {block: {levels[0]: self.problem.calls[block]} for block, levels in self.problem.levels.items()}
        for block, counts in self.n.items():
            levels[block] = {level: round(values[n]) for level, n in counts.items() if round(values[n])}
        again = frozenset(index for (index, _, _), g in self.gathered.items() if values[g] > 0.5)
        pieces = {
            run: count for run, counts in self.pieces.counts.items() for count, c in counts.items() if values[c] > 0.5
        }
        return Solution(chosen, levels, again, round(values[self.on_host.parts]) if self.on_host else 0, pieces)

    def choices(self, solution: Solution) -> dict[int, float]:
        """The variables that a solution decides about, with their values; 0 where they are not named."""
        values = {xs[chosen]: 1.0 for xs, chosen in zip(self.x, solution.chosen, strict=True)}
        for block, counts in self.n.items():
            values.update({counts[level]: float(calls) for level, calls in solution.levels[block].items()})
        options = [d.options[o] for d, o in zip(self.problem.decisions, solution.chosen)]
        for (index, source, target), g in self.gathered.items():
            flow = self.problem.flows[index]
            made = options[flow.producer[0]].outputs[flow.producer[1]] == source
            used = target in (options[decision].inputs[place] for decision, place in flow.consumers)
            values[g] = float(index in solution.gathered_again and made and used)
        buffers = sum(d.count * option.exchange_buffers for d, option in zip(self.problem.decisions, options))
        values[self.full] = float(buffers > self.problem.exchange_buffers)
        values.update({self.pieces.counts[run][count]: 1.0 for run, count in solution.pieces.items()})
        if self.on_host:
            values.update(self.on_host.choices(solution.levels, solution.state_on_host))
        return values

    def _charge(self, account: Account, key: Key, variable: int, amount: float) -> None:
        self.statement.charge(account, key, variable, amount)

    def _levels(self, block: str) -> None:
        """levels, of a block"""
        calls = float(self.problem.calls[block])
        self.n[block] = {level: self.statement.choice(calls) for level in self.problem.levels[block]}
        self.statement.row([(n, 1.0) for n in self.n[block].values()], calls, calls)

    def _choice(self, decision: Decision) -> None:
        """choice, and levels of a decision; its time and memory"""
        index = len(self.x)
        self.x.append([self.statement.choice() for _ in decision.options])
        self.statement.row([(x, 1.0) for x in self.x[index]], 1.0, 1.0)
        if decision.kind == "parameter":
            self._parameter(decision, self.x[index])
            return
        by_level = self._by_level(index, decision)
        place = (decision.block, decision.name)
        for option, (settings, x) in enumerate(zip(decision.options, self.x[index])):
            forward, backward = settings.seconds.forward, settings.seconds.backward
            self._charge(Account.TIME, Key("forward", *place), x, decision.count * forward)
            self._charge(Account.TIME, Key("backward", *place), x, decision.count * backward)
            for level in self.problem.levels[decision.block]:
                # Calls at a level are counted by z; where there is one level, all are, by x.
                calls, each = (by_level[level][option], 1) if by_level else (x, decision.count)
                if level in decision.recomputed_at:
                    self._charge(Account.TIME, Key("again", *place, level.name), calls, each * forward)
                if level in decision.inner_kept_at:
                    held = each * self.problem.in_flight * settings.inner_bytes
                    self._charge(Account.DEVICE, Key("inside", *place, level.name), calls, held)

    def _parameter(self, decision: Decision, xs: list[int]) -> None:
        """By how much a parameter's exchange makes backward longer is for `_hide` to count."""
        place = (decision.block, decision.name)
        for option, x in zip(decision.options, xs):
            self._charge(Account.TIME, Key("update", *place), x, decision.count * option.seconds.forward)
            self._charge(Account.BACKWARD, Key("exchange", *place), x, decision.count * option.seconds.backward)
            self._charge(Account.LAST, Key("exchange", *place), x, decision.count * option.last_exchange)
            for what, size in option.memory.items():
                self._charge(Account.DEVICE, Key("parameter", *place, what), x, decision.count * size)

    def _by_level(self, index: int, decision: Decision) -> dict[Level, list[int]]:
        """The variables z of a decision; none where its block has one level."""
        if decision.block not in self.n:
            return {}
        calls = float(self.problem.calls[decision.block])
        for level, n in self.n[decision.block].items():
            self.z[index, level] = [self.statement.product([(n, 1.0)], [(x, 1.0)], calls) for x in self.x[index]]
            self.statement.row([*((z, 1.0) for z in self.z[index, level]), (n, -1.0)], 0.0, 0.0)
        by_level = {level: self.z[index, level] for level in self.n[decision.block]}
        for option, x in enumerate(self.x[index]):
            self.statement.row([*((zs[option], 1.0) for zs in by_level.values()), (x, -calls)], 0.0, 0.0)
        return by_level

    def _calls(
        self, block: str, use: Port, level: Level | None, fits: Callable[[Placements], bool], side: str
    ) -> Terms:
        """Calls of `block` at `level` in which a decision makes or uses a tensor in a layout that fits; without a
        level, whether one would."""
        index, position = use
        decision = self.problem.decisions[index]
        matching = [o for o, option in enumerate(decision.options) if fits(getattr(option, side)[position])]
        if level is None:
            return [(self.x[index][option], 1.0) for option in matching]
        if decision.block == block and (index, level) in self.z:
            return [(self.z[index, level][option], 1.0) for option in matching]
        return [(self.x[index][option], float(self.problem.calls[block])) for option in matching]

    def _layouts(self, use: Port, side: str) -> dict[Placements, Terms]:
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
                self.statement.above(resharded[source, target], [(e, 1.0)])
        self.resharded[index] = list(resharded.values())
        again = self._gather_again(index, made, resharded)
        for level in self.problem.levels[flow.block]:
            self._keep(index, level, set(map(storage, made)), again)

    def _reshard(self, flow: Flow, source: Placements, target: Placements) -> int:
        """The variable y_fps."""
        seconds = resharding(self.problem, flow, source, target) or NO_TIME
        place = (flow.block, flow.tensor, f"{format_placements(source)} -> {format_placements(target)}")
        hidden = beside(flow, source, target)
        forward, backward = (Account.FORWARD, Account.BACKWARD) if hidden else (Account.TIME, Account.TIME)
        y = self.statement.least(bound=1.0)
        self._charge(forward, Key("reshard", *place), y, flow.count * seconds.forward)
        self._charge(backward, Key("reshard backward", *place), y, flow.count * seconds.backward)
        calls = float(self.problem.calls[flow.block])
        for level in (level for level in self.problem.levels[flow.block] if level in flow.resharded_again_at):
            key = Key("reshard again", *place)
            if flow.block not in self.n:
                self._charge(backward, key, y, flow.count * seconds.forward)
            elif seconds.forward:
                repeated = self.statement.least(bound=calls)
                self._charge(backward, key, repeated, flow.count / calls * seconds.forward)
                self.statement.above(repeated, [(self.n[flow.block][level], 1.0), (y, calls)], -calls)
        return y

    def _pairs(
        self, flow: Flow, made: dict[Placements, Terms], used: dict[Placements, Terms]
    ) -> dict[tuple[Placements, Placements], int]:
        pairs = {
            (source, target): self.statement.product(made[source], used[target])
            for source in made
            for target in used
            if source == target or resharding(self.problem, flow, source, target) is not None
        }
        for source, xs in made.items():
            self.statement.row([(e, 1.0) for (p, _), e in pairs.items() if p == source] + minus(xs), 0.0, 0.0)
        for target, xs in used.items():
            self.statement.row([(e, 1.0) for (_, s), e in pairs.items() if s == target] + minus(xs), 0.0, 0.0)
        return pairs

    def _keep(self, index: int, level: Level, made: set[Placements], again: dict[Placements, Terms]) -> None:
        """keeping, for one flow and level"""
        for layout, calls in self._keeping(index, level, made, again):
            self.statement.above(self._kept(index, layout, level), calls)
        if self.keeps_on_host(self.problem.flows[index], level):
            for layout, calls in self._keeping(index, level, made, again, of_one_call=True):
                if (index, layout, level) not in self.in_call:
                    self.in_call[index, layout, level] = self.statement.least(bound=1.0)
                self.statement.above(self.in_call[index, layout, level], calls)

    def _keeping(
        self,
        index: int,
        level: Level,
        made: set[Placements],
        again: dict[Placements, Terms],
        of_one_call: bool = False,
    ) -> Iterator[tuple[Placements, Terms]]:
        """The layouts in which a level may keep a flow, each with a number of calls that do; or whether one would."""
        flow = self.problem.flows[index]

        def calls(use: Port, fits: Callable[[Placements], bool], side: str) -> Terms:
            return self._calls(flow.block, use, None if of_one_call else level, fits, side)

        def making(layout: Placements) -> Terms:
            return calls(flow.producer, lambda made: storage(made) == layout, "outputs")

        if level in flow.as_made and not flow.is_parameter:
            for layout in made:
                yield layout, making(layout)
        for use in [*flow.as_used.get(level, ()), *flow.as_resharded.get(level, ())]:
            options = self.problem.decisions[use[0]].options
            for used in dict.fromkeys(option.inputs[use[1]] for option in options):
                terms = calls(use, used.__eq__, "inputs")
                if flow.is_parameter or use in flow.as_resharded.get(level, ()):
                    terms = terms + minus(making(storage(used)))
                share = 1 / self.problem.calls[flow.block] if of_one_call else 1.0
                yield storage(used), terms + [(g, share * factor) for g, factor in again.get(used, [])]

    def keeps_on_host(self, flow: Flow, level: Level) -> bool:
        """Whether a level keeps a flow on the host, if it keeps it: not weights, and not what all calls get."""
        shared = flow.count < self.problem.calls[flow.block]
        return level.on_host and not flow.is_parameter and not shared

    def _gather_again(
        self, index: int, made: dict[Placements, Terms], resharded: dict[tuple[Placements, Placements], int]
    ) -> dict[Placements, Terms]:
        """gathering: target -> minus N_b sum_p g_fps"""
        flow = self.problem.flows[index]
        terms: dict[Placements, Terms] = {}
        if not (flow.as_used or flow.as_resharded):
            return terms
        for source, target in resharded:
            if beside(flow, source, target):
                seconds = resharding(self.problem, flow, source, target) or NO_TIME
                move = f"{format_placements(source)} -> {format_placements(target)}"
                g = self.statement.choice()
                key = Key("reshard again", flow.block, flow.tensor, move)
                self._charge(Account.BACKWARD, key, g, flow.count * seconds.forward)
                self.statement.row([(g, 1.0), *minus(made[source])], upper=0.0)
                terms.setdefault(target, []).append((g, -float(self.problem.calls[flow.block])))
                self.gathered[index, source, target] = g
        return terms

    def _kept(self, index: int, layout: Placements, level: Level) -> int:
        """The variable k_fsl."""
        if (index, layout, level) not in self.kept:
            flow, calls = self.problem.flows[index], self.problem.calls[self.problem.flows[index].block]
            variable = self.statement.least(bound=float(calls))
            size = flow.count / calls * self.problem.in_flight * self.problem.costs.local_bytes(flow.meta, layout)
            where = Account.HOST if self.keeps_on_host(flow, level) else Account.DEVICE
            self._charge(where, Key("saved", flow.block, flow.tensor, level.name), variable, size)
            self.kept[index, layout, level] = variable
        return self.kept[index, layout, level]

    def _weigh(self) -> None:
        """A product's backward takes as long for each input that needs a gradient, weights among them."""
        needing: dict[int, list[Flow]] = defaultdict(list)
        for flow in self.problem.flows:
            for index, _ in flow.consumers if flow.meta.requires_grad else ():
                needing[index].append(flow)
        for index, flows in needing.items():
            decision = self.problem.decisions[index]
            share = sum(flow.is_parameter for flow in flows) / len(flows)
            for option, x in zip(decision.options, self.x[index]) if decision.kind == "unit" else ():
                seconds = share * decision.count * option.seconds.backward
                self._charge(Account.WEIGHTS, Key("backward", decision.block, decision.name), x, seconds)

    def _hide(self) -> None:
        """hiding"""
        computing: dict[str, Terms] = {
            side: [(one.variable, one.amount) for one in self.statement.accounts[Account.TIME] if one.key[0] == side]
            for side in ("forward", "backward")
        }
        part = 1 / self.problem.micro_batches
        self._longer("forward", self.statement.terms(Account.FORWARD), computing["forward"], 1.0)
        if part < 1:
            self._longer("backward", self.statement.terms(Account.BACKWARD), computing["backward"], 1 - part)
        last = self.statement.terms(Account.BACKWARD, Account.LAST)
        self._longer("backward", last, computing["backward"], part)

    def _longer(self, side: str, exchange: Terms, computing: Terms, part: float) -> None:
        lost = self.problem.costs.hardware.interference
        self.statement.longer(Key("exchange", "", side), exchange, computing, lost, part)

    def _work(self) -> None:
        """working"""
        working = self.statement.least(Quantity.BYTES)
        self._charge(Account.DEVICE, Key("working"), working, 1.0)
        for index, (decision, xs) in enumerate(zip(self.problem.decisions, self.x)):
            held = [(x, option.transient) for x, option in zip(xs, decision.options) if option.transient]
            if held:
                most = max(size for _, size in held)
                in_pieces = [(c, -most * share) for c, share in self.pieces.working.get(index, ())]
                self.statement.above(working, [*held, *in_pieces])
        for held in self.pieces.held:
            self.statement.above(working, held)

    def _compute_again(self, block: str) -> None:
        """The variable V_b, of a block of which some call may not keep everything."""
        levels = self.problem.levels[block]
        if len(levels) == 1 and levels[0].everything:
            return
        terms: Terms = []
        most = 0.0
        for index, flow in enumerate(self.problem.flows):
            if flow.block == block and flow.needed:
                layouts = self._layouts(flow.producer, "outputs")
                sizes = {layout: self.problem.costs.local_bytes(flow.meta, layout) for layout in layouts}
                most += max(sizes.values())
                if index not in self.pieces.inside:
                    terms += [(x, sizes[layout]) for layout, xs in layouts.items() for x, _ in xs]
        terms += [(made, 1.0) for made in self.pieces.made.get(block, ())]
        again = self.statement.least(Quantity.BYTES)
        self._charge(Account.DEVICE, Key("working", block, "backward"), again, 1.0)
        keeping = [(n, -most) for level, n in self.n.get(block, {}).items() if level.everything]
        self.statement.above(again, [*terms, *keeping])

    def _gather_early(self) -> None:
        """early"""
        gathers = self.statement.accounts[Account.FORWARD]
        if gathers:
            early = self.statement.least(bound=1.0)
            for gather in gathers:
                self.statement.above(early, [(gather.variable, 1.0)])
            self._charge(Account.DEVICE, Key("buffers", "", "gathered early"), early, self.problem.gathered_early)

    def _buffer(self) -> None:
        """buffers"""
        size = [
            (x, decision.count * option.exchange_buffers)
            for decision, xs in zip(self.problem.decisions, self.x)
            for x, option in zip(xs, decision.options)
            if option.exchange_buffers
        ]
        every, most = sum(each for _, each in size), self.problem.exchange_buffers
        held, full = self.statement.least(Quantity.BYTES), self.statement.choice()
        self.full = full
        self._charge(Account.DEVICE, Key("buffers"), held, 1.0)
        self.statement.above(held, [(full, most)])
        self.statement.above(held, [*size, (full, -every)])
        self.statement.row([*size, (full, -every)], upper=most, quantity=Quantity.BYTES)
