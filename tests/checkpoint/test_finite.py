"""A step that is not finite changes nothing, is named, and cannot push out a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from unittest.mock import patch

import pytest
import torch

from nnscaler import UserError
from nnscaler.checkpoint.folder import TrainerState, own_checkpoints
from nnscaler.cli.finite import MOST, FiniteSteps
from nnscaler.cli.loop import TrainingRun
from nnscaler.cli.trainer import Trainer
from nnscaler.runtime.module import ParallelModule
from nnscaler.runtime.optimizer import OptimizerConfig
from nnscaler.runtime.reading import Reading
from tests.checkpoint.jobs import job, tensors, train
from tests.launch import run
from tests.parity import Case

TWO, ONE = Case(1, 2), Case(1, 1, accumulation=2)


def train_with_bad_steps(folder, steps, name, bad):
    """On rank 1 alone, the loss of some steps is infinite."""
    accumulate, count = ParallelModule.accumulate, 0

    def poisoned(module, micro_batches, *drawn):
        nonlocal count
        loss, count = accumulate(module, micro_batches, *drawn), count + 1
        return loss * float("inf") if os.environ["RANK"] == "1" and count in bad else loss

    with patch.object(ParallelModule, "accumulate", poisoned):
        train(TWO, folder, steps, name, {"interval": 1, "keep": 0})


def test_one_rank_alone_makes_all_skip(folder):
    """The save that is due then comes after the next step, and what was skipped is not an update."""
    run(2, train_with_bad_steps, folder, 4, "skip", {3}, init=False)
    saved = {path.name: TrainerState.read(path) for path in own_checkpoints(folder / "checkpoints" / "skip")}
    assert list(saved) == ["step_00000001", "step_00000002", "step_00000004"]
    state = saved["step_00000004"]
    assert (state.step, state.updates, state.consumed) == (4, 3, 8)
    lines = [json.loads(line) for line in (folder / "runs" / "skip" / "metrics.jsonl").open()]
    assert [line["loss"] is None for line in lines] == [False, False, True, False]
    assert lines[2]["gradient_norm"] is None
    seen = []

    def stop(run):
        seen.append((run.step, run.optimizer.steps, run.finite.skipped))
        run.holding.release()

    with patch.object(TrainingRun, "train", stop):
        train(ONE, folder, 9, "after", {"resume": folder / "checkpoints" / "skip" / "step_00000004"})
    assert seen == [(4, 3, 1)], "Adam goes on from three updates"


def test_the_last_step_is_saved_and_kept_whatever_it_was(folder):
    run(2, train_with_bad_steps, folder, 3, "last", {2, 3}, init=False)
    states = [TrainerState.read(path) for path in own_checkpoints(folder / "checkpoints" / "last")]
    assert [(state.step, state.updates) for state in states] == [(1, 1), (3, 1)]
    first, last = (tensors(path) for path in own_checkpoints(folder / "checkpoints" / "last"))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_training_that_diverges_stops_and_keeps_what_is_finite(folder, caplog):
    args = job(ONE, folder, 30, "diverged", interval=1, keep=1)
    args = dataclasses.replace(args, optimizer=OptimizerConfig(lr=1e30, clip_gnorm=0.0))
    caplog.set_level("WARNING", logger="nnscaler")
    with pytest.raises(UserError, match=f"of steps 2 to {MOST + 1} is not finite"):
        Trainer(args).run()
    assert len([line for line in caplog.messages if "is not finite; nothing is updated" in line]) == MOST
    (saved,) = own_checkpoints(folder / "checkpoints" / "diverged")
    assert TrainerState.read(saved).step == 1
    assert all(tensor.isfinite().all() for tensor in tensors(saved).values())
    text = (folder / "runs" / "diverged" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_weights_that_are_not_finite_are_not_saved(folder):
    optimizer = OptimizerConfig(lr=3e38, weight_decay=0.5, clip_gnorm=0.0)
    args = dataclasses.replace(job(ONE, folder, 1, "overflown"), optimizer=optimizer)
    with pytest.raises(UserError, match="the weights after step 1 are not finite"):
        Trainer(args).run()
    assert not own_checkpoints(folder / "checkpoints" / "overflown")


def test_only_steps_in_a_row_count():
    assert MOST == 10, "as README says"
    steps = FiniteSteps(skipped=2)
    bad, good = Reading(torch.tensor(float("nan"))), Reading(torch.tensor(1.0))
    for step in range(3 * MOST):
        steps.after(step, good if step % MOST == 0 else bad)
    steps.settle()
    assert (steps.skipped, steps.in_a_row) == (2 + 3 * (MOST - 1), MOST - 1)
    steps.after(3 * MOST, bad)
    for _ in range(2):  # whoever looks next, however often
        with pytest.raises(UserError, match=f"steps {2 * MOST + 1} to {3 * MOST} "):
            steps.settle()


def test_a_norm_is_looked_at_one_step_late(caplog):
    steps = FiniteSteps(skipped=0)
    steps.after(1, Reading(torch.tensor(float("inf"))))
    assert (steps.skipped, caplog.messages) == (0, [])
    steps.after(2, Reading(torch.tensor(1.0)))
    assert (steps.skipped, steps.in_a_row) == (1, 1)
    assert "step 1: " in caplog.text
    steps.look()
    assert (steps.skipped, steps.in_a_row) == (1, 0)


def test_training_ends_with_the_step_after_the_tenth():
    """No step waits for its own norm; so the eleventh is begun when the tenth is known."""
    steps, bad = FiniteSteps(skipped=0), Reading(torch.tensor(float("nan")))
    for step in range(5, 15):
        steps.after(step, bad)
    with pytest.raises(UserError, match="of steps 5 to 14 is not finite: training stops"):
        steps.after(15, bad)
