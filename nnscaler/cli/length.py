"""How long a run is: how many steps it takes, and on how many samples it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnscaler.cli.config import TrainerArgs
from nnscaler.counting import counted
from nnscaler.errors import UserError


@dataclass(frozen=True)
class RunLength:
    """When a run ends.

    steps    optimizer steps in all, with those of earlier runs that it continues
    samples  how many samples it trains on in all, so that its last step may not be full; None: epochs follow each other
             without an end
    rows     of the dataset
    """

    steps: int
    samples: int | None
    rows: int

    @staticmethod
    def of(args: TrainerArgs, rows: int, step_samples: int, step: int, consumed: int) -> RunLength:
        """The length of a run that continues after `step` and `consumed` samples. Raises UserError where no step is
        left."""
        if args.max_train_steps is not None:
            return RunLength(args.max_train_steps, None, rows)
        samples = max(1, round((args.num_train_epochs or 1.0) * rows))
        left = max(0, samples - consumed) / step_samples
        steps = step + (math.floor(left) if args.incomplete_step == "drop" else math.ceil(left))
        if steps == 0:
            raise UserError(
                f"a step takes {step_samples} samples, and there are {samples} to train on; --incomplete_step train "
                "trains with these"
            )
        return RunLength(steps, samples, rows)

    def after(self, consumed: int, step_samples: int) -> int:
        """How many samples are consumed after one more step."""
        return consumed + step_samples if self.samples is None else min(self.samples, consumed + step_samples)

    def describe(self, consumed: int) -> str:
        """What was seen, and what is left, for people."""
        of = -consumed % self.rows if self.samples is None else self.samples - consumed
        where = " of this epoch" if self.samples is None else ""
        epochs = f"{consumed / self.rows:.2f} epochs of {counted(self.rows, 'sample')} each"
        return f"{counted(consumed, 'sample')} seen, which is {epochs}; {counted(of, 'sample')}{where} left"
