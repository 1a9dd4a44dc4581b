"""How a plan was searched for: in which limit of time, whether that ended the search, and what was found by when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

SHARES = (0.125, 0.25, 0.5, 1.0)  # of the limit, of which it is told what was found within them


@dataclass(frozen=True)
class Searched:
    """A search that is over.

    limit    processor seconds that it might take
    stopped  whether it ended because they were out, so that more of them could have found a faster plan
    found    (processor seconds since its beginning, predicted seconds of a step) of plans, in the order of time
    """

    limit: float
    stopped: bool
    found: Sequence[tuple[float, float]] = ()

    def best_within(self, limit: float) -> float | None:
        """Seconds of a step of the best plan that was found within so many processor seconds; None: none was."""
        best = min((step for spent, step in self.found if spent <= limit), default=inf)
        return best if best < inf else None

    def to_json(self) -> dict[str, Any]:
        """As plain values. Where the limit did not end the search, they do not depend on how fast the computer is."""
        values: dict[str, Any] = {"limit_seconds": self.limit, "stopped": self.stopped}
        if self.stopped:
            # Where the last plan took longer than the limit, it is what the limit led to all the same.
            limits = [(share * self.limit, inf if share == 1 else share * self.limit) for share in SHARES]
            values["found_within"] = [
                {"limit_seconds": limit, "step_seconds": self.best_within(until)} for limit, until in limits
            ]
        return values


@dataclass
class Findings:
    """What a search finds, while it goes on. `began`: by the clock that the search uses"""

    began: float
    found: list[tuple[float, float]] = field(default_factory=list)

    def add(self, now: float, step_seconds: float) -> None:
        """Notes a plan, if it is the best so far."""
        if not self.found or step_seconds < self.found[-1][1]:
            self.found.append((now - self.began, step_seconds))
