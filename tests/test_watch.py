"""A rank that waits too long looks for the others. Time passes in beats that the test gives."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from nnscaler import watch
from nnscaler.errors import UserError
from nnscaler.watch import Watch

BEAT = watch._BEAT


class Beats:
    """In the place of an event that would end the thread: each wait is a beat, in which something may happen."""

    def __init__(self, count: int, happens=lambda beat: None) -> None:
        self.count, self.happens, self.beat = count, happens, 0

    def wait(self, seconds: float) -> bool:
        self.beat += 1
        self.happens(self.beat)
        return self.beat > self.count


@pytest.fixture
def threads(monkeypatch):
    """What threads would have run."""
    made: list[str] = []

    def thread(target, daemon):
        assert daemon, "it keeps no process from ending"
        return SimpleNamespace(start=lambda: made.append(target.__name__))

    monkeypatch.setattr(watch.threading, "Thread", thread)
    return made


def of(store: dist.Store, rank: int, world: int) -> Watch:
    return Watch(store, rank, world, timedelta(seconds=3 * BEAT))


def test_it_looks_for_the_others_after_its_patience_without_a_step(threads):
    watched = of(dist.HashStore(), 0, 1)
    watched._stop = Beats(7)
    watched._run()
    assert threads == ["_run", "explain", "explain"], "after three beats, and after six"


@pytest.mark.parametrize(("local_rank", "looks"), [("0", True), ("1", False), ("11", False)])
def test_each_rank_gives_signs_of_life_and_the_first_of_a_node_looks_for_the_others(
    threads, monkeypatch, local_rank, looks
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    store, seen = dist.HashStore(), []
    watched = of(store, 11, 12)
    watched._stop = Beats(3, lambda beat: seen.append(store.get("beat/11").decode() if beat > 1 else "none"))
    watched._run()
    assert seen == ["none", "1", "2", "3"]
    assert not store.check(["beat/1"])
    assert threads == ["_run", *["explain"] * looks]
    watched.store = SimpleNamespace(set=lambda key, value: (_ for _ in ()).throw(RuntimeError("the store is gone")))
    watched._stop = Beats(9)
    watched._run()
    assert watched._stop.beat == 1


def test_with_a_step_in_time_it_does_not(threads):
    watched = of(dist.HashStore(), 0, 1)
    watched._stop = Beats(12, lambda beat: watched.reached(beat) if beat % 2 else None)
    watched._run()
    assert threads == ["_run"]


def test_it_names_those_that_are_silent_and_those_behind(threads, caplog):
    store = dist.HashStore()
    for rank, (host, step) in enumerate([("a", 5), ("a", 5), ("b", 4), ("b", 3)]):
        store.set(f"here/{rank}", host)
        store.set(f"step/{rank}", str(step))
        store.set(f"beat/{rank}", "1")
    store.set("step/4", "4")
    store.set("beat/4", "1")
    for mine, behind in ((0, ["rank 2 on b", "rank 4 on ?"]), (1, ["rank 2 on b", "rank 4 on ?"]), (2, [])):
        watched = of(store, mine, 5)
        beats = iter(range(2, 9))
        watched._stop = Beats(
            0,
            lambda _, mine=mine, beats=beats: [
                store.set(f"beat/{rank}", f"{mine} {next(beats)}") for rank in (0, 1, 2, 4)
            ],
        )
        caplog.clear()
        watched.explain()
        step = 5 if mine < 2 else 4
        assert [record.getMessage() for record in caplog.records] == [
            f"after step {step}: rank 3 on b gives no sign of life; its last step was 3",
            *(f"after step {step}: {one} is behind; its last step was 4" for one in behind),
        ]


def test_what_a_rank_ends_with_is_known_to_the_others(threads):
    store = dist.HashStore()
    mine, other = of(store, 0, 2), of(store, 1, 2)
    assert mine.failure() is None
    other.failed(UserError("no such row"))
    assert str(mine.failure()) == "no such row"
    other.store = SimpleNamespace(set=lambda key, value: (_ for _ in ()).throw(RuntimeError("the store is gone")))
    other.failed(UserError("no such row"))
