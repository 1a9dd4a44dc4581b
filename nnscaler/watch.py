"""Signs of life of a run's processes: so that a run that hangs can say which ranks it waits for."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

_BEAT = 2.0  # seconds between signs of life


class Watch:
    """Gives this rank's signs of life, from a thread; and logs whose are missing when a step takes longer than
    `patience`.

    store     in which the ranks leave their signs of life
    patience  seconds without a step, after which the first rank of each node looks for the missing ones
    """

    def __init__(self, store: dist.Store, rank: int, world: int, patience: timedelta) -> None:
        self.store, self._rank, self._world, self.patience = store, rank, world, patience.total_seconds()
        self._stop = threading.Event()
        self._waited = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """To be called when this rank has done optimizer step `step`."""
        self.store.set(f"step/{self._rank}", str(step))
        self._waited = 0.0

    def failed(self, error: UserError) -> None:
        """Tells the other ranks what this rank ends with, in whatever they wait for it."""
        with suppress(RuntimeError):  # the store is gone: so are the others
            self.store.set("failed", str(error))

    def failure(self) -> UserError | None:
        """What another rank has ended with; None: that is not known."""
        return UserError(self.store.get("failed").decode()) if self.store.check(["failed"]) else None

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def explain(self) -> None:
        """Logs which ranks give no sign of life, or are behind this one. Takes some seconds."""
        before = self._read("beat")
        self._stop.wait(3 * _BEAT)
        after, steps = self._read("beat"), self._read("step")
        hosts = self._read("here")
        silent = [other for other in range(self._world) if before.get(other) == after.get(other)]
        mine = int(steps.get(self._rank, 0))
        behind = [other for other in range(self._world) if int(steps.get(other, 0)) < mine and other not in silent]
        for what, ranks in (("gives no sign of life", silent), ("is behind", behind)):
            for other in ranks:
                logger.error(
                    "after step %d: rank %d on %s %s; its last step was %s",
                    mine, other, hosts.get(other, "?"), what, steps.get(other, "none"),
                )  # fmt: skip

    def _read(self, kind: str) -> dict[int, str]:
        keys = {other: f"{kind}/{other}" for other in range(self._world)}
        return {other: self.store.get(key).decode() for other, key in keys.items() if self.store.check([key])}

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(_BEAT):
            count += 1
            try:
                self.store.set(f"beat/{self._rank}", str(count))
            except RuntimeError:  # the store is gone: so is the run
                return
            self._waited += _BEAT
            if self._waited >= self.patience and is_leader():
                self._waited = 0.0
                threading.Thread(target=self.explain, daemon=True).start()


def is_leader() -> bool:
    """Whether this process is the first one on its node."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
