"""Steps whose loss or gradient is not finite. They change nothing and are named in the log; many in a row end
training."""

from __future__ import annotations

import logging
import math
from collections import deque

from nnscaler.errors import UserError
from nnscaler.runtime.reading import Reading

logger = logging.getLogger(__name__)

MOST = 10  # steps in a row


class FiniteSteps:
    """Is told the gradient's norm of every step. Where it is not finite, the optimizer has changed nothing.

    A norm is looked at one step late, so that nothing waits for the step that the device has just begun.

    skipped    how many steps have changed nothing
    in_a_row   how many of them were the last ones
    """

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.in_a_row = 0
        self._pending: deque[tuple[int, Reading]] = deque()
        self._last = 0  # the step looked at last

    def after(self, step: int, norm: Reading) -> None:
        """Takes the norm of a step. Raises as `settle` does."""
        self._pending.append((step, norm))
        self.look(leave=1)
        self._stop_after_many()

    def settle(self) -> None:
        """Looks at all norms. Raises UserError, on all ranks alike, after MOST in a row that are not finite."""
        self.look()
        self._stop_after_many()

    def look(self, leave: int = 0) -> None:
        """Looks at all norms but the last ones, so that `skipped` and `in_a_row` count those steps too."""
        while len(self._pending) > leave:
            self._last, reading = self._pending.popleft()
            (norm,) = reading.numbers()
            if math.isfinite(norm):
                self.in_a_row = 0
                continue
            self.skipped += 1
            self.in_a_row += 1
            logger.warning("step %d: the loss or the gradient is not finite; nothing is updated", self._last)

    def _stop_after_many(self) -> None:
        if self.in_a_row >= MOST:
            raise UserError(
                f"the loss or the gradient of steps {self._last - self.in_a_row + 1} to {self._last} is not finite: "
                "training stops, with the weights of the step before; a lower learning_rate, or a clip_gnorm of 1, may "
                "help"
            )
