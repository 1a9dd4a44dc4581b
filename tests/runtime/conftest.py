"""Stand-ins for what really communicates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nnscaler.runtime import collectives
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
