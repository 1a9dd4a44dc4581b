"""On SIGTERM and ctrl-C, the state after the last whole step is saved at once, whatever the current step is doing.

torchrun ends its processes 30 s after SIGTERM, and a step may take minutes. But weights and moments change only in the
update at the end of a step. Between two updates, a thread can save what the last one left, beside the computation. The
current step is given up when it comes to its own update.

All ranks must save after the same step. The thread of each rank is told by its own signal, or by another rank through
the store. It then says after which step its rank is, or that it is just updating. Where all ranks say the same step,
they begin to save; otherwise they ask again. Meanwhile no update can begin: it needs the lock `updating`, which the
thread holds. The thread itself never waits for that lock, so no rank waits for one that waits for it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 1.0  # seconds after which a further ctrl-C is the user's: before, torchrun may have passed the first one on
_POLL = 1.0  # seconds between two looks at whether another rank was told to end
_ASK = 0.05  # seconds between two looks at the others' answers
_PATIENCE = 60.0  # seconds for all ranks to answer
_BUSY, _LEAVING = -1, -2  # answers that are no step


class Termination:
    """A context in which neither SIGTERM nor the first ctrl-C ends the process.

    store   of the ranks; None: there is one rank
    name    another one at each start of the processes, since the store may outlive them
    step    gives the step after which the rank is, or None where that state must not be saved
    save    begins to save what the last update left; called on all ranks after the same step
    """

    def __init__(
        self, store: dist.Store | None, name: str, step: Callable[[], int | None], save: Callable[[], None]
    ) -> None:
        self.updating = threading.Lock()
        self._store, self._name, self._step, self._save = store, name, step, save
        self._rank = dist.get_rank() if store is not None else 0
        self._world = dist.get_world_size() if store is not None else 1
        self._told = threading.Event()
        self._leaving = False
        self._signals, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True, name="termination")
        self._interrupted: float | None = None  # when the first ctrl-C came
        self._previous: tuple[list[object], int] | None = None

    @property
    def told(self) -> bool:
        """Whether this rank knows that the run is to end."""
        return self._told.is_set()

    @property
    def interrupted(self) -> bool:
        """Whether this process got a ctrl-C."""
        return self._interrupted is not None

    def __enter__(self) -> Termination:
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._wake, False)
            handlers: list[object] = [signal.signal(number, self._on_signal) for number in _SIGNALS]
            # A handler runs between two lines of Python, which a long backward pass may put off; this does not wait.
            self._previous = handlers, signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.set_wakeup_fd(self._previous[1])
            for number, handler in zip(_SIGNALS, self._previous[0]):
                signal.signal(number, handler)  # type: ignore[arg-type]
        self.leave()
        os.write(self._wake, b"\0")
        self._thread.join(timeout=_PATIENCE)
        os.close(self._wake)
        os.close(self._signals)

    def leave(self) -> None:
        """From now on there are no updates, and the rank saves by itself. To be called while `updating` is held."""
        self._leaving = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted = self._interrupted or now
            if now - self._interrupted > _AGAIN:
                raise KeyboardInterrupt
        self._told.set()

    def _run(self) -> None:
        try:
            while not self._is_told():
                if self._leaving:
                    return
            self._told.set()
            logger.info(
                "told to end: what the last step left is saved; the current step goes on up to its update, which is "
                "not made (a further ctrl-C ends it at once)"
            )
            if self._store is not None:
                self._store.set(f"terminate/{self._name}", "")
            asked = 0
            while not self._leaving and not self._ask(asked):
                asked += 1
                time.sleep(_ASK)
        except RuntimeError as error:  # the store is gone, and so is the run
            logger.error("cannot save what the last step left: %s", error)

    def _is_told(self) -> bool:
        """Whether some rank has got the signal. Looks for _POLL seconds, or until this rank has."""
        readable, _, _ = select.select([self._signals], [], [], _POLL)
        if readable and not set(_SIGNALS).isdisjoint(os.read(self._signals, 64)):
            return True
        return self.told or (self._store is not None and self._store.check([f"terminate/{self._name}"]))

    def _ask(self, count: int) -> bool:
        """Asks all ranks once. Returns whether no further question is needed."""
        free = self.updating.acquire(blocking=False)
        try:
            step = self._step() if free else None
            answers = self._answers(count, _LEAVING if self._leaving else _BUSY if step is None else step)
            if _LEAVING in answers:
                return True
            agreed = len(answers) == 1 and _BUSY not in answers
            if agreed:
                self._save()
            return agreed
        finally:
            if free:
                self.updating.release()

    def _answers(self, count: int, mine: int) -> set[int]:
        """All ranks' answers to one question."""
        if self._store is None:
            return {mine}
        keys = [f"terminate/{self._name}/{count}/{rank}" for rank in range(self._world)]
        self._store.set(keys[self._rank], str(mine))
        deadline = time.monotonic() + _PATIENCE
        while not self._store.check(keys):
            if time.monotonic() > deadline:  # a rank is gone, and with it the run
                return {_LEAVING}
            time.sleep(_ASK)
        return {int(self._store.get(key)) for key in keys}
