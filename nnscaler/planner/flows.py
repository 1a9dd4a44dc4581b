"""How tensors get from the decisions that make them to those that use them: a part of the planning problem's program.

The rows (making), (using), (resharding), (again), (keeping) and (gathering) of `nnscaler.planner.program` stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import NamedTuple

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.choices import Choices
from nnscaler.planner.costs import NO_TIME, Seconds, narrow
from nnscaler.planner.options import Option
from nnscaler.planner.problem import Flow, Port, Problem
from nnscaler.planner.statement import Account, Terms, minus
from nnscaler.recompute import Level
from nnscaler.reshard import only_gathers, reshards, without_gradient


def resharding(problem: Problem, flow: Flow, source: Placements, target: Placements) -> Seconds | None:
    """Seconds of bringing a flow from one layout to another. None where that is impossible."""
    key = flow.meta, flow.is_parameter, in_fp8(problem, flow, source, target), source, target
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
    if in_fp8(problem, flow, source, target):
        seconds = problem.costs.resharding(narrow(flow.meta), source, needed)
    return Seconds(seconds.forward, sum(time for *_, time in problem.costs.each_gradient(flow.meta, source, needed)))


def beside(flow: Flow, source: Placements, target: Placements) -> bool:
    """Whether a flow is brought to another layout beside computation: it is a weight that is gathered."""
    return flow.is_parameter and only_gathers(reshards(source, target), flow.meta.requires_grad)


def in_fp8(problem: Problem, flow: Flow, source: Placements, target: Placements) -> bool:
    """Whether a flow is gathered in fp8."""
    return _only_in_fp8(problem, flow, target) and beside(flow, source, target)


def _only_in_fp8(problem: Problem, flow: Flow, layout: Placements) -> bool:
    """Whether a flow is a trained weight, and all that may use it in this layout are products in fp8."""
    if not (flow.is_parameter and flow.meta.requires_grad):
        return False
    used = False
    for index, place in flow.consumers:
        for option in problem.decisions[index].options:
            if option.inputs[place] == layout:
                used = True
                if place not in option.weights:
                    return False
    return used


def kept_in_fp8(problem: Problem, flow: Flow, layout: Placements) -> bool:
    """Whether a weight that is stored so is gathered in fp8, if it is gathered (on two axes: to one layout at least).
    Where only its master is stored, its shard is then rounded once a step, and kept."""
    used = {option.inputs[place] for index, place in flow.consumers for option in problem.decisions[index].options}
    return any(in_fp8(problem, flow, layout, target) for target in used)


def storage(layout: Placements) -> Placements:
    """The layout as far as memory is concerned: whether a gradient is partial does not matter."""
    return without_gradient(layout)


class Form(NamedTuple):
    """How a tensor is kept: in which layout; and whether in fp8: as the copy that a product has which multiplies so, or
    as it was gathered."""

    layout: Placements
    rounded: bool = False


class Flows:
    """Adds the variables, rows and charges of all flows to a program.

    resharded  index of a flow -> (from, to) -> its variable y
    pairs      (index of a flow, consumer) -> (from, to) -> its variable e
    again      (index of a flow, from, to) -> how often a micro-batch's backward does this again, as a sum
    kept       (index of a flow, form, level) -> the variable k
    in_call    (index of a flow, form, level) -> the variable j: whether one call would keep it so; for levels that
               keep on the host, and those inside groups
    gathered   (index of a flow, from, to) -> the variable g: backward gathers it again
    """

    def __init__(self, choices: Choices) -> None:
        self.choices, self.problem, self.statement = choices, choices.problem, choices.statement
        self.resharded: dict[int, dict[tuple[Placements, Placements], int]] = {}
        self.pairs: dict[tuple[int, Port], dict[tuple[Placements, Placements], int]] = {}
        self.again: dict[tuple[int, Placements, Placements], Terms] = {}
        self.kept: dict[tuple[int, Form, Level], int] = {}
        self.in_call: dict[tuple[int, Form, Level], int] = {}
        self.gathered: dict[tuple[int, Placements, Placements], int] = {}
        self._narrow: dict[tuple[int, Placements], bool] = {}  # what `_comes_in_fp8` has found
        for index in range(len(self.problem.flows)):
            self._flow(index)

    def _calls(self, block: str, index: int, level: Level | None, fits: Callable[[Option], bool]) -> Terms:
        """How many calls of `block` at `level` have an option of a decision that fits, as a sum.

        level  None: of one call, whether it would
        """
        decision = self.problem.decisions[index]
        matching = [o for o, option in enumerate(decision.options) if fits(option)]
        if level is None:
            return [(self.choices.x[index][option], 1.0) for option in matching]
        if decision.block == block and (index, level) in self.choices.z:
            return [(self.choices.z[index, level][option], 1.0) for option in matching]
        return [(self.choices.x[index][option], float(self.problem.calls[block])) for option in matching]

    def layouts(self, port: Port, side: str) -> dict[Placements, Terms]:
        """Layout -> the sum that is 1 where a decision makes (`side` "outputs") or uses ("inputs") a tensor in it."""
        decision, index = port
        found: dict[Placements, Terms] = {}
        for option, x in zip(self.problem.decisions[decision].options, self.choices.x[decision]):
            found.setdefault(getattr(option, side)[index], []).append((x, 1.0))
        return found

    def bytes_of(self, flow: Flow, form: Form) -> int:
        """Bytes of a flow in a form, if it is kept: one for each element of what is in fp8."""
        size = self.problem.costs.local_bytes(flow.meta, form.layout)
        return size // flow.meta.dtype.itemsize if form.rounded else size

    def gathered_bytes(self, flow: Flow, source: Placements, target: Placements) -> int:
        """Bytes of a weight in another layout than it is stored in."""
        return self.bytes_of(flow, Form(target, in_fp8(self.problem, flow, source, target)))

    def _forms(self, flow: Flow, use: Port) -> dict[Form, None]:
        """The forms in which a unit may keep what it uses of a flow."""
        index, place = use
        return dict.fromkeys(self._form(flow, option, place) for option in self.problem.decisions[index].options)

    def _form(self, flow: Flow, option: Option, place: int) -> Form:
        """The form in which a unit keeps an input, if it keeps it."""
        layout = option.inputs[place]
        comes = place in option.weights and self._comes_in_fp8(flow, layout)
        return Form(layout, comes or place in option.rounded)

    def _comes_in_fp8(self, flow: Flow, target: Placements) -> bool:
        """Whether a weight is gathered in fp8 wherever it is brought to a layout."""
        key = id(flow), target
        if key not in self._narrow:
            self._narrow[key] = _only_in_fp8(self.problem, flow, target) and self._is_only_gathered(flow, target)
        return self._narrow[key]

    def _is_only_gathered(self, flow: Flow, target: Placements) -> bool:
        producer, place = flow.producer
        sources = {option.outputs[place] for option in self.problem.decisions[producer].options}
        brought = [one for one in sources if storage(one) != storage(target) and reshards(one, target) is not None]
        return all(beside(flow, one, target) for one in brought)

    def alone(self, flow: Flow) -> dict[Placements, int]:
        """Layout -> the variable of the option that stores a parameter's master weight alone in it."""
        decision, place = flow.producer
        options = zip(self.problem.decisions[decision].options, self.choices.x[decision])
        return {option.outputs[place]: x for option, x in options if option.master_only}

    def size(self, flow: Flow, smallest: bool = False) -> tuple[Terms, float]:
        """Bytes of a flow as it is made, as a sum, and its largest value.

        smallest  at most as many as it has in any form in which it may be kept for a use
        """
        layouts = self.layouts(flow.producer, "outputs")
        sizes = {layout: self.problem.costs.local_bytes(flow.meta, layout) for layout in layouts}
        if smallest:
            used = [form for use in flow.consumers for form in self._forms(flow, use)]
            made_again = self.problem.costs.fused and any(form.rounded for form in used)
            least = 0 if made_again else min((self.bytes_of(flow, form) for form in used), default=inf)
            sizes = {layout: int(min(size, least)) for layout, size in sizes.items()}
        return [(x, sizes[layout]) for layout, xs in layouts.items() for x, _ in xs], max(sizes.values())

    def more_as_used(self, index: int, part: float = 1.0) -> tuple[Terms, float]:
        """Bytes by which a part of a flow is more as it is used than as it is made, where it is resharded in between:
        a sum, and its largest value."""
        flow, larger = self.problem.flows[index], {}
        for (before, after), y in self.resharded[index].items():
            sizes = [self.problem.costs.local_bytes(flow.meta, layout) for layout in (before, after)]
            larger.update({y: part * (sizes[1] - sizes[0])} if sizes[1] > sizes[0] else {})
        return list(larger.items()), max(larger.values(), default=0.0)

    def _flow(self, index: int) -> None:
        """All rows of one flow."""
        flow = self.problem.flows[index]
        made = self.layouts(flow.producer, "outputs")
        resharded: dict[tuple[Placements, Placements], int] = {}
        for consumer in flow.consumers:
            pairs = self.pairs[index, consumer] = self._pairs(flow, made, self.layouts(consumer, "inputs"))
            for (source, target), e in pairs.items():
                if source == target:
                    continue
                if (source, target) not in resharded:
                    resharded[source, target] = self._reshard(index, source, target)
                self.statement.above(resharded[source, target], [(e, 1.0)])
        self.resharded[index] = resharded
        again = self._gather_again(index, made, resharded)
        inside = {level.inner for level in self.problem.levels[flow.block]}
        for level in self.problem.levels[flow.block]:
            self._keep(index, level, set(map(storage, made)), again, level in inside and not self.is_shared(flow))

    def _reshard(self, index: int, source: Placements, target: Placements) -> int:
        """Makes the variable y_fps and its charges, and the rows (again)."""
        flow = self.problem.flows[index]
        seconds = resharding(self.problem, flow, source, target) or NO_TIME
        place = (flow.block, flow.tensor, f"{format_placements(source)} -> {format_placements(target)}")
        hidden = beside(flow, source, target)
        forward, backward = (Account.FORWARD, Account.BACKWARD) if hidden else (Account.TIME, Account.TIME)
        y = self.statement.least(bound=1.0)
        self.statement.charge(forward, Key("reshard", *place), y, flow.count * seconds.forward)
        self.statement.charge(backward, Key("reshard backward", *place), y, flow.count * seconds.backward)
        calls = float(self.problem.calls[flow.block])
        again = self.again[index, source, target] = []
        key = Key("reshard again", *place)
        for level in self.problem.levels[flow.block]:
            times = flow.reshards_again.get(level, 0.0)
            if times and flow.block not in self.choices.n:
                again.append((y, flow.count * times))
            elif times and seconds.forward:
                repeated = self.statement.least(bound=calls)
                again.append((repeated, flow.count / calls * times))
                self.statement.above(repeated, [(self.choices.n[flow.block][level], 1.0), (y, calls)], -calls)
            else:
                continue
            self.statement.charge(backward, key, again[-1][0], again[-1][1] * seconds.forward)
        return y

    def _pairs(
        self, flow: Flow, made: dict[Placements, Terms], used: dict[Placements, Terms]
    ) -> dict[tuple[Placements, Placements], int]:
        """(from, to) -> the variable e of one consumer; and the rows (making) and (using)."""
        pairs = {
            (source, target): self.statement.product(made[source], used[target])
            for source in made
            for target in used
            if source == target or resharding(self.problem, flow, source, target) is not None
        }
        making: dict[Placements, Terms] = {source: [] for source in made}
        using: dict[Placements, Terms] = {target: [] for target in used}
        for (source, target), e in pairs.items():
            making[source].append((e, 1.0))
            using[target].append((e, 1.0))
        for source, xs in made.items():
            self.statement.row(making[source] + minus(xs), 0.0, 0.0)
        for target, xs in used.items():
            self.statement.row(using[target] + minus(xs), 0.0, 0.0)
        return pairs

    def _keep(
        self, index: int, level: Level, made: set[Placements], again: dict[Placements, Terms], inside: bool
    ) -> None:
        """The rows (keeping) of one flow at one level. `inside`: whether it counts that groups keep it inside."""
        for form, calls in self._keeping(index, level, made, again):
            self.statement.above(self._kept(index, form, level), calls)
        if inside or self.keeps_on_host(self.problem.flows[index], level):
            for form, calls in self._keeping(index, level, made, again, of_one_call=True):
                if (index, form, level) not in self.in_call:
                    self.in_call[index, form, level] = self.statement.least(bound=1.0)
                self.statement.above(self.in_call[index, form, level], calls)

    def _keeping(
        self,
        index: int,
        level: Level,
        made: set[Placements],
        again: dict[Placements, Terms],
        of_one_call: bool = False,
    ) -> Iterator[tuple[Form, Terms]]:
        """(form, how many calls keep the flow in it, as a sum), for each reason to keep it at this level.

        of_one_call  instead, whether one call would
        """
        flow = self.problem.flows[index]

        def calls(decision: int, fits: Callable[[Option], bool]) -> Terms:
            return self._calls(flow.block, decision, None if of_one_call else level, fits)

        def making(layout: Placements) -> Terms:
            decision, place = flow.producer
            return calls(decision, lambda option: storage(option.outputs[place]) == layout)

        if level in flow.as_made and not flow.is_parameter:
            for layout in made:
                yield Form(layout), making(layout)
        as_resharded = flow.as_resharded.get(level, ())
        for use in [*flow.as_used.get(level, ()), *as_resharded]:
            for form in self._forms(flow, use):
                terms = calls(use[0], self._keeps(flow, form, use[1]))
                made_again = form.rounded and use not in flow.copied.get(level, ())
                if flow.is_parameter or use in as_resharded or made_again:
                    terms = terms + minus(making(storage(form.layout)))
                share = 1 / self.problem.calls[flow.block] if of_one_call else 1.0
                terms = terms + [(g, share * factor) for g, factor in again.get(form.layout, [])]
                # A region that runs again has kept what it was given.
                in_fp8 = form.rounded and (flow.is_parameter or use not in as_resharded)
                yield Form(storage(form.layout), in_fp8), terms

    def _keeps(self, flow: Flow, form: Form, place: int) -> Callable[[Option], bool]:
        return lambda option: self._form(flow, option, place) == form

    def keeps_on_host(self, flow: Flow, level: Level) -> bool:
        """Whether a level keeps a flow on the host, if it keeps it: not parameters, nor what several calls share."""
        return level.on_host and not flow.is_parameter and not self.is_shared(flow)

    def is_shared(self, flow: Flow) -> bool:
        """Whether several calls of its block have the same tensor."""
        return flow.count < self.problem.calls[flow.block]

    def _gather_again(
        self, index: int, made: dict[Placements, Terms], resharded: dict[tuple[Placements, Placements], int]
    ) -> dict[Placements, Terms]:
        """The rows (gathering), for one flow: target layout -> the sum -N_b sum_p g_fps."""
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
                self.statement.charge(Account.BACKWARD, key, g, flow.count * seconds.forward)
                self.again[index, source, target].append((g, float(flow.count)))
                self.statement.row([(g, 1.0), *minus(made[source])], upper=0.0)
                used = [x for use in flow.consumers for x in self.layouts(use, "inputs").get(target, [])]
                self.statement.row([(g, 1.0), *minus(used)], upper=0.0)
                terms.setdefault(target, []).append((g, -float(self.problem.calls[flow.block])))
                self.gathered[index, source, target] = g
        return terms

    def kept_by_one_call(self, block: str, level: Level) -> Terms:
        """Bytes that one call keeps of flows, where `in_call` has them, and of inner tensors: a sum."""
        terms: Terms = []
        for (index, form, at), j in self.in_call.items():
            flow = self.problem.flows[index]
            if at is level and flow.block == block:
                terms.append((j, flow.count / self.problem.calls[block] * self.bytes_of(flow, form)))
        for decision, xs in zip(self.problem.decisions, self.choices.x):
            if decision.block == block and level in decision.inner_kept_at:
                inner = zip(xs, decision.options)
                terms += [(x, option.inner_bytes) for x, option in inner if option.inner_bytes]
        return terms

    def _kept(self, index: int, form: Form, level: Level) -> int:
        """The variable k_fsl; it is made, with its charges, when it is first asked for."""
        if (index, form, level) not in self.kept:
            flow, calls = self.problem.flows[index], self.problem.calls[self.problem.flows[index].block]
            variable = self.statement.least(bound=float(calls))
            size = flow.count / calls * self.problem.in_flight * self.bytes_of(flow, form)
            size /= 1 if self.is_shared(flow) else level.size
            where = Account.HOST if self.keeps_on_host(flow, level) else Account.DEVICE
            self.statement.charge(where, Key("saved", flow.block, flow.tensor, level.name), variable, size)
            self.kept[index, form, level] = variable
        return self.kept[index, form, level]
