"""What a choice of options costs: the program's objective and memory, added up plainly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from nnscaler.placement import Placements
from nnscaler.planner.problem import Option, Problem, Use
from nnscaler.planner.program import decision_seconds, flow_seconds, storage


@dataclass
class Evaluation:
    """Seconds a micro-batch and bytes a device, each by (category, block, name)."""

    seconds: dict[tuple[str, str, str], float] = field(default_factory=dict)
    memory: dict[tuple[str, str, str], float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def largest(self, count: int) -> list[tuple[tuple[str, str, str], float]]:
        """The items that take most memory, largest first."""
        return sorted(self.memory.items(), key=lambda item: -item[1])[:count]


def evaluate(problem: Problem, chosen: list[int]) -> Evaluation | None:
    """The cost of option `chosen[d]` for each decision d; None where a tensor cannot be resharded as needed."""
    return _Evaluator(problem, [d.options[o] for d, o in zip(problem.decisions, chosen, strict=True)]).run()


@dataclass
class _Evaluator:
    problem: Problem
    options: list[Option]
    result: Evaluation = field(default_factory=Evaluation)
    kept: set[tuple[int, Placements]] = field(default_factory=set)
    again: set[tuple[int, Placements]] = field(default_factory=set)

    def run(self) -> Evaluation | None:
        for decision, option in zip(self.problem.decisions, self.options):
            key = (decision.kind, decision.block, decision.name)
            self._add(self.result.seconds, key, decision.count * decision_seconds(decision, option.seconds))
            self._add(self.result.memory, key, decision.count * option.memory)
        for index in range(len(self.problem.flows)):
            if not self._reshard(index):
                return None
            self._keep(index)
        for index, layout in self.kept:
            flow = self.problem.flows[index]
            size = flow.count * self.problem.costs.local_bytes(flow.meta, layout)
            self._add(self.result.memory, ("saved", flow.block, flow.tensor), size)
        self._peaks()
        return self.result

    @staticmethod
    def _add(totals: dict[tuple[str, str, str], float], key: tuple[str, str, str], value: float) -> None:
        if value:
            totals[key] = totals.get(key, 0.0) + value

    def _made(self, index: int) -> Placements:
        decision, output = self.problem.flows[index].producer
        return self.options[decision].outputs[output]

    def _used(self, use: Use) -> Placements:
        return self.options[use[0]].inputs[use[1]]

    def _reshard(self, index: int) -> bool:
        flow = self.problem.flows[index]
        source = self._made(index)
        for target in {self._used(consumer) for consumer in flow.consumers} - {source}:
            seconds = flow_seconds(self.problem, flow, source, target)
            if seconds is None:
                return False
            self._add(self.result.seconds, ("reshard", flow.block, flow.tensor), flow.count * seconds)
        return True

    def _keep(self, index: int) -> None:
        flow = self.problem.flows[index]
        if flow.saved:
            self._keep_made(index, self.kept)
        for users, kept in ((flow.saved_by, self.kept), (flow.again_by, self.again)):
            for use in users:
                target = storage(self._used(use))
                borrowed = flow.held or flow.view_of is not None
                if borrowed and storage(self._made(index)) == target:
                    self._keep_made(index, kept)
                else:
                    kept.add((index, target))

    def _keep_made(self, index: int, kept: set[tuple[int, Placements]]) -> None:
        flow = self.problem.flows[index]
        layout = self._made(index)
        while flow.view_of is not None:
            layout = self.options[flow.producer[0]].inputs[0]
            index = flow.view_of
            flow = self.problem.flows[index]
        if not flow.held:
            kept.add((index, storage(layout)))

    def _peaks(self) -> None:
        """The one operator, and the one recomputed part, that hold most while they run."""
        working = [
            (option.transient, decision.block, decision.name)
            for decision, option in zip(self.problem.decisions, self.options)
        ]
        size, block, name = max(working)
        self._add(self.result.memory, ("working", block, name), size)
        again: dict[str, float] = defaultdict(float)
        for index, layout in self.again:
            flow = self.problem.flows[index]
            again[flow.block] += self.problem.costs.local_bytes(flow.meta, layout)
        if again:
            block, size = max(again.items(), key=lambda item: item[1])
            self._add(self.result.memory, ("recomputed", block, ""), size)
