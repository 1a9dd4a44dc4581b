"""How long a step of a schedule takes, by playing what each rank does against the clock.

A rank does one thing after another. A transfer begins when both sides have posted it and what went before it on the
same way, from one rank to another, is through; it takes its seconds beside computation. A rank that waits for a
transfer goes on when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nnscaler.schedules import Post, Program, Schedule, Transfer, Wait, Work


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a micro-batch in one stage. backward: whole; inputs, weights: of its parts where it is split."""

    forward: float
    backward: float
    inputs: float
    weights: float

    def of_first(self) -> StageSeconds:
        """The same in the first stage, of whose split backward torch leaves everything to the second part."""
        return replace(self, inputs=0.0, weights=self.inputs + self.weights)

    def of(self, kind: str) -> float:
        return {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[kind]


@dataclass(frozen=True)
class Span:
    """Work of a rank from `start` to `end`, in seconds from the step's beginning."""

    rank: int
    work: Work
    start: float
    end: float


@dataclass
class Timeline:
    """A simulated step: what ran when, and the seconds until the last rank was through."""

    spans: list[Span] = field(default_factory=list)
    seconds: float = 0.0

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank)


def simulate(
    schedule: Schedule, programs: Sequence[Program], stages: Sequence[StageSeconds], transfers: Sequence[float]
) -> Timeline:
    """Plays `programs(schedule)`.

    stages     seconds of each stage
    transfers  seconds from stage s to s + 1, and of the gradient back, for each s but the last
    """
    return _Player(schedule, programs, stages, transfers).play()


@dataclass
class _Player:
    schedule: Schedule
    programs: Sequence[Program]
    stages: Sequence[StageSeconds]
    transfers: Sequence[float]
    clocks: list[float] = field(default_factory=list)
    posted: dict[Transfer, float] = field(default_factory=dict)  # by one side, when
    done: dict[Transfer, float] = field(default_factory=dict)
    way_free: dict[tuple[int, int], float] = field(default_factory=dict)  # (from rank, to rank) -> when
    timeline: Timeline = field(default_factory=Timeline)

    def play(self) -> Timeline:
        self.clocks = [0.0] * len(self.programs)
        places = [0] * len(self.programs)
        waiting = True
        while waiting:
            before = list(places)
            for rank, program in enumerate(self.programs):
                while places[rank] < len(program) and self._do(rank, program[places[rank]]):
                    places[rank] += 1
            waiting = any(place < len(program) for place, program in zip(places, self.programs))
            assert places != before or not waiting, f"every rank of {self.schedule} waits for another"
        self.timeline.seconds = max(self.clocks)
        return self.timeline

    def _do(self, rank: int, step: Work | Post | Wait) -> bool:
        """Whether a rank could take its next step."""
        if isinstance(step, Work):
            start = self.clocks[rank]
            self.clocks[rank] += self.stages[step.stage].of(step.kind)
            self.timeline.spans.append(Span(rank, step, start, self.clocks[rank]))
        elif isinstance(step, Post):
            for transfer in step.transfers:
                self._post(transfer, self.clocks[rank])
        elif all(transfer in self.done for transfer in step.transfers):
            self.clocks[rank] = max([self.clocks[rank], *(self.done[transfer] for transfer in step.transfers)])
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
