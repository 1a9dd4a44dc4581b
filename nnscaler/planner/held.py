"""Bytes that the units of a block hold while they run: the data of `nnscaler.planner.working`, as sums over choices.

Each function gives a sum and its largest value. Where a piece of a unit runs, of each tensor there is but a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from nnscaler.placement import Placements
from nnscaler.planner.choices import Choices
from nnscaler.planner.flows import Flows, Form
from nnscaler.planner.options import Option
from nnscaler.planner.problem import Decision, Flow, Port
from nnscaler.planner.statement import Terms

Sum = tuple[Terms, float]  # a sum, and its largest value
Part = Callable[[Flow], float]  # which part of a flow there is, 0 to 1

OUTSIDE = inf  # the place of a block's results among its units


def whole(flow: Flow) -> float:
    return 1.0


def total(parts: Iterable[Sum]) -> Sum:
    """The sum of several sums."""
    sums = list(parts)
    return [term for terms, _ in sums for term in terms], sum(most for _, most in sums)


class Held:
    """What the units of one block hold.

    flows     (index, flow) of the block's flows
    units     index -> decision, of its units
    weighted  indices of units that use a trained weight
    """

    def __init__(self, choices: Choices, flows: Flows, block: str) -> None:
        self.choices, self.problem, self.of_flows, self.block = choices, choices.problem, flows, block
        self.flows = [(index, flow) for index, flow in enumerate(self.problem.flows) if flow.block == block]
        decisions = enumerate(self.problem.decisions)
        self.units = {index: one for index, one in decisions if one.block == block and one.kind == "unit"}
        weights = [flow for _, flow in self.flows if flow.is_parameter and flow.meta.requires_grad]
        self.weighted = {use for flow in weights for use, _ in flow.consumers}

    def place(self, index: int) -> float:
        """The place of a decision among the units: -1 for the block's inputs and weights, OUTSIDE for its results."""
        decision = self.problem.decisions[index]
        if decision.kind == "unit":
            return decision.place
        return OUTSIDE if decision.kind == "output" else -1

    def region(self, index: int) -> int | None:
        decision = self.problem.decisions[index]
        return decision.region if decision.kind == "unit" else None

    def made(self, flows: Iterable[Flow], part: Part = whole) -> Sum:
        """Flows as they are made."""
        return total(_scaled(self.of_flows.size(flow), part(flow)) for flow in flows)

    def used(self, flow: Flow, index: int, times: float = 1.0) -> Sum:
        """A flow as a unit uses it."""
        place = next(place for use, place in flow.consumers if use == index)
        options = self.units[index].options
        sizes = [times * self._bytes(flow, option.inputs[place]) for option in options]
        return list(zip(self.choices.x[index], sizes)), max(sizes)

    def alone(self, index: int, over: bool = True, part: Part = whole) -> Sum:
        """w_i, or w'_i where not `over`."""
        decision = self.units[index]
        if decision.fused:
            sizes = [self._fused(index, option, over, part) for option in decision.options]
        else:
            sizes = [self._transient(index, option, part) for option in decision.options]
        return [(x, size) for x, size in zip(self.choices.x[index], sizes) if size], max(sizes)

    def _bytes(self, flow: Flow, layout: Placements) -> float:
        return self.problem.costs.local_bytes(flow.meta, layout)

    def inner(self, index: int, part: Part = whole) -> Sum:
        """Inner tensors of a unit that backward keeps. They are divided as the smallest of its tensors are."""
        xs, decision = self.choices.x[index], self.units[index]
        least = 1.0 if part is whole else min(part(flow) for _, flow in self.flows if self._is_of(flow, index))
        sizes = [least * option.inner_bytes for option in decision.options]
        return [(x, size) for x, size in zip(xs, sizes) if size], max(sizes)

    def _is_of(self, flow: Flow, index: int) -> bool:
        return flow.producer[0] == index or any(use == index for use, _ in flow.consumers)

    def _transient(self, index: int, option: Option, part: Part) -> float:
        """Bytes of a product or registered operator. What it needs besides tensors is divided as the smallest are."""
        if part is whole:
            return option.transient
        all_of = there = 0.0
        least = 1.0
        for _, flow in self.flows:
            layouts = [option.inputs[place] for use, place in flow.consumers if use == index]
            layouts += [option.outputs[flow.producer[1]]] if flow.producer[0] == index else []
            size = sum(self._bytes(flow, layout) for layout in layouts)
            all_of, there = all_of + size, there + size * part(flow)
            least = min(least, part(flow)) if layouts else least
        return there + max(option.transient - all_of, 0.0) * least

    def _fused(self, index: int, option: Option, over: bool, part: Part) -> float:
        """Bytes that a fused cluster holds beside what is kept."""
        given = made = in_place = rounded = forward = rewritten = 0.0
        for _, flow in self.flows:
            for use in flow.consumers:
                if use[0] == index and not flow.is_parameter:
                    size = part(flow) * self._bytes(flow, option.inputs[use[1]])
                    forward += 0.0 if flow.needed else size
                    made += size if flow.meta.requires_grad else 0.0
                    by_fp8 = self.region(flow.producer[0]) == self.region(index) and self.rounds(flow.producer[0])
                    in_place += size if flow.meta.requires_grad and not by_fp8 else 0.0
            if flow.producer[0] == index:
                size = part(flow) * self._bytes(flow, option.outputs[flow.producer[1]])
                forward += size
                beside = self._beside(index, flow)
                given += size * max(len(beside), 1) if flow.meta.requires_grad else 0.0
                rewritten += size if flow.meta.requires_grad and len(beside) == len(flow.consumers) else 0.0
                rounded += size / flow.meta.dtype.itemsize if any(map(self.rounds, beside)) else 0.0
        over = over and self.units[index].elementwise
        return max(forward, given + made + rounded - (min(rewritten, in_place) if over else 0.0))

    def rounds(self, index: int) -> bool:
        """Whether a unit is a product in fp8: its backward takes what it reads, and its gradient, rounded."""
        return any(option.rounded for option in self.problem.decisions[index].options)

    def makes_for_fp8(self, index: int) -> bool:
        """Whether backward of a unit makes once more, rounded, what products in fp8 read of it."""
        made = [flow for _, flow in self.flows if flow.producer[0] == index]
        return any(self.rounds(use) for flow in made for use in self._beside(index, flow))

    def copies(self, flow: Flow, of: Callable[[Decision], bool]) -> Sum:
        """The copies in fp8 of a flow that products of these units have in regions that are given it: one in each."""
        users: dict[int | None, Port] = {}
        for index, place in flow.consumers if not flow.is_parameter else ():
            given = self.region(index) != self.region(flow.producer[0])
            if given and self.rounds(index) and of(self.units[index]):
                users.setdefault(self.region(index), (index, place))
        return total(self._copy(flow, use) for use in users.values())

    def _copy(self, flow: Flow, use: Port) -> Sum:
        index, place = use
        options = self.units[index].options
        sizes = [
            self.of_flows.bytes_of(flow, Form(option.inputs[place], rounded=True)) if place in option.rounded else 0
            for option in options
        ]
        return [(x, float(size)) for x, size in zip(self.choices.x[index], sizes) if size], float(max(sizes))

    def _beside(self, index: int, flow: Flow) -> set[int]:
        """The units that use a flow in the region of the unit that makes it."""
        region = self.problem.decisions[index].region
        return {use for use, _ in flow.consumers if self.region(use) == region} if region is not None else set()

    def waiting(self, first: float, last: float) -> Sum:
        """Gradients of tensors from before the unit at place `first` that are used after the one at `last`."""
        return self.made(
            flow
            for _, flow in self.flows
            if flow.meta.requires_grad and not flow.is_parameter and self.place(flow.producer[0]) < first
            and any(self.place(use) > last for use, _ in flow.consumers)
        )  # fmt: skip

    def held_by_caller(self, decision: Decision) -> Sum:
        """Gradients of the region's results, which backward of its first units needs no more."""
        if not self.problem.costs.fused or decision.region is None:
            return [], 0.0
        return self.made(
            flow
            for _, flow in self.flows
            if flow.meta.requires_grad and self.region(flow.producer[0]) == decision.region
            and self.place(flow.producer[0]) > decision.place
            and any(self.region(use) != decision.region for use, _ in flow.consumers)
        )  # fmt: skip

    def waiting_for(self, index: int) -> Sum:
        """h_i: of units that make the gradient of a weight from this unit's output, the gradients of their outputs.

        A product in fp8 has its own, rounded; another's count where they are no gradients of anything else.
        """
        decision = self.units[index]
        if not decision.fused:
            return [], 0.0
        readers = {
            use
            for _, flow in self.flows
            if flow.producer[0] == index
            for use in self._beside(index, flow) & self.weighted
        }
        return self.made(
            (
                flow
                for _, flow in self.flows
                if flow.producer[0] in readers
                and (self.rounds(flow.producer[0]) or all(
                    use in self.units and self.units[use].region == decision.region and self.units[use].reads
                    for use, _ in flow.consumers
                ))
            ),
            lambda flow: 1 / flow.meta.dtype.itemsize if self.rounds(flow.producer[0]) else 1.0,
        )  # fmt: skip

    def freed(self, first: float, last: float, own: frozenset[int] = frozenset()) -> list[tuple[int, Flow]]:
        """Of what is made by the unit at place `first` and after it, what no backward reads from the one at `last` on.

        own  places of units that make again what they read
        """
        return [
            (index, flow)
            for index, flow in self.flows
            if flow.needed and self.place(flow.producer[0]) >= first and min(flow.read_by - own, default=inf) > last
        ]


def _scaled(one: Sum, factor: float) -> Sum:
    terms, most = one
    return [(variable, factor * amount) for variable, amount in terms], factor * most
