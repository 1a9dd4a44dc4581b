"""Medians of the slowest device, against a clock that the test sets."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from nnscaler.hardware.communication import CopyRates
from nnscaler.profiler import collectives, copies, timing
from nnscaler.profiler.collectives import COLLECTIVES, World, measure, table

CPU = torch.device("cpu")


class Clock:
    """Calls take seconds of this clock; `other`: those of the other rank, for a call in the median."""

    def __init__(self, monkeypatch, takes, other: float = 0.0) -> None:
        self.now, self.takes, self.calls, self.reduced = 0.0, takes, 0, []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        ranks = SimpleNamespace(barrier=lambda: None, ReduceOp=SimpleNamespace(MAX="max"), all_reduce=self._reduce)
        monkeypatch.setattr(timing, "dist", ranks)
        self.other = other

    def _reduce(self, value, how) -> None:
        assert how == "max"
        value.clamp_(min=self.other)

    def call(self) -> None:
        self.now += self.takes(self.calls)
        self.calls += 1


@pytest.mark.parametrize(("seconds", "repeats"), [(1.0, 3), (0.01, 10), (1e-5, 100)])
def test_a_call_is_repeated_for_a_tenth_of_a_second(monkeypatch, seconds, repeats):
    clock = Clock(monkeypatch, lambda index: seconds)
    assert timing.slowest_median(clock.call, CPU) == pytest.approx(seconds)
    assert clock.calls == 2 + repeats, "the first opens connections, the second tells how long one takes"


def test_one_that_was_disturbed_does_not_count(monkeypatch):
    clock = Clock(monkeypatch, lambda index: {0: 9.0, 3: 5.0}.get(index, 1.0))
    assert timing.slowest_median(clock.call, CPU) == 1.0
    assert timing.slowest_median(Clock(monkeypatch, lambda index: 1.0, other=2.0).call, CPU) == 2.0


def test_messages_double_until_they_are_slow(monkeypatch):
    """Six processes on two nodes: groups of 2 and 3 of a node, of 2, and of all."""
    asked = []

    def prepared(collective, elements, size, group, device):
        asked.append((collective, elements, size))
        assert group == f"group of {size}"
        return elements

    monkeypatch.setattr(collectives, "_prepared", prepared)
    monkeypatch.setattr(collectives, "slowest_median", lambda call, device: 0.6 if call >= 500 else 1e-3 * call)
    groups = SimpleNamespace(new_subgroups_by_enumeration=lambda ranks: (f"group of {len(ranks[0])}", None))
    monkeypatch.setattr(collectives, "dist", groups)
    monkeypatch.setattr(collectives, "LARGEST", {"gloo": 2**12})
    times = measure(World(1, 6, 3, "gloo", CPU))
    assert {(name, *group) for name, group in times.curves} == {
        (name, *group) for name in COLLECTIVES for group in ((3, 3), (2, 1), (6, 3))
    }
    # 256 numbers in 1 KiB are 255 for three devices; and 1023 are not tried.
    assert [each for each in asked if each[::2] == ("all_gather", 3)] == [("all_gather", n, 3) for n in (255, 510)]
    assert times.curves["all_reduce", (3, 3)] == ((1020, 0.255), (2040, 0.6))
    assert times.source.startswith("measured over gloo on 2 x 3 cpu, torch ")
    assert "        1020     2.550e-01    0.00" in table(times)


def test_copies_both_ways_have_ended_when_both_have(monkeypatch):
    """Against streams that write down what they do: one way runs in another stream, and the time is of both."""
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append((self.name, "waits for", other.name))

    class Buffer:
        def __init__(self, size, dtype, pin_memory=False, device=None):
            self.place = "host" if pin_memory else str(device)

        def copy_(self, source, non_blocking):
            said.append((inside[-1], source.place, self.place))

    @contextmanager
    def stream(one):
        inside.append(one.name)
        yield
        inside.pop()

    def timed(call, device):
        call()
        calls.append(said.copy())
        said.clear()
        return {1: 0.5, 2: 0.25, 3: 1.0}[len(calls)]

    calls, inside = [], ["now"]
    cuda = SimpleNamespace(Stream=lambda device: Stream("other"), current_stream=lambda device: Stream("now"))
    cuda.stream = stream
    monkeypatch.setattr(copies, "torch", SimpleNamespace(cuda=cuda, empty=Buffer, uint8=torch.uint8))
    monkeypatch.setattr(copies, "slowest_median", timed)
    rates = copies.measure_copies(torch.device("cuda:0"))
    assert rates == CopyRates(2 * copies.SIZE, 4 * copies.SIZE, copies.SIZE)
    there, back, both = calls
    assert there == [("now", "cuda:0", "host")]
    assert back == [("now", "host", "cuda:0")]
    assert both == [
        ("other", "waits for", "now"), ("other", "host", "cuda:0"), ("now", "cuda:0", "host"),
        ("now", "waits for", "other"),
    ]  # fmt: skip


def test_buffers_of_each_collective(monkeypatch):
    """Twelve numbers in the larger buffer, of four devices."""
    called = []
    for name in ("all_gather_single", "reduce_scatter_single"):
        monkeypatch.setattr(collectives, name, lambda *tensors, group, name=name: called.append((name, tensors, group)))
    exchange = {
        name: lambda *tensors, group, name=name: called.append((name, tensors, group))
        for name in ("all_reduce", "all_to_all_single")
    }
    monkeypatch.setattr(collectives, "dist", SimpleNamespace(**exchange))
    for name in COLLECTIVES:
        collectives._prepared(name, 12, 4, "these", CPU)()
    assert [(name, [len(one) for one in tensors], group) for name, tensors, group in called] == [
        ("all_reduce", [12], "these"), ("all_gather_single", [12, 3], "these"),
        ("reduce_scatter_single", [3, 12], "these"), ("all_to_all_single", [12, 12], "these"),
    ]  # fmt: skip
    there, here = called[-1][1]
    assert there.data_ptr() != here.data_ptr()


def test_on_a_gpu_the_device_is_timed_and_waits_until_the_host_is_ahead(monkeypatch):
    """Calls take 2, 9 and 4 ms of the device; the host's clock stands still."""
    said, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    takes = iter([2.0, 9.0, 4.0])

    def call():
        said.append("call")
        now[0] += next(takes)

    cuda = SimpleNamespace(
        Event=Event, _sleep=lambda cycles: said.append(cycles), synchronize=lambda: said.append("waits")
    )
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "dist", SimpleNamespace(barrier=lambda: said.append("together")))
    assert timing._median_seconds(call, torch.device("cuda"), 3) == pytest.approx(4e-3)
    assert said == ["together", 3 * timing.AHEAD, "call", "call", "call", "waits"]
