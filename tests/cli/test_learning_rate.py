"""Factors of the learning rate against numbers worked out by hand, and the rate that a run really steps with."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nnscaler.checkpoint.folder import complete_checkpoints
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli import loop
from nnscaler.cli.config import LRSchedulerConfig
from nnscaler.cli.progress import StepSize
from nnscaler.cli.trainer import Trainer
from nnscaler.report.values import read_plan
from nnscaler.runtime.optimizer import OptimizerConfig
from tests import tiny
from tests.checkpoint.jobs import job
from tests.parity import Case

# Ten steps of which three warm up: 1/4, 2/4, 3/4, the peak in the fourth; six falling steps follow it.
WARM_UP = [0.25, 0.5, 0.75, 1.0]
FACTORS = {
    "constant": [*WARM_UP, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [*WARM_UP, *(0.2 + 0.8 * left / 7 for left in (6, 5, 4, 3, 2, 1))],
    # (1 + cos(pi * done / 7)) / 2
    "cosine": [*WARM_UP, *(0.2 + 0.8 * c for c in (0.950484, 0.811745, 0.611260, 0.388740, 0.188255, 0.049516))],
}


@pytest.mark.parametrize("schedule", FACTORS)
def test_factors(schedule):
    found = LRSchedulerConfig(schedule, warmup_steps=3, minimum=0.2)
    assert [found.factor(step, 10) for step in range(10)] == pytest.approx(FACTORS[schedule], abs=1e-6)
    end = 1.0 if schedule == "constant" else 0.2
    assert found.factor(10, 10) == found.factor(25, 10) == pytest.approx(end)  # continued past the planned end


def test_without_warm_up_the_first_step_has_the_peak_and_a_tenth_is_left():
    assert LRSchedulerConfig("linear").factor(0, 4) == 1.0
    assert LRSchedulerConfig("cosine").factor(2, 4) == pytest.approx(0.55)
    assert LRSchedulerConfig("cosine").factor(4, 4) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run():
    found = LRSchedulerConfig("cosine", warmup_steps=4)
    assert [found.factor(step, 4) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]


def test_a_run_steps_with_the_factors(tmp_path, monkeypatch):
    """Adam's first step changes every element with a gradient by the rate itself, whatever the gradient's size: norms,
    which begin at 1 and do not decay, show it."""
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    args = dataclasses.replace(
        job(Case(1, 1, accumulation=2, micro_batch=2), tmp_path, 4, "rate", interval=1, keep=0),
        optimizer=OptimizerConfig(lr=8e-3, eps=1e-12),
        lr_scheduler=LRSchedulerConfig("linear", warmup_steps=1, minimum=0.5),
    )
    sizes: list[StepSize] = []
    monkeypatch.setattr(loop, "StepSize", lambda *given: sizes.append(StepSize(*given)) or sizes[-1])
    Trainer(args).run()
    lines = [json.loads(line) for line in (tmp_path / "runs" / "rate" / "metrics.jsonl").open()]
    assert [line["lr"] for line in lines] == pytest.approx(
        [4e-3, 8e-3, 8e-3 * (0.5 + 0.5 * 2 / 3), 8e-3 * (0.5 + 0.5 / 3)]
    )
    first, *_ = complete_checkpoints(tmp_path / "checkpoints" / "rate")
    norm = Checkpoint.open(first).read("model.model.model.norm.weight", (32,))
    torch.testing.assert_close((norm - 1).abs(), torch.full((32,), 4e-3), rtol=1e-3, atol=0)
    # What speed is reckoned with: sequences of a step, and operations of one of them.
    (size,) = sizes
    predicted = read_plan(args.gen_savedir / "rate")["predicted"]
    sequences = args.micro_batch_size
    assert sequences > 1
    operations = [predicted[name] / sequences for name in ("micro_batch_flops", "micro_batch_flops_causal")]
    assert list(size.flops) == pytest.approx(operations)
    assert (size.samples, size.tokens) == (sequences * args.compute.micro_batches, tiny.LENGTH)
    assert size.peak == args.compute.find_hardware().flops["float32"]
    samples = len(args.dataset.dataset)
    assert [line["epoch"] for line in lines] == pytest.approx([step * size.samples / samples for step in range(1, 5)])
