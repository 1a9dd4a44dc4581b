"""Groups of calls that are computed again together, as a part of the planning problem's program.

See `nnscaler.planner.program`; and `nnscaler.recompute.levels` on levels of groups.

Sets      l a level of groups of g_l calls of block b; i its level inside, at which each of them keeps flows and inner
          tensors while the group is computed again
Data      L_bc        calls of the c-th chain of block b: groups do not reach over its end
Variables j_fsi       whether one call at level i would keep f in s
          W_bl >= 0   bytes that calls of a group keep while another one of them runs backward

subject to    sum of n_bl over l with g_l >= g  <= sum_c g floor(L_bc / g), for each size g of groups             (room)
              sum_l n_bl / N_b <= 1 + x_ds - x_d's for a layout s of what d makes, a call's result, and d', what
                   the next call takes                                                                           (alike)
              W_bl >= (g_l - 1) (sum_f b_fs n_f / N_b j_fsi + sum_d i_do x_do), if u_bl = 1                     (inside)
                   where i computes each region again by itself, g_l times, less the group's input, which counts as
                   kept; else all that the call needs which runs backward counts as computed again
W_bl is added in `nnscaler.planner.working`. The sizes divide one another: so groups that keep to (room) can be placed,
large ones first.
"""

from __future__ import annotations

from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows
from nnscaler.planner.problem import Stack
from nnscaler.planner.statement import Quantity, Terms
from nnscaler.recompute import Level


class InGroups:
    """Adds the variables and rows above to a program.

    inside  (block, level) -> the variable W, for levels of groups
    """

    def __init__(self, choices: Choices, flows: Flows) -> None:
        self.choices, self.flows, self.problem, self.statement = choices, flows, choices.problem, choices.statement
        self.inside: dict[tuple[str, Level], int] = {}
        for stack in self.problem.stacks:
            self._stack(stack)

    def _stack(self, stack: Stack) -> None:
        counts = {level: n for level, n in self.choices.n[stack.block].items() if level.size > 1}
        for size in {level.size for level in counts}:
            room = float(sum(length - length % size for length in stack.lengths))
            self.statement.row([(n, 1.0) for level, n in counts.items() if level.size >= size], upper=room)
        self._alike(stack, counts)
        for level in counts:
            terms, most = self._kept(stack, level)
            inside = self.inside[stack.block, level] = self.statement.least(Quantity.BYTES)
            self.statement.above(inside, [*terms, (self.choices.used(stack.block, level), most)], -most)

    def _alike(self, stack: Stack, counts: dict[Level, int]) -> None:
        """The row (alike)."""
        grouped = [(n, 1 / self.problem.calls[stack.block]) for n in counts.values()]
        given = self.flows.layouts((stack.given, 0), "outputs")
        for layout, taken in self.flows.layouts((stack.taken, 0), "outputs").items():
            rest = [(x, -factor) for x, factor in given.get(layout, [])]
            self.statement.row([*grouped, *taken, *rest], upper=1.0)

    def _kept(self, stack: Stack, level: Level) -> tuple[Terms, float]:
        """What a group keeps inside: a sum of bytes, and its largest value."""
        inner = level.of_each
        calls = level.size if inner.by_region else level.size - 1
        terms = [(variable, calls * size) for variable, size in self.flows.kept_by_one_call(stack.block, inner)]
        most = sum(size for _, size in terms)
        for flow in self.problem.flows if inner.by_region else ():
            if flow.producer == (stack.taken, 0) and flow.needed and inner in flow.as_made:
                for layout, made in self.flows.layouts(flow.producer, "outputs").items():
                    terms += [(x, -self.problem.costs.local_bytes(flow.meta, layout)) for x, _ in made]
        return terms, most
