"""The host asks a device for numbers and times without waiting; only reading them waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.runtime import reading
from nnscaler.runtime.reading import Moment, Reading

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def device(monkeypatch) -> SimpleNamespace:
    """A GPU as events see it: they are recorded at its `seconds`; and how often the host has waited for one."""
    gpu = SimpleNamespace(seconds=0.0, waits=0)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timed = enable_timing

        def record(self) -> None:
            self.at = gpu.seconds

        def synchronize(self) -> None:
            gpu.waits += 1

        def elapsed_time(self, later: Event) -> float:
            assert (self.timed, later.timed) == (True, True)
            assert gpu.waits
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return gpu


def test_numbers_are_those_of_when_they_were_asked_for():
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    found = Reading(tensor)
    tensor.zero_()
    assert found.numbers() == [1.0, 2.0, 3.0, 4.0]
    assert Reading(torch.tensor(5.0)).numbers() == [5.0]


def test_only_reading_waits_for_the_device(device):
    def to(place: str, non_blocking: bool) -> torch.Tensor:
        assert (place, non_blocking) == ("cpu", True)
        return torch.tensor([7.0])

    found = Reading(SimpleNamespace(is_cuda=True, to=to))
    assert device.waits == 0
    assert found.numbers() == [7.0]
    assert device.waits == 1


def test_the_time_between_two_moments_is_the_devices(device, monkeypatch):
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: 100.0 + device.seconds / 2))
    on_gpu, on_cpu = Moment(GPU), Moment(CPU)
    device.seconds = 6.0
    later = Moment(GPU), Moment(CPU)
    assert device.waits == 0
    assert on_gpu.until(later[0]) == 6.0
    assert on_cpu.until(later[1]) == 3.0
