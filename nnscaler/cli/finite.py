"""Steps whose loss or gradient is not finite. They change nothing and are named in the log; many in a row end
training."""

from __future__ import annotations

import logging
import math
from collections import deque

import torch
from torch import Tensor

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

MOST = 10  # steps in a row


class FiniteSteps:
    """Is told the gradient's norm of every step. Where it is not finite, the optimizer has changed nothing.

    On a GPU, a norm is looked at one step late, so that nothing waits for the step that the device has just begun.

    skipped    how many steps have changed nothing
    in_a_row   how many of them were the last ones
    """

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.in_a_row = 0
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def after(self, step: int, norm: Tensor) -> None:
        """Takes the norm of a step. Raises as `settle` does."""
        copied = None
        if norm.is_cuda:
            norm, copied = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append((step, norm, copied))
        while len(self._pending) > (1 if copied is not None else 0):
            self._look()

    def settle(self) -> None:
        """Looks at all norms. Raises UserError, on all ranks alike, after MOST in a row that are not finite."""
        while self._pending:
            self._look()

    def _look(self) -> None:
        step, norm, copied = self._pending.popleft()
        if copied is not None:
            copied.synchronize()
        if math.isfinite(norm.item()):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        logger.warning("step %d: the loss or the gradient is not finite; nothing is updated", step)
        if self.in_a_row == MOST:
            raise UserError(
                f"the loss or the gradient of steps {step - MOST + 1} to {step} is not finite: training stops, with "
                "the weights of the step before; a lower learning_rate, or a clip_gnorm of 1, may help"
            )
