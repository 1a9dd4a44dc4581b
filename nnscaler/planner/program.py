"""The planning problem as a mixed-integer program.

The program chooses, for every decision, one of its options, and for every block, how many of its calls have which
recompute level. It minimises the time of a micro-batch, under the limit of memory. In mathematics:

Sets      d decision, o its option; b block, l recompute level; f flow, p a layout its producer can give, c a consumer,
          s a layout c can need
Data      n_d, n_f, N_b  how often a decision, a flow, a block occurs in a micro-batch
          h              seconds that computation loses for each second of exchange beside it
          t_do, t'_do    seconds of an option: forward, backward
          r_fps, r'_fps  seconds of resharding flow f from p to s: forward, backward
          q_do, u_do     seconds of a parameter's gradient exchange, which runs beside backward, and of its update
          l_do           seconds of a gradient exchange that happens only in the last of a step's m micro-batches
          c_do, C        bytes of buffers for exchanging a gradient in each micro-batch, and at most for all of them
          m_do           bytes that an option holds all the time
          i_do           bytes of inner tensors that an unfused cluster keeps, or an operator that communicates itself
          b_fs           bytes of flow f in layout s;  M bytes of device memory
          A              micro-batches whose activations are held at a time: 1, or more in a stage of a pipeline
          R_dl, R_fl     how often backward runs d, or reshards f, again for a call at level l
          g_l            calls that are computed again together at level l; what they share counts as if that were 1
          Level l keeps f as made, as used by c, or as resharded for c; see `nnscaler.recompute.keeping`. A level may
          keep on the host: then all flows but parameters and what all calls of a block share lie there.
Variables x_do in {0,1}  option o is chosen for d
          n_bl integer   calls of block b at level l;  u_bl in {0,1}: whether there are any
          m_bl integer   groups of calls of block b at level l, if that is a level of groups of g_l calls
          z_dol >= 0     calls at level l in which d has option o
          e_fcps >= 0    f is made in p and used by c in s
          y_fps >= 0     f is resharded from p to s, once for all consumers that need it in s
          Y_fpsl >= 0    calls at level l in which that is done again in backward
          k_fsl >= 0     calls at level l that keep f in layout s; the copy in fp8 that an option keeps instead counts
                         as a layout of its own
          g_fps in {0,1} backward gathers parameter f again, from p to s, rather than keep it
          E, L, F >= 0   seconds by which exchange makes computation longer: beside backward, beside that of the last
                         micro-batch, and beside forward
          H >= 0         bytes of buffers for exchanging gradients in each micro-batch;  v in {0,1}: they are all of C
          G >= 0         whether weights are gathered, some of them (a bytes) before they are needed
          U, V_b >= 0    bytes held while operators run: see `nnscaler.planner.working`

minimise      sum_d n_d (t_do + t'_do) x_do + sum_f n_f (r_fps + r'_fps) y_fps + sum_d n_d u_do x_do + F          (time)
              + (1 - 1/m) E + L/m
              + sum of R_dl t_do z_dol and of R_fl r_fps n_f / N_b Y_fpsl;  without gathered weights
subject to    sum_o x_do = 1                                                                                    (choice)
              sum_l n_bl = N_b;  sum_o z_dol = n_bl;  sum_l z_dol = N_b x_do                                    (levels)
              n_bl = g_l m_bl                                                                                   (groups)
              n_bl <= N_b u_bl                                                                                   (some)
              sum_s e_fcps = sum of x over the producer's options that make f in p                              (making)
              sum_p e_fcps = sum of x over c's options that use f in s                                           (using)
              y_fps >= e_fcps                                                   for p != s                  (resharding)
              Y_fpsl >= n_bl - N_b (1 - y_fps)                                                                  (again)
              k_fsl >= sum of z_l over the producer's options that make f in s     if l keeps f as made       (keeping)
              k_fsl >= sum of z_l over c's options that use f in s, less N_b sum_p g_fps   if l keeps f as used by c,
                       and less that over the producer's options that make f in s    if as resharded for c
              g_fps <= sum of x over the producer's options that make f in p, if all-gathers make s of it, and
                       <= sum of x over the consumers' options that use f in s                               (gathering)
              E >= h B, E >= B - (1 - h) sum_d n_d t'_do x_do, where B = sum_d n_d q_do x_do
                   + sum over gathered weights of n_f r'_fps y_fps, and what of r_fps is done again;  F likewise,
                   with B = sum over gathered weights of n_f r_fps y_fps, and t for t'; and L,
                   with B + sum_d n_d l_do x_do                                                                (hiding)
              G >= y_fps of gathered weights                                                                    (early)
              H >= C v, H >= S - c v, S <= C + c v, where S = sum_d n_d c_do x_do, c its most                  (buffers)
              sum_d n_d m_do x_do + A (sum_f b_fs n_f / N_b / g_l k_fsl + sum_d i_do z_dol), where l keeps it on the
                       device, + U + sum_b V_b + a G + H + what libraries take <= M                             (memory)
The rows from (choice) to (some) are stated in `nnscaler.planner.choices`; those from (making) to (gathering), in
`nnscaler.planner.flows`; weights without a copy beside their masters, in `nnscaler.planner.masters`; those that are
gathered in fp8, in `nnscaler.planner.in_fp8`; what is computed in pieces, in `nnscaler.planner.pieces`; groups of
calls, in `nnscaler.planner.groups`; what lies on the host, in `nnscaler.planner.on_host`; what is held while operators
run, in `nnscaler.planner.working`, while pieces do, in `nnscaler.planner.piecewise`, while gradients wait for their
exchange, in `nnscaler.planner.deferred`, and until they are computed, in `nnscaler.planner.later`; and all others here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows
from nnscaler.planner.groups import InGroups
from nnscaler.planner.in_fp8 import InFp8
from nnscaler.planner.later import Later
from nnscaler.planner.masters import Masters
from nnscaler.planner.on_host import OnHost
from nnscaler.planner.pieces import InPieces
from nnscaler.planner.problem import Problem
from nnscaler.planner.statement import Account, Quantity, Terms
from nnscaler.planner.working import Working
from nnscaler.recompute import Level

KEPT = ("saved", "inside")  # categories of charges for what each micro-batch in flight keeps for backward


@dataclass(frozen=True)
class Solution:
    """What a plan decides, by the indices of its problem.

    chosen          for each decision, the index of its option
    levels          block -> recompute level -> how many of its calls have it
    gathered_again  indices of the flows that are gathered again in backward rather than kept
    state_on_host   how many parts of the optimizer's state, of `on_host.PARTS` in all, lie on the host
    gradients_on_host  how many parts of the gradients, of as many
    pieces          (block, name of a stretch) -> the number of pieces it is computed in, where that is more than one
    """

    chosen: list[int]
    levels: dict[str, dict[Level, int]]
    gathered_again: frozenset[int] = frozenset()
    state_on_host: int = 0
    pieces: Mapping[tuple[str, str], int] = field(default_factory=dict)
    gradients_on_host: int = 0


class Program:
    """States a problem as a `Statement`, by the rows above.

    choices  the variables x, n and z; the first two are at hand as `x` and `n`
    flows    the variables of tensors on their way
    pieces   those of what is computed in pieces
    on_host  those of what lies on the host; None: nothing may
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.choices = problem, Choices(problem)
        self.statement, self.x, self.n = self.choices.statement, self.choices.x, self.choices.n
        self.flows = Flows(self.choices)
        Masters(self.choices, self.flows)
        InFp8(self.choices, self.flows)
        self._hide()
        self.pieces = InPieces(self.choices, self.flows)
        groups = InGroups(self.choices, self.flows)
        self.on_host = OnHost(self.choices, self.flows) if problem.host else None
        Working(self.choices, self.flows, self.pieces, groups, self.on_host)
        if problem.waiting:
            Later(self.choices)
        workspaces = self.statement.least(Quantity.BYTES)
        self.statement.above(workspaces, [], problem.costs.hardware.workspaces)
        self._charge(Account.DEVICE, Key("working", "", "workspaces"), workspaces, 1.0)
        self._gather_early()
        self._full = self._buffer()

    def holding(self, in_flight: int, waiting: Sequence[tuple[int, int]] = ()) -> Program:
        """The program where so many micro-batches are in flight, and wait: see `Problem`. Here one is, and none waits.

        Only its statement is another, in which all rows are those of this one.
        """
        assert self.problem.in_flight == 1
        assert not self.problem.waiting
        if in_flight == 1 and not waiting:
            return self
        other = copy(self)
        other.problem = replace(self.problem, in_flight=in_flight, waiting=waiting)
        other.statement = self.statement.scaled(in_flight, KEPT)
        if waiting:
            other.choices = copy(self.choices)
            other.choices.problem, other.choices.statement = other.problem, other.statement
            Later(other.choices)
        return other

    def solution(self, values: np.ndarray) -> Solution:
        """The solution that values of the variables mean."""
        chosen = [max(range(len(xs)), key=lambda option: values[xs[option]]) for xs in self.x]
        levels = {block: {levels[0]: self.problem.calls[block]} for block, levels in self.problem.levels.items()}
        for block, counts in self.n.items():
            levels[block] = {level: round(values[n]) for level, n in counts.items() if round(values[n])}
        again = frozenset(index for (index, _, _), g in self.flows.gathered.items() if values[g] > 0.5)
        pieces = {
            run: count for run, counts in self.pieces.counts.items() for count, c in counts.items() if values[c] > 0.5
        }
        if self.on_host is None:
            return Solution(chosen, levels, again, pieces=pieces)
        state, gradients = (round(values[parts]) for parts in (self.on_host.state, self.on_host.gradients))
        return Solution(chosen, levels, again, state, pieces, gradients)

    def values(self, solution: Solution) -> dict[int, float]:
        """The values of the choices that a solution means. Choices that are not named are 0."""
        values = {xs[chosen]: 1.0 for xs, chosen in zip(self.x, solution.chosen, strict=True)}
        values |= self.choices.values(solution.levels)
        options = [d.options[o] for d, o in zip(self.problem.decisions, solution.chosen)]
        for (index, source, target), g in self.flows.gathered.items():
            flow = self.problem.flows[index]
            made = options[flow.producer[0]].outputs[flow.producer[1]] == source
            used = target in (options[decision].inputs[place] for decision, place in flow.consumers)
            values[g] = float(index in solution.gathered_again and made and used)
        buffers = sum(d.count * option.exchange_buffers for d, option in zip(self.problem.decisions, options))
        values[self._full] = float(buffers > self.problem.exchange_buffers)
        values.update({self.pieces.counts[run][count]: 1.0 for run, count in solution.pieces.items()})
        if self.on_host:
            values.update(self.on_host.values(solution.state_on_host, solution.gradients_on_host))
        return values

    def _charge(self, account: Account, key: Key, variable: int, amount: float) -> None:
        self.statement.charge(account, key, variable, amount)

    def _hide(self) -> None:
        """The rows (hiding)."""
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

    def _gather_early(self) -> None:
        """The row (early)."""
        gathers = self.statement.accounts[Account.FORWARD]
        if gathers:
            early = self.statement.least(bound=1.0)
            for gather in gathers:
                self.statement.above(early, [(gather.variable, 1.0)])
            self._charge(Account.DEVICE, Key("buffers", "", "gathered early"), early, self.problem.gathered_early)

    def _buffer(self) -> int:
        """The rows (buffers). Returns the variable v."""
        size = [
            (x, decision.count * option.exchange_buffers)
            for decision, xs in zip(self.problem.decisions, self.x)
            for x, option in zip(xs, decision.options)
            if option.exchange_buffers
        ]
        every, most = sum(each for _, each in size), self.problem.exchange_buffers
        held, full = self.statement.least(Quantity.BYTES), self.statement.choice()
        self._charge(Account.DEVICE, Key("buffers"), held, 1.0)
        self.statement.above(held, [(full, most)])
        self.statement.above(held, [*size, (full, -every)])
        self.statement.row([*size, (full, -every)], upper=most, quantity=Quantity.BYTES)
        return full
