"""How the sequences of a step may be divided: among copies of the model, and over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from nnscaler.counting import counted
from nnscaler.errors import UserError


@dataclass(frozen=True, order=True)
class Division:
    """One way to divide them. Those with fewer devices a copy, and then with smaller micro-batches, come first.

    plan_ngpus        devices that a copy of the model is split over
    micro_batch_size  sequences that a copy computes at a time
    micro_batches     how many of these a copy computes in a step
    """

    plan_ngpus: int
    micro_batch_size: int
    micro_batches: int

    def __str__(self) -> str:
        split, each = counted(self.plan_ngpus, "device"), counted(self.micro_batch_size, "sequence")
        return f"{split} a copy, {self.micro_batches} x {each}"


@dataclass(frozen=True)
class Batch:
    """The sequences of a step, and what the user has fixed of their division; None: the planner chooses.

    sequences      that all copies train on in a step
    runtime_ngpus  devices in all
    others         as in `Division`
    """

    sequences: int
    runtime_ngpus: int
    plan_ngpus: int | None = None
    micro_batch_size: int | None = None
    micro_batches: int | None = None

    def divisions(self) -> list[Division]:
        """Every way to divide them, in order. Raises UserError where what the user has fixed allows none."""
        splits = [self.plan_ngpus] if self.plan_ngpus else divisors(self.runtime_ngpus)
        if self.runtime_ngpus % splits[0]:
            raise UserError(f"runtime_ngpus is {self.runtime_ngpus}; it must be a multiple of plan_ngpus={splits[0]}")
        found = [division for split in splits for division in self._of(split)]
        if not found:
            raise UserError(
                f"global_batch_size is {self.sequences}; {self._fixed()} it must be {self._allowed(splits)}"
            )
        return found

    def _of(self, plan_ngpus: int) -> Iterator[Division]:
        """The divisions with so many devices a copy."""
        each, rest = divmod(self.sequences, self.runtime_ngpus // plan_ngpus)
        for size in divisors(each) if not rest else ():
            if self.micro_batch_size in (None, size) and self.micro_batches in (None, each // size):
                yield Division(plan_ngpus, size, each // size)

    def _fixed(self) -> str:
        """What contradicts it, in words."""
        copies = f" (copies of the model: {self.runtime_ngpus // self.plan_ngpus})" if self.plan_ngpus else ""
        given = {
            "runtime_ngpus": self.runtime_ngpus, "plan_ngpus": self.plan_ngpus,
            "micro_batch_size": self.micro_batch_size, "grad_accumulation_steps": self.micro_batches,
        }  # fmt: skip
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        return f"with {', '.join(words)}{copies}"

    def _allowed(self, splits: list[int]) -> str:
        copies = sorted(self.runtime_ngpus // split for split in splits)
        of_copy = prod(filter(None, (self.micro_batch_size, self.micro_batches)))
        if self.micro_batch_size is None or self.micro_batches is None:
            return f"a multiple of {copies[0] * of_copy}"
        return " or ".join(str(count * of_copy) for count in copies)


def divisors(number: int) -> list[int]:
    """The whole numbers that divide it, the smallest first."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})
