"""What a run reports of its steps: taken down as each is launched, and read once the device has gone on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from nnscaler.cli.log import RunLog

Read = Callable[[], Mapping[str, float | None]]  # waits for the device, and gives numbers by name


class Reports:
    """The reports that the log does not have yet.

    loss  the mean loss of a label, of the last step that was read
    """

    def __init__(self, loss: float | None) -> None:
        self.loss = loss
        self._unread: dict[int, list[Read]] = {}
        self._unwritten: dict[int, dict[str, float | None]] = {}

    def add(self, step: int, read: Read) -> None:
        """Takes a part of what a step reports."""
        self._unread.setdefault(step, []).append(read)

    def read(self, before: float = inf) -> None:
        """Reads the reports of all steps, or of those before one. Waits for what they are about."""
        for step in [step for step in self._unread if step < before]:
            found = self._unwritten.setdefault(step, {})
            for read in self._unread.pop(step):
                found.update(read())
            self.loss = found.get("loss", self.loss)

    def write(self, log: RunLog, before: float = inf) -> None:
        """Reads them, and writes all that have been read."""
        self.read(before)
        for step, found in self._unwritten.items():
            log.write(step, found)
        self._unwritten.clear()
