"""What a step reports is read when the next one has been launched, and not before: nothing waits for it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler.cli.reports import Reports
from nnscaler.cli.trainer import Trainer
from nnscaler.runtime.module import ParallelModule
from nnscaler.runtime.optimizer import ShardedOptimizer
from tests import tiny
from tests.checkpoint.jobs import job
from tests.parity import Case

STEPS = 5


class Reads(TorchDispatchMode):
    """Writes down that a number of a model, which are fractions, is asked for."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.events.append("read")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What a run does with its model, in order."""
    found: list[str] = []

    def noting(what: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(args[0], torch.Tensor) or args[0].is_floating_point():
                found.append(what)
            return call(*args, **kwargs)

        return noted

    monkeypatch.setattr(ParallelModule, "accumulate", noting("forward", ParallelModule.accumulate))
    monkeypatch.setattr(ShardedOptimizer, "step", noting("update", ShardedOptimizer.step))
    for name in ("tolist", "numpy", "cpu"):  # which dispatch nothing that says so
        monkeypatch.setattr(torch.Tensor, name, noting("read", getattr(torch.Tensor, name)))
    return found


def test_a_step_is_launched_before_the_one_before_it_is_read(events, tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    with Reads(events):
        Trainer(job(Case(1, 1, accumulation=2), tmp_path, STEPS, "late")).run()
    begun = events[events.index("forward") :]
    launched = [index for index, event in enumerate(begun) if event in ("forward", "update")]
    assert [begun[index] for index in launched] == ["forward", "update"] * STEPS
    reads = [stop - start - 1 for start, stop in pairwise(launched)]
    assert not any(reads[::2]), "between forward and update"
    assert reads[1] == 0, "the first step's numbers, before the second is launched"
    assert all(reads[3::2]), "after that, they are read"
    lines = [json.loads(line) for line in (tmp_path / "runs" / "late" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in lines}) == STEPS


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, values))


def test_reports_are_written_in_order_once_they_may_be_read():
    asked: list[int] = []

    def numbers(step: int, **values: float) -> Any:
        return lambda: asked.append(step) or values

    log, reports = Log(), Reports(9.0)
    reports.add(1, numbers(1, loss=3.0))
    reports.write(log, before=1)
    assert (asked, log.lines, reports.loss) == ([], [], 9.0)
    reports.add(2, numbers(2, loss=2.0))
    reports.write(log, before=2)
    assert (asked, log.lines, reports.loss) == ([1], [(1, {"loss": 3.0})], 3.0)
    reports.read()  # as for a checkpoint
    assert (asked, len(log.lines), reports.loss) == ([1, 2], 1, 2.0)
    reports.add(2, numbers(2, eval_loss=4.0))
    reports.write(log)
    reports.write(log)
    assert log.lines[1:] == [(2, {"loss": 2.0, "eval_loss": 4.0})]
    reports.add(3, numbers(3, eval_loss=5.0))
    reports.read()
    assert reports.loss == 2.0, "as last reported"
