"""Gradients that lie on the host take turns on the device: what comes, what goes, and when."""

from __future__ import annotations

import pytest
import torch

from nnscaler.runtime import gradients
from nnscaler.runtime.gradients import GradientOnHost, GradientSlots
from nnscaler.runtime.host import HostPool

Slots = tuple[GradientSlots, dict[str, GradientOnHost], list[str]]


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    """Two slots, three gradients of 2, 1 and 4 elements, and what is copied: "read" to the device, "write" back."""
    monkeypatch.setattr(gradients, "GRADIENT_SLOTS", 2)
    made = GradientSlots(16, 3, torch.device("cpu"))
    every = {name: GradientOnHost(made, 4 * size, torch.float32) for name, size in (("a", 2), ("b", 1), ("c", 4))}
    copied: list[str] = []
    for kind in ("read", "write"):
        own = getattr(HostPool, kind)

        def copy(pool, buffer, tensor, *given, kind=kind, own=own, **named):
            assert named == ({"now": False} if kind == "read" else {}), "computation goes on meanwhile"
            copied.append(f"{kind} {next(name for name, one in every.items() if one.buffer is buffer)}")
            own(pool, buffer, tensor, *given, **named)

        monkeypatch.setattr(HostPool, kind, copy)
    return made, every, copied


def said(copied: list[str]) -> str:
    found = ", ".join(copied)
    copied.clear()
    return found


def test_a_step_of_three_micro_batches(slots):
    """In the first none comes; in the others they come early, in the order of the one before; then none comes."""
    made, every, copied = slots
    for name, one in every.items():
        one.take(fresh=True).fill_(1.0)
        assert said(copied) == ""
        one.send()
        assert said(copied) == f"write {name}"
    for number, last in ((2.0, False), (3.0, True)):
        made.end_micro_batch(last=False)
        assert said(copied) == "read a, read b"
        for name, also in (("a", ", read c"), ("b", ""), ("c", "")):
            one = every[name]
            assert one.take().add_(1.0).eq(number).all()
            assert said(copied) == ""
            one.send()
            assert said(copied) == f"write {name}{also}"
        if last:
            made.end_micro_batch(last=True)
            assert said(copied) == ""
    assert [one.there.tolist() for one in every.values()] == [[3.0] * 2, [3.0], [3.0] * 4]
    assert every["a"].take().tolist() == [3.0] * 2
    assert said(copied) == "read a", "for the update"


def test_another_order_than_before_is_learned(slots):
    made, every, copied = slots
    a, b, c = every.values()
    for one in (a, b, c):
        one.take(fresh=True).fill_(1.0)
        one.send()
    made.end_micro_batch(last=False)
    assert said(copied) == "write a, write b, write c, read a, read b"
    c.take()
    assert said(copied) == "write a, read c", "what came first makes room"
    c.send()
    assert said(copied) == "write c", "it has had its turn"
    b.take()
    b.send()
    a.take()
    assert said(copied) == "write b, read a"
    a.send()
    made.end_micro_batch(last=False)
    assert said(copied) == "write a, read c, read b"


def test_who_was_used_last_stays_longest(slots):
    _, every, copied = slots
    a, b, c = every.values()
    for one, value in ((a, 1.0), (b, 2.0)):
        one.take(fresh=True).fill_(value)
    assert a.take(fresh=True).eq(1.0).all(), "it is here"
    c.take(fresh=True).fill_(3.0)
    assert said(copied) == "write b"
    b.fetch()
    assert said(copied) == "", "there is no room"
    assert b.take().tolist() == [2.0]
    assert said(copied) == "write a, read b"


def test_who_leaves_is_on_the_host_as_before_and_is_not_expected_again(slots):
    made, every, copied = slots
    a, b, _ = every.values()
    for one in (a, b):
        one.take(fresh=True).fill_(1.0)
        one.send()
    said(copied)
    a.fetch()
    a.fetch()
    assert said(copied) == "read a"
    a.take().fill_(9.0)
    a.leave()
    assert said(copied) == ""
    assert a.there.eq(1.0).all()
    made.end_micro_batch(last=False)
    assert said(copied) == "read b"
    assert a.take().eq(1.0).all()


def test_what_is_still_here_goes_back_at_the_end_of_a_micro_batch(slots):
    made, every, copied = slots
    every["c"].take(fresh=True).fill_(1.0)
    every["b"].take(fresh=True).fill_(2.0)
    made.end_micro_batch(last=True)
    assert said(copied) == "write c, write b"
    assert (every["b"].there.tolist(), every["c"].there.tolist()) == ([2.0], [1.0] * 4)
    made.end_micro_batch(last=False)
    assert said(copied) == "", "none was taken since"


def test_there_are_no_more_slots_than_gradients(monkeypatch):
    monkeypatch.setattr(gradients, "GRADIENT_SLOTS", 3)
    for count, slots in ((1, 1), (3, 3), (5, 3)):
        made = GradientSlots(16, count, torch.device("cpu"))
        assert [len(slot.bytes) for slot in made._free] == [16] * slots


def test_a_slot_is_waited_for_by_what_comes_there(streams, monkeypatch):
    """Two gradients and one slot, as on an accelerator."""
    pool, done = streams
    monkeypatch.setattr(gradients, "GRADIENT_SLOTS", 1)
    monkeypatch.setattr(gradients, "HostPool", lambda device: pool)
    made = GradientSlots(8, 2, pool.device)
    first, second = (GradientOnHost(made, 8, torch.float32) for _ in range(2))

    def steps() -> list[str]:
        found = [" ".join(step) for step in done]
        done.clear()
        return found

    assert steps() == ["now records now 1"]
    first.take(fresh=True)
    assert steps() == ["now waits for now 1"], "whoever had this memory before"
    first.send()
    assert steps() == ["out waits for now", "in out", "out records out 1"]
    second.take(fresh=True)
    assert steps() == ["now waits for out 1"], "until the first has left"
    first.take()
    assert steps() == [
        "out waits for now", "in out", "out records out 2",  # the second goes
        "back waits for out 2", "back waits for out 1", "in back", "back records back 1",  # into its place
        "now waits for out 2", "now waits for back 1",
    ]  # fmt: skip
    first.leave()
    assert steps() == ["now records now 2"]
    second.take()
    assert steps() == [
        "back waits for now 2", "back waits for out 2", "in back", "back records back 2", "now waits for now 2",
        "now waits for back 2",
    ]  # fmt: skip
