"""What lies on the host, as a part of the planning problem's program (see `nnscaler.planner.program`).

Sets      l a level that keeps on the host; f a flow that is kept there at l; s a layout of it
Data      w, r, wr       bytes/s to the host, back from it, and each way when both go at once
          c              seconds that computation loses for each second of copies beside it
          i_do           bytes of inner tensors that option o of d keeps, at levels that keep them
          W              bytes of the host's memory
          S              bytes of the optimizer's state, in P equal parts;  T bytes on the device for those being
                         updated;  S_do, of S, the master weight that option o stores as the parameter itself
          G              bytes of the gradients, in P equal parts;  T' bytes on the device for those being added to;
                         G_do, bytes of a gradient that may leave, as option o keeps it
Variables k_fsl          calls at level l that keep f in layout s, as there
          j_fsl >= 0     the same of one call: whether it would keep f in s
          D_bl >= 0      bytes on the device of what is on its way to the host, or back, while calls at level l run
          h integer      parts of the optimizer's state on the host;  v in {0,1}: there are some
          h', v'         likewise of gradients
          O_bl, I_bl >= 0  seconds by which copies to the host, and back, make forward and backward longer
          X >= 0         seconds by which copies for the update make a step longer
          Z, Z' >= 0     seconds by which those of gradients make longer the backward of a step's first micro-batch, in
                         which they only leave, and that of every other

minimise      sum_bl (O_bl + I_bl) + X / m + Z / m + (1 - 1/m) Z', beside the rest
subject to    h <= P v;  h S / P + sum_d S_do x_do <= S                                                          (state)
              h' <= P v';  h' G / P <= sum_d n_d G_do x_do                                                   (gradients)
              D_bl >= 2 (sum_f b_fs j_fsl + sum_d i_do x_do), if u_bl = 1: what two calls keep              (on its way)
              O_bl >= c C, O_bl >= C - (1 - c) F, where C = (sum_f b_fs k_fsl n_f / N_b + sum_d i_do z_dol) / w, and F =
                   the time of forward of these calls: a call's copies run beside the next one; I_bl with r and
                   backward                                                                                    (hiding)
              X >= c Y, X >= Y + sum_bl (what b_fs k_fsl go out in - O_bl) - (1 - c) sum_d n_d t_do x_do, where
                   Y = (h S + h' G) / P / wr: the update of a bucket, and the copies for it, run beside the next
                   forward until that needs its weights; so does what that forward sends to the host itself
              Z >= c Y, Z >= Y - (1 - c) B, where Y = h' G / P / wr, and B = the time of all of backward; Z' likewise,
                   with Y + sum_bl (what b_fs k_fsl come back in - I_bl): what else comes back has the way first
              T v + T' v', and -(h S + h' G) / P on the device; D_bl is added in `nnscaler.planner.working`;
              A (sum_f b_fs n_f / N_b k_fsl + sum_d i_do z_dol) + (h S + h' G) / P <= W                        (memory)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import GRADIENTS, STORED
from nnscaler.planner.flows import Flows
from nnscaler.planner.statement import Account, Quantity, Term, Terms, minus
from nnscaler.recompute import Level

PARTS = 64  # of the optimizer's state, and of gradients


class OnHost:
    """Adds the variables, rows and charges above to a program.

    used        (block, level) -> the variable u, for levels that keep on the host
    on_its_way  (block, level) -> the variable D, for the same
    state       the variable h;  some_state: the variable v
    gradients   the variable h'; some_gradients: the variable v'
    """

    def __init__(self, choices: Choices, flows: Flows) -> None:
        assert choices.problem.costs.hardware.host is not None
        self.choices, self.flows, self.problem = choices, flows, choices.problem
        self.statement, self.host = choices.statement, choices.problem.costs.hardware.host
        self.used = {
            (block, level): choices.used(block, level)
            for block, counts in choices.n.items()
            for level in counts
            if level.on_host
        }
        self.sent, self.fetched = self._copy()
        self.on_its_way = {(block, level): self._on_its_way(block, level) for block, level in self.used}
        self.state, self.some_state = self._parts("state", self.problem.optimizer_state, self.problem.staging)
        self.gradients, self.some_gradients = self._parts(GRADIENTS, self.problem.gradients, self.problem.slots)
        self._limit()
        self._update()
        self._accumulate()

    def values(self, state: int, gradients: int) -> dict[int, float]:
        """The variables of the optimizer's state and of gradients, where so many parts of them are on the host."""
        parts = {self.state: float(state), self.gradients: float(gradients)}
        return parts | {self.some_state: float(state > 0), self.some_gradients: float(gradients > 0)}

    def _copy(self) -> tuple[Terms, Terms]:
        """The rows (hiding), for what calls keep. Returns the seconds of copies to the host that forward hides, and of
        those back that backward hides, each as a sum."""
        sent: dict[tuple[str, Level], tuple[Terms, Terms]] = {use: ([], []) for use in self.used}
        ways = ((Account.SENT, self.host.to_host), (Account.FETCHED, self.host.to_device))
        for block, name, level, calls, size in self._kept():
            for terms, (account, rate) in zip(sent[block, level], ways):
                self.statement.charge(account, Key("copies", block, name, level.name), calls, size / rate)
                terms.append((calls, size / rate))
        computed: dict[tuple[str, Level], tuple[Terms, Terms]] = {use: ([], []) for use in self.used}
        for (index, level), zs in self.choices.z.items():
            decision = self.problem.decisions[index]
            for z, option in zip(zs, decision.options) if level.on_host else ():
                again = option.seconds.forward * decision.runs_again.get(level, 0.0)
                forward, backward = computed[decision.block, level]
                forward.append((z, option.seconds.forward))
                backward.append((z, option.seconds.backward + again))
        hidden: tuple[Terms, Terms] = ([], [])
        for use in self.used:
            for side, into, copies, computing in zip(("forward", "backward"), hidden, sent[use], computed[use]):
                longer = self._longer(side, copies, computing, 1.0)
                into.extend([*copies, (longer, -1.0)])
        return hidden

    def _kept(self) -> Iterator[tuple[str, str, Level, int, float]]:
        """(block, name, level, how many calls, bytes of each) of what is kept on the host: flows, and inner tensors."""
        for (index, form, level), k in self.flows.kept.items():
            flow = self.problem.flows[index]
            if self.flows.keeps_on_host(flow, level):
                share = flow.count / self.problem.calls[flow.block]
                yield flow.block, flow.tensor, level, k, share * self.flows.bytes_of(flow, form)
        for (index, level), zs in self.choices.z.items():
            decision = self.problem.decisions[index]
            for z, option in zip(zs, decision.options):
                if level.on_host and level in decision.inner_kept_at and option.inner_bytes:
                    yield decision.block, decision.name, level, z, option.inner_bytes

    def _on_its_way(self, block: str, level: Level) -> int:
        """The variable D_bl."""
        on_its_way = self.statement.least(Quantity.BYTES)
        terms = [(variable, 2 * size) for variable, size in self.flows.kept_by_one_call(block, level)]
        most = sum(size for _, size in terms)
        self.statement.above(on_its_way, [*terms, (self.used[block, level], most)], -most)
        return on_its_way

    def _parts(self, what: str, size: float, held: float) -> tuple[int, int]:
        """The variables h and v, or h' and v', with their memory.

        size  bytes of all parts
        held  bytes on the device for those that are there, if there are some on the host
        """
        parts, some = self.statement.choice(PARTS), self.statement.choice()
        self.statement.row([(parts, 1.0), (some, -float(PARTS))], upper=0.0)
        self.statement.charge(Account.DEVICE, Key(what, "", "on the host"), parts, -size / PARTS)
        self.statement.charge(Account.HOST, Key(what), parts, size / PARTS)
        self.statement.charge(Account.DEVICE, Key("buffers", "", what), some, held)
        return parts, some

    def _limit(self) -> None:
        """The rows (state) and (gradients)."""
        options = [
            (x, decision.count, option)
            for decision, xs in zip(self.problem.decisions, self.choices.x)
            for x, option in zip(xs, decision.options)
        ]
        size = self.problem.optimizer_state
        stays = [(x, count * option.memory[STORED]) for x, count, option in options if option.master_only]
        self.statement.row([(self.state, size / PARTS), *stays], upper=size, quantity=Quantity.BYTES)
        leaves = [(x, count * option.memory[GRADIENTS]) for x, count, option in options if option.gradient_may_leave]
        part = self.problem.gradients / PARTS
        self.statement.row([(self.gradients, part), *minus(leaves)], upper=0.0, quantity=Quantity.BYTES)

    def _update(self) -> None:
        """The variable X, and the copies for the update."""
        once, copies = 1 / self.problem.micro_batches, []
        for what, parts, size in (
            ("state", self.state, self.problem.optimizer_state), (GRADIENTS, self.gradients, self.problem.gradients)
        ):  # fmt: skip
            copies.append((parts, size / PARTS / self.host.both_ways))
            self.statement.charge(Account.SENT, Key("copies", "", what), parts, once * copies[-1][1])
        self._longer("update", copies, self._computing("forward"), once, self.sent)

    def _accumulate(self) -> None:
        """The variables Z and Z', and the copies of gradients beside backward."""
        first = 1 / self.problem.micro_batches
        copies = [(self.gradients, self.problem.gradients / PARTS / self.host.both_ways)]
        self.statement.charge(Account.FETCHED, Key("copies", "", GRADIENTS), *copies[0])
        computing = self._computing("backward", "again")
        self._longer(GRADIENTS, copies, computing, first)
        if first < 1:
            self._longer(GRADIENTS, copies, computing, 1 - first, self.fetched)

    def _computing(self, *categories: str) -> Terms:
        charges = self.statement.accounts[Account.TIME]
        return [(one.variable, one.amount) for one in charges if one.key.category in categories]

    def _longer(self, side: str, copies: Terms, computing: Terms, part: float, before: Sequence[Term] = ()) -> int:
        return self.statement.longer(Key("copies", "", side), copies, computing, self.host.interference, part, before)
