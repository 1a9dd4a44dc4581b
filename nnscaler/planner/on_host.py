"""What lies on the host, as a part of the planning problem's program (see `nnscaler.planner.program`).

Sets      l a level that keeps on the host; f a flow that is kept there at l; s a layout of it
Data      w, r, wr       bytes/s to the host, back from it, and each way when both go at once
          c              seconds that computation loses for each second of copies beside it
          W              bytes of the host's memory
          S              bytes of the optimizer's state, in P equal parts;  T bytes on the device for those being
                         updated;  S_do, of S, the master weight that option o stores as the parameter itself
Variables k_fsl          calls at level l that keep f in layout s, as there
          j_fsl >= 0     the same of one call: whether it would keep f in s
          D_b >= 0       bytes on the device of what is on its way to the host or back
          h integer      parts of the optimizer's state on the host;  v in {0,1}: there are some
          O_bl, I_bl >= 0  seconds by which copies to the host, and back, make forward and backward longer
          X >= 0         seconds by which the optimizer's state makes a step longer

minimise      sum_bl (O_bl + I_bl) + X / m, beside the rest
subject to    h <= P v;  h S / P + sum_d S_do x_do <= S                                                          (state)
              D_b >= 2 sum_f b_fs j_fsl, if u_bl = 1: what two calls keep                                   (on its way)
              O_bl >= c C, O_bl >= C - (1 - c) F, where C = sum_f b_fs k_fsl / w n_f / N_b, and F = the time of forward
                   of these calls: a call's copies run beside the next one; I_bl with r and backward           (hiding)
              X >= c Y, X >= Y - (1 - c) sum_d n_d t_do x_do, where Y = h S / P / wr: the update of a bucket, and the
                   copies for it, run beside the next forward until that needs its weights
              D_b, T v, and -h S / P on the device; sum_f A b_fs n_f / N_b k_fsl + h S / P <= W                 (memory)
"""

from __future__ import annotations

from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import STORED
from nnscaler.planner.flows import Flows
from nnscaler.planner.statement import Account, Quantity, Terms
from nnscaler.recompute import Level

PARTS = 64  # of the optimizer's state


class OnHost:
    """Adds the variables, rows and charges above to a program.

    used   (block, level) -> the variable u, for levels that keep on the host
    parts  the variable h; some: the variable v
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
        self._copy()
        for block in dict.fromkeys(block for block, _ in self.used):
            self._on_its_way(block)
        self.parts = self.statement.choice(PARTS)
        self.some = self.statement.choice()
        self._state()

    def values(self, parts: int) -> dict[int, float]:
        """The variables of the optimizer's state, where so many parts of it are on the host."""
        return {self.parts: float(parts), self.some: float(parts > 0)}

    def _copy(self) -> None:
        """The rows (hiding), for what calls keep."""
        sent: dict[tuple[str, Level], tuple[Terms, Terms]] = {use: ([], []) for use in self.used}
        for (index, layout, level), k in self.flows.kept.items():
            flow = self.problem.flows[index]
            if self.flows.keeps_on_host(flow, level):
                share = flow.count / self.problem.calls[flow.block]
                size = share * self.problem.costs.local_bytes(flow.meta, layout)
                key = Key("copies", flow.block, flow.tensor, level.name)
                ways = ((Account.SENT, self.host.to_host), (Account.FETCHED, self.host.to_device))
                for terms, (account, rate) in zip(sent[flow.block, level], ways):
                    self.statement.charge(account, key, k, size / rate)
                    terms.append((k, size / rate))
        computed: dict[tuple[str, Level], tuple[Terms, Terms]] = {use: ([], []) for use in self.used}
        for (index, level), zs in self.choices.z.items():
            decision = self.problem.decisions[index]
            for z, option in zip(zs, decision.options) if level.on_host else ():
                again = option.seconds.forward * decision.runs_again.get(level, 0.0)
                forward, backward = computed[decision.block, level]
                forward.append((z, option.seconds.forward))
                backward.append((z, option.seconds.backward + again))
        for use in self.used:
            for side, copies, computing in zip(("forward", "backward"), sent[use], computed[use]):
                self._longer(side, copies, computing, 1.0)

    def _on_its_way(self, block: str) -> None:
        """The variable D_b."""
        on_its_way = self.statement.least(Quantity.BYTES)
        self.statement.charge(Account.DEVICE, Key("working", block, "copies"), on_its_way, 1.0)
        for level in (level for where, level in self.used if where == block):
            terms: Terms = []
            most = 0.0
            for (index, layout, at), j in self.flows.in_call.items():
                flow = self.problem.flows[index]
                if at is level and flow.block == block:
                    size = 2 * flow.count / self.problem.calls[block]
                    size *= self.problem.costs.local_bytes(flow.meta, layout)
                    terms.append((j, size))
                    most += size
            self.statement.above(on_its_way, [*terms, (self.used[block, level], most)], -most)

    def _state(self) -> None:
        """The row (state), the variable X, and the memory of the optimizer's state."""
        self.statement.row([(self.parts, 1.0), (self.some, -float(PARTS))], upper=0.0)
        part = self.problem.optimizer_state / PARTS
        stays = [
            (x, decision.count * option.memory[STORED])
            for decision, xs in zip(self.problem.decisions, self.choices.x)
            for x, option in zip(xs, decision.options)
            if option.master_only
        ]
        self.statement.row([(self.parts, part), *stays], upper=self.problem.optimizer_state, quantity=Quantity.BYTES)
        self.statement.charge(Account.DEVICE, Key("state", "", "on the host"), self.parts, -part)
        self.statement.charge(Account.HOST, Key("state"), self.parts, part)
        self.statement.charge(Account.DEVICE, Key("buffers", "", "state"), self.some, self.problem.staging)
        forward = [
            (charge.variable, charge.amount)
            for charge in self.statement.accounts[Account.TIME]
            if charge.key.category == "forward"
        ]
        each, once = part / self.host.both_ways, 1 / self.problem.micro_batches
        self.statement.charge(Account.SENT, Key("copies", "", "state"), self.parts, once * each)
        self._longer("update", [(self.parts, each)], forward, once)

    def _longer(self, side: str, copies: Terms, computing: Terms, part: float) -> None:
        self.statement.longer(Key("copies", "", side), copies, computing, self.host.interference, part)
