"""What a solution costs: the program's objective and memory, added up plainly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from nnscaler.placement import Placements, format_placements
from nnscaler.plan import Key
from nnscaler.planner.options import Option
from nnscaler.planner.problem import Flow, Problem, Use
from nnscaler.planner.program import Solution, beside, resharding, storage


@dataclass
class Evaluation:
    """Seconds a micro-batch and bytes a device.

    beside  seconds of what runs beside computation: gathering weights, and the exchange of each parameter's gradient
            (once a step, or in each micro-batch). By how much forward and backward take longer for all of it is among
            the seconds, as `exchange`
    weights  of the seconds, those in which backward makes gradients of weights
    """

    seconds: dict[Key, float] = field(default_factory=dict)
    memory: dict[Key, float] = field(default_factory=dict)
    beside: dict[Key, float] = field(default_factory=dict)
    weights: float = 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def seconds_beside(self, side: str) -> float:
        """All that runs beside `forward`, or beside `backward`."""
        return sum(value for key, value in self.beside.items() if (key.category == "reshard") == (side == "forward"))

    def largest(self, count: int) -> list[tuple[Key, float]]:
        """The items that take most memory, largest first."""
        return sorted(self.memory.items(), key=lambda item: -item[1])[:count]


def evaluate(problem: Problem, solution: Solution) -> Evaluation | None:
    """The cost of a solution; None where a tensor cannot be resharded as needed."""
    options = [d.options[o] for d, o in zip(problem.decisions, solution.chosen, strict=True)]
    return _Evaluator(problem, solution, options).run()


@dataclass
class _Evaluator:
    problem: Problem
    solution: Solution
    options: list[Option]
    result: Evaluation = field(default_factory=Evaluation)

    def run(self) -> Evaluation | None:
        forward = backward = last = buffers = 0.0
        for decision, option in zip(self.problem.decisions, self.options):
            place = (decision.block, decision.name)
            if decision.kind == "parameter":
                self._time(Key("update", *place), decision.count * option.seconds.forward)
                spread = option.last / self.problem.micro_batches
                self.result.beside[Key("exchange", *place)] = decision.count * (option.seconds.backward + spread)
                last += decision.count * option.last
                buffers += decision.count * option.buffers
            else:
                self._time(Key("forward", *place), decision.count * option.seconds.forward)
                self._time(Key("backward", *place), decision.count * option.seconds.backward)
                forward += decision.count * option.seconds.forward
                backward += decision.count * option.seconds.backward
                for level in sorted(decision.again) if decision.count else ():
                    calls = self._calls(decision.block, {level})
                    self._time(Key("again", *place, level), calls * option.seconds.forward)
            self._hold(Key(decision.kind, *place), decision.count * option.memory)
            for level in sorted(decision.inside) if decision.count else ():
                held = self._calls(decision.block, {level}) * self.problem.in_flight
                self._hold(Key("inside", *place, level), held * option.inside)
        for index, flow in enumerate(self.problem.flows):
            again = index in self.solution.gathered_again
            if not self._reshard(flow, again):
                return None
            self._keep(flow, again)
        self._time(Key("exchange", "", "forward"), self._longer(self.result.seconds_beside("forward"), forward))
        others = 1 - 1 / self.problem.micro_batches
        each = self.result.seconds_beside("backward") - last / self.problem.micro_batches
        longer = others * self._longer(each, backward) + (1 - others) * self._longer(each + last, backward)
        self._time(Key("exchange", "", "backward"), longer)
        self._weights()
        self._working(min(buffers, self.problem.buffers))
        return self.result

    def _longer(self, exchange: float, computing: float) -> float:
        """Seconds by which exchange makes the computing beside it longer."""
        lost = self.problem.costs.hardware.interference
        return max(lost * exchange, exchange - (1 - lost) * computing)

    def _time(self, key: Key, value: float) -> None:
        if value:
            self.result.seconds[key] = self.result.seconds.get(key, 0.0) + value

    def _beside(self, key: Key, value: float) -> None:
        if value:
            self.result.beside[key] = self.result.beside.get(key, 0.0) + value

    def _hold(self, key: Key, value: float) -> None:
        if value:
            self.result.memory[key] = self.result.memory.get(key, 0.0) + value

    def _calls(self, block: str, levels: frozenset[str] | set[str]) -> int:
        return sum(count for level, count in self.solution.levels[block].items() if level in levels)

    def _made(self, flow: Flow) -> Placements:
        decision, output = flow.producer
        return self.options[decision].outputs[output]

    def _used(self, use: Use) -> Placements:
        return self.options[use[0]].inputs[use[1]]

    def _share(self, flow: Flow) -> float:
        """How much of a flow there is for each call of its block."""
        return flow.count / self.problem.calls[flow.block]

    def _reshard(self, flow: Flow, gathered_again: bool) -> bool:
        source = self._made(flow)
        for target in {self._used(consumer) for consumer in flow.consumers} - {source}:
            seconds = resharding(self.problem, flow, source, target)
            if seconds is None:
                return False
            place = (flow.block, flow.tensor, f"{format_placements(source)} -> {format_placements(target)}")
            calls = self._share(flow) * self._calls(flow.block, flow.again)
            take = self._time
            if beside(flow, source, target):
                calls += flow.count if gathered_again else 0
                take = self._beside
            take(Key("reshard", *place), flow.count * seconds.forward)
            take(Key("reshard backward", *place), flow.count * seconds.backward)
            take(Key("reshard again", *place), calls * seconds.forward)
        return True

    def _keep(self, flow: Flow, gathered_again: bool) -> None:
        source = storage(self._made(flow))
        for level, calls in self.solution.levels[flow.block].items():
            kept: set[Placements] = set()
            if level in flow.made and not flow.held:
                kept.add(source)
            moved = flow.moved.get(level, ())
            for use in [*flow.used.get(level, ()), *moved]:
                target = storage(self._used(use))
                if gathered_again and beside(flow, self._made(flow), self._used(use)):
                    continue
                if target != source or not (flow.held or use in moved):
                    kept.add(target)
            for layout in kept:
                size = self._share(flow) * calls * self.problem.costs.local_bytes(flow.meta, layout)
                self._hold(Key("saved", flow.block, flow.tensor, level), size * self.problem.in_flight)

    def _weights(self) -> None:
        """A product's backward takes as long for each input that needs a gradient, weights among them."""
        needing: dict[int, list[Flow]] = defaultdict(list)
        for flow in self.problem.flows:
            for decision, _ in flow.consumers:
                if flow.meta.requires_grad:
                    needing[decision].append(flow)
        for index, flows in needing.items():
            unit, option = self.problem.decisions[index], self.options[index]
            if unit.kind == "unit":
                share = sum(flow.held for flow in flows) / len(flows)
                self.result.weights += share * unit.count * option.seconds.backward

    def _working(self, buffers: float) -> None:
        """What the one operator holds that holds most while it runs; what backward of a block computes again where no
        call keeps it; and the buffers."""
        size, block, name = max(
            (option.transient, decision.block, decision.name)
            for decision, option in zip(self.problem.decisions, self.options)
        )
        self._hold(Key("working", block, name), size)
        for flow in self.problem.flows:
            if flow.needed and not self.solution.levels[flow.block].get("none"):
                size = self.problem.costs.local_bytes(flow.meta, self._made(flow))
                self._hold(Key("working", flow.block, "backward"), size)
        self._hold(Key("buffers"), buffers)
        if any(key.category == "reshard" for key in self.result.beside):
            self._hold(Key("buffers", "", "gathered early"), self.problem.early)
