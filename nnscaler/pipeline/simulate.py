"""How long a step of a schedule takes: what each rank does is played against a clock.

A rank does one thing after the other. A transfer begins when both of its sides have started it, and when the transfer
before it between the same two ranks, in the same direction, is done. It runs beside computation. A rank that waits
for a transfer goes on when that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nnscaler.schedules import Action, Compute, Post, Schedule, Transfer


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a micro-batch in one stage.

    forward   its forward
    backward  its whole backward, where that is not split
    inputs    where it is split: the part for the gradient of the stage's input
    weights   where it is split: the part for the gradients of the stage's weights
    """

    forward: float
    backward: float
    inputs: float
    weights: float

    def of(self, kind: str) -> float:
        """Seconds of a `Compute` of this kind."""
        return {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[kind]


@dataclass(frozen=True)
class Span:
    """A rank computes `work` from `start` to `end`, in seconds from the step's beginning."""

    rank: int
    work: Compute
    start: float
    end: float


@dataclass
class Timeline:
    """A simulated step.

    spans    what the ranks compute, and when
    seconds  when the last rank is done, from the step's beginning
    """

    spans: list[Span] = field(default_factory=list)
    seconds: float = 0.0

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank)


def simulate(
    schedule: Schedule, actions: Sequence[Sequence[Action]], stages: Sequence[StageSeconds], transfers: Sequence[float]
) -> Timeline:
    """Plays a step, and says when what ran.

    actions    what each rank does, see `nnscaler.schedules.actions`
    stages     seconds of each stage
    transfers  for each stage but the last, seconds of a transfer to the next stage, and as many of its gradient back
    """
    return _Player(schedule, actions, stages, transfers).play()


@dataclass
class _Player:
    schedule: Schedule
    actions: Sequence[Sequence[Action]]
    stages: Sequence[StageSeconds]
    transfers: Sequence[float]
    clocks: list[float] = field(default_factory=list)
    posted: dict[Transfer, float] = field(default_factory=dict)  # by one side, when
    done: dict[Transfer, float] = field(default_factory=dict)
    way_free: dict[tuple[int, int], float] = field(default_factory=dict)  # (from rank, to rank) -> when
    timeline: Timeline = field(default_factory=Timeline)

    def play(self) -> Timeline:
        self.clocks = [0.0] * len(self.actions)
        places = [0] * len(self.actions)
        waiting = True
        while waiting:
            before = list(places)
            for rank, own in enumerate(self.actions):
                while places[rank] < len(own) and self._do(rank, own[places[rank]]):
                    places[rank] += 1
            waiting = any(place < len(own) for place, own in zip(places, self.actions))
            assert places != before or not waiting, f"every rank of {self.schedule} waits for another"
        self.timeline.seconds = max(self.clocks)
        return self.timeline

    def _do(self, rank: int, action: Action) -> bool:
        """Whether a rank could do its next action."""
        if isinstance(action, Compute):
            start = self.clocks[rank]
            self.clocks[rank] += self.stages[action.stage].of(action.kind)
            self.timeline.spans.append(Span(rank, action, start, self.clocks[rank]))
        elif isinstance(action, Post):
            for transfer in action.transfers:
                self._post(transfer, self.clocks[rank])
        elif all(transfer in self.done for transfer in action.transfers):
            self.clocks[rank] = max([self.clocks[rank], *(self.done[transfer] for transfer in action.transfers)])
        else:
            return False
        return True

    def _post(self, transfer: Transfer, now: float) -> None:
        if transfer not in self.posted:
            self.posted[transfer] = now
            return
        way = self.schedule.rank_of(transfer.stage), self.schedule.rank_of(transfer.target)
        begin = max(now, self.posted[transfer], self.way_free.get(way, 0.0))
        seconds = self.transfers[min(transfer.stage, transfer.target)]
        self.done[transfer] = self.way_free[way] = begin + seconds
