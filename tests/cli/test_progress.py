"""What a run reports of its steps, against numbers worked out by hand and a clock that the test sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.cli import progress
from nnscaler.cli.progress import Progress, StepSize
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.runtime import reading

CPU, ONE = torch.device("cpu"), torch.tensor(1.0)


def test_each_report_is_of_the_steps_since_the_one_before(monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(reading, "time", clock)
    now = 100.0
    found = Progress(StepSize(6, 32, Mesh((2,), 2), None, None), 10, True, CPU)
    reports = []
    for step, seconds in ((11, 2.0), (12, 4.0), (13, 1.0), (14, 3.0), (15, 8.0)):
        now += seconds
        found.add(torch.tensor(3.0 * step, dtype=torch.float64), SimpleNamespace(labels=6, padding=48), ONE)
        if step == 14:
            with found.paused():
                now += 50.0
        if step in (12, 14, 15):
            reports.append(found.report(step)())
    assert [report["seconds_per_step"] for report in reports] == pytest.approx([3.0, 2.0, 8.0])
    speeds = [6 * 32 / 4 / seconds for seconds in (3.0, 2.0, 8.0)]  # of a device
    assert [report["tokens_per_second_per_gpu"] for report in reports] == pytest.approx(speeds)
    # Both devices of a copy count the same labels.
    labels = [6 * steps / 2 / 4 / seconds for steps, seconds in ((2, 6.0), (2, 4.0), (1, 8.0))]
    assert [report["labels_per_second_per_gpu"] for report in reports] == pytest.approx(labels)
    assert [report["padding"] for report in reports] == pytest.approx([48 / 2 / (6 * 32)] * 3)
    assert [report["loss"] for report in reports] == pytest.approx([3 * 11.5 / 6, 3 * 13.5 / 6, 3 * 15 / 6])


def test_steps_that_are_not_finite_and_ranks_without_a_loss_count_for_nothing():
    size = StepSize(1, 1, Mesh((1,)), None, None)
    found, silent = Progress(size, 0, True, CPU), Progress(size, 0, False, CPU)
    for loss, norm in ((2.0, ONE), (float("nan"), torch.tensor(float("inf"))), (4.0, ONE)):
        for each in (found, silent):
            each.add(torch.tensor(loss, dtype=torch.float64), SimpleNamespace(labels=2, padding=0), norm)
    assert found.report(3)()["loss"] == pytest.approx(6 / 4)
    assert silent.report(3)()["loss"] is None
    assert found.report(4)()["loss"] is None, "of no step"


def test_losses_of_many_steps_are_summed_in_fp64():
    found = Progress(StepSize(1, 1, Mesh((1,)), None, None), 0, True, CPU)
    for loss, labels in ((2.0**24, 1), (1.0, 0)):
        found.add(torch.tensor(loss, dtype=torch.float64), SimpleNamespace(labels=labels, padding=0), ONE)
    assert found.report(2)()["loss"] == 2**24 + 1


def test_operations_over_what_devices_could_do_and_the_most_memory(monkeypatch):
    """Three steps of 6 sequences in 2 s each, on 4 GPUs of 50 operations a second: 0.75 sequences a second and GPU."""
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(progress, "Moment", lambda device: reading.Moment(CPU))
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(now))
    now = 100.0
    found = Progress(StepSize(6, 32, Mesh((2,), 2), (40.0, 20.0), 50.0), 0, True, CPU)
    unknown = Progress(StepSize(6, 32, Mesh((2,), 2), (40.0, 20.0), None), 0, True, CPU)
    on_cpu = Progress(StepSize(6, 32, Mesh((2,), 2), (40.0, 20.0), 50.0), 0, True, CPU)
    found._device = unknown._device = torch.device("cuda")
    now = 106.0
    report = found.report(3)()
    assert report["mfu"] == pytest.approx(40 * 0.75 / 50)
    assert report["mfu_causal"] == pytest.approx(20 * 0.75 / 50)
    assert report["peak_memory_gib"] == 1.5
    assert resets == [106.0], "the next report is of what comes after this one"
    assert not {"mfu", "mfu_causal"} & {*unknown.report(3)(), *on_cpu.report(3)()}


def test_labels_of_a_pipeline_are_counted_where_the_loss_is(monkeypatch):
    """Of 2 stages of 2 devices each, in 3 copies, the last stage's count 24 labels: 12 in all, as both see the same."""
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: now))
    now = 100.0
    found = Progress(StepSize(6, 32, PipelineMesh.of([(2,)] * 2, 3), None, None), 0, True, CPU)
    found.add(torch.tensor(48.0, dtype=torch.float64), SimpleNamespace(labels=24, padding=48), ONE)
    now = 102.0
    report = found.report(1)()
    assert report["labels_per_second_per_gpu"] == pytest.approx(24 / 2 / 2.0 / 12)
    assert report["padding"] == pytest.approx(48 / 2 / (6 * 32))
    assert report["tokens_per_second_per_gpu"] == pytest.approx(6 * 32 / 2.0 / 12)
    assert report["loss"] == pytest.approx(2.0)
