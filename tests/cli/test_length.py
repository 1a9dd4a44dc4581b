"""Epochs: every sample of them is trained on once, in a last step that is not full, or the rest is left out as said."""

from __future__ import annotations

import dataclasses
import json
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler.checkpoint.folder import TrainerState, latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, ModelConfig, TrainerArgs
from nnscaler.cli.length import RunLength
from nnscaler.cli.trainer import Trainer
from nnscaler.config import ComputeConfig
from nnscaler.counting import counted
from nnscaler.data.training import Batches, First, Share, Shuffled
from nnscaler.errors import UserError
from tests import tiny
from tests.data.test_training import LENGTH, Rows
from tests.launch import run
from tests.parity import TOLERANCE, Case, arguments, plain_loop


def of_length(**fields: object) -> TrainerArgs:
    model, data = ModelConfig(make=lambda: None), DatasetConfig(sequence_length=8)
    return TrainerArgs(name="x", model=model, compute=ComputeConfig(), dataset=data, **fields)


@given(
    st.integers(1, 30), st.sampled_from([0.3, 1.0, 1.7, 3.0]),
    st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=8, max_size=8), st.sampled_from(["train", "drop"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_or_twice_over_resumes(rows, epochs, shares, stops, incomplete):
    """A run that is stopped after some steps, and goes on with another number of devices, and so on."""
    data = Rows.numbered(rows)
    args = of_length(num_train_epochs=epochs, incomplete_step=incomplete)
    seen: list[int] = []
    step, consumed = 0, 0
    for index, stop in enumerate([*stops, 10**9]):
        replicas, micro_batch, micro_batches = shares[index % len(shares)]
        share = Share(0, replicas, micro_batch, micro_batches)
        try:
            length = RunLength.of(args, rows, share.step_samples, step, consumed)
        except UserError:
            assert incomplete == "drop"
            assert max(1, round(epochs * rows)) < share.step_samples
            return
        steps = min(length.steps - step, stop)
        order: list[int] = []
        for replica in range(replicas):
            samples = First(Shuffled(data, 5), length.samples)
            own = Batches(samples, LENGTH, dataclasses.replace(share, replica=replica), -100, torch.device("cpu"))
            for inputs, _, _ in islice(own.after(consumed), steps * micro_batches):
                learned = (inputs["labels"] != -100).any(1)
                order += inputs["labels"][learned, 0].tolist()
        before = consumed
        for _ in range(steps):
            consumed = length.after(consumed, share.step_samples)
        step += steps
        assert len(order) == consumed - before
        seen += order
        said = length.describe(consumed)
        assert said.startswith(f"{counted(len(seen), 'sample')} seen, ")
    total = max(1, round(epochs * rows))
    left = total - len(seen)
    assert 0 <= left < share.step_samples
    assert left == 0 or incomplete == "drop"
    assert said.endswith(f"; {counted(left, 'sample')} left")
    counts = [seen.count(number + 1) for number in range(rows)]
    assert max(counts) - min(counts) <= 1 + (incomplete == "drop")
    assert sum(counts) == len(seen)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(UserError, match=r"max_train_steps is 3 and num_train_epochs 2\.0; one of them says how long"):
        of_length(max_train_steps=3, num_train_epochs=2.0)
    assert RunLength.of(of_length(max_train_steps=3), 5, 4, 0, 0).describe(12) == (
        "12 samples seen, which is 2.40 epochs of 5 samples each; 3 samples of this epoch left"
    )
    over = RunLength.of(of_length(num_train_epochs=1.0), 10, 4, 6, 20)
    assert over.steps == 6, "two epochs are behind it already: no step is left"
    assert RunLength(3, None, 4).describe(8).endswith("; 0 samples of this epoch left")
    assert (RunLength(3, None, 4).after(8, 3), RunLength(3, 10, 4).after(8, 3)) == (11, 10)
    assert RunLength(3, 5, 5).describe(4) == "4 samples seen, which is 0.80 epochs of 5 samples each; 1 sample left"
    with pytest.raises(UserError, match="a step takes 8 samples, and there are 5 to train on; --incomplete_step train"):
        RunLength.of(of_length(incomplete_step="drop"), 5, 8, 0, 0)


EPOCHS = 16 / 80
CASES = [Case(1, 2, accumulation=3), Case(2, 2, accumulation=6, chunk_loss=True),
         Case(2, 2, accumulation=6, layers=4, schedule="zb-v", stages=4)]  # fmt: skip


def train(cases: list[Case], folder: Path, name: str, resume: Path | None = None, incomplete: str = "train") -> None:
    for index, case in enumerate(cases):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
        args = arguments(case, folder)
        checkpoint = CheckpointConfig(folder / "checkpoints", interval=1, keep=0, resume=resume)
        fields = {
            "max_train_steps": None,
            "num_train_epochs": EPOCHS,
            "checkpoint": checkpoint,
            "incomplete_step": incomplete,
        }
        Trainer(dataclasses.replace(args, name=name + case.name, **fields)).run()


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path, name: str) -> list[float]:
    return [entry["loss"] for entry in metrics(folder, name)]


def test_the_last_step_is_the_plain_loop_s_on_what_is_left(tmp_path):
    """Steps of 6, 6 and 4 samples; and going on after the first on another number of devices, with steps of 4."""
    tiny.write_hardware(tmp_path)
    rows = tiny.write_dataset(tmp_path / "data")
    run(2, train, CASES, tmp_path, "", init=False)
    for case in CASES:
        losses, weights, _ = plain_loop(rows, [6, 6, 4], **case.model)
        assert losses_of(tmp_path, case.name) == pytest.approx(losses, rel=TOLERANCE), case.name
        for entry, samples in zip(metrics(tmp_path, case.name), (6, 6, 4), strict=True):
            labels = entry["labels_per_second_per_gpu"] * entry["seconds_per_step"] * case.runtime
            assert labels == pytest.approx(samples * (tiny.LENGTH - 1))
            assert entry["padding"] == pytest.approx(1 - samples / 6)
        last = Checkpoint.open(latest_checkpoint(tmp_path / "checkpoints" / case.name))
        assert (last.state.step, last.state.consumed) == (3, 16)
        shapes = last.shapes()
        for name, wanted in weights.items():
            assert tiny.close(last.read(f"model.{name}", shapes[f"model.{name}"]), wanted) < TOLERANCE, name
    first = tmp_path / "checkpoints" / CASES[0].name / "step_00000001"
    again, dropped = Case(1, 1, accumulation=4), Case(1, 1, accumulation=7)
    run(1, train, [again], tmp_path, "again", first, init=False)
    losses, *_ = plain_loop(rows, [6, 4, 4, 2])
    assert losses_of(tmp_path, "again" + again.name) == pytest.approx(losses[1:], rel=TOLERANCE)
    run(1, train, [dropped], tmp_path, "dropped", None, "drop", init=False)
    assert TrainerState.read(latest_checkpoint(tmp_path / "checkpoints" / f"dropped{dropped.name}")).consumed == 14
