"""Stand-ins for what really communicates, and for an accelerator's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from nnscaler.runtime import collectives, host
from nnscaler.runtime.host import HostPool
from tests import threads
from tests.distributed import test_collectives as of_processes


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives among threads, see `tests.threads`."""
    dist = SimpleNamespace(
        all_reduce=threads.all_reduce, all_to_all_single=threads.all_to_all_single,
        get_rank=lambda: pytest.fail("of no group"), Work=object, ProcessGroup=object,
    )  # fmt: skip
    monkeypatch.setattr(collectives, "dist", dist)
    monkeypatch.setattr(of_processes, "dist", dist)
    for name in ("all_gather_single", "reduce_scatter_single"):
        monkeypatch.setattr(collectives, name, getattr(threads, name))


class Event(str):
    """The name of an event. The process may wait for it, too."""

    said: list[tuple[str, ...]]

    def synchronize(self) -> None:
        self.said.append(("the process", "waits for", self))


class Stream:
    """Records what it waits for, and in what it is the current one."""

    def __init__(self, name: str, said: list[tuple[str, ...]]) -> None:
        self.name, self.said, self.events = name, said, 0

    def wait_stream(self, other: Stream) -> None:
        self.said.append((self.name, "waits for", other.name))

    def wait_event(self, event: str) -> None:
        self.said.append((self.name, "waits for", event))

    def record_event(self) -> Event:
        self.events += 1
        event = Event(f"{self.name} {self.events}")
        event.said = self.said
        self.said.append((self.name, "records", event))
        return event


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[HostPool, list[tuple[str, ...]]]:
    """A pool as of an accelerator, and what its streams do."""
    said: list[tuple[str, ...]] = []
    now, pool = Stream("now", said), HostPool(torch.device("cpu"))
    pool._on_accelerator, pool._out, pool._back = True, Stream("out", said), Stream("back", said)

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        said.append(("in", stream.name))
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(host, "_page_locked", lambda size: torch.zeros(size, dtype=torch.uint8))
    return pool, said
