"""Validation is the plain model's loss over each sample once, by every kind of plan, and changes no bit of training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch

from nnscaler.checkpoint.folder import TrainerState, complete_checkpoints, latest_checkpoint
from nnscaler.cli.config import CheckpointConfig, EvaluationConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.data.mixture import open_dataset
from nnscaler.data.training import PackedDataset
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.recompute import ON_DEVICE, ON_HOST
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.checkpoint.jobs import assert_equal, tensors
from tests.checkpoint.test_saving import messages
from tests.launch import run
from tests.parity import Case, arguments, compiled_regions, planned

STEPS, INTERVAL, ROWS = 3, 2, 7
LEVELS = tuple(level.name for level in (ON_DEVICE[1], ON_DEVICE[2], ON_DEVICE[3], ON_HOST[2]))
CASES = {
    1: [Case(1, 1, accumulation=2)],
    2: [
        Case(1, 2, micro_batch=2),
        Case(2, 2, accumulation=4, chunk_loss=True),
        Case(2, 2, layers=4, levels=LEVELS),
        Case(2, 2, layers=4, pieces=4, levels=(LEVELS[1],) * 4, compiled=True),
        Case(2, 2, schedule="1f1b", stages=2, layers=4, accumulation=4),
        Case(2, 2, schedule="interleaved", stages=4, layers=4, accumulation=4),
    ],
    4: [
        Case(2, 4, accumulation=2),
        Case(2, 4, schedule="zb-v", stages=4, layers=4, accumulation=4, tied=True),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.write_hardware(folder)
    tiny.write_dataset(folder / "data")
    generator = np.random.default_rng(1)
    ids = generator.integers(tiny.VOCABULARY, size=(ROWS, tiny.LENGTH))
    labels = np.where(generator.random(ids.shape) < 0.2, -100, ids)  # other numbers of labels in each row
    labels[3:] = np.where(np.arange(tiny.LENGTH) < 20, -100, labels[3:])
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    rows.save_to_disk(str(folder / "validation"))
    (folder / "streamed").mkdir()
    rows.to_parquet(folder / "streamed" / "rows.parquet", batch_size=3)
    return folder


def train(cases: list[Case], folder: Path, evaluates: bool) -> None:
    """On every rank, into a folder of its own."""
    for index, case in enumerate(cases):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
        args = arguments(case, folder)
        own = folder / ("with" if evaluates else "without")
        validation = open_dataset(str(folder / ("validation", "streamed")[index % 2])) if evaluates else None
        args = dataclasses.replace(
            args, max_train_steps=STEPS, checkpoint=CheckpointConfig(own / "checkpoints", interval=1, keep=0),
            log=dataclasses.replace(args.log, directory=own / "runs"),
            evaluation=EvaluationConfig(validation, INTERVAL),
        )  # fmt: skip
        with planned(case), compiled_regions() if case.compiled else nullcontext():
            Trainer(args).run()


def plain_evaluation(case: Case, weights: dict[str, torch.Tensor], folder: Path) -> float:
    """The mean loss a label, as anyone would compute it."""
    config = tiny.config(**case.model)
    prepare_config(config, tiny.LENGTH, "eager")
    model = CausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[f"model.{name}"])
    losses, count = 0.0, 0
    for row in PackedDataset.open(folder / "validation").rows:
        ids, labels = (torch.from_numpy(row[name].astype(np.int64)) for name in ("input_ids", "labels"))
        logits = model.model(input_ids=ids[None]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    return losses / count


def metrics(folder: Path, case: Case) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / case.name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", CASES)
def test_validation_is_the_plain_loss_and_leaves_training_alone(world, folder):
    cases = CASES[world]
    for evaluates in (True, False):
        run(world, train, cases, folder, evaluates, init=False)
    for case in cases:
        found, without = (metrics(folder / own, case) for own in ("with", "without"))
        assert [entry["loss"] for entry in found] == [entry["loss"] for entry in without], case.name
        steps = [entry["step"] for entry in found if "eval_loss" in entry]
        assert steps == [2, 3]
        runs = folder / "with" / "checkpoints" / case.name
        for step in steps:
            entry, saved = found[step - 1], runs / f"step_{step:08d}"
            wanted = plain_evaluation(case, tensors(saved), folder)
            assert entry["eval_loss"] == pytest.approx(wanted, rel=1e-5), case.name
            assert entry["eval_perplexity"] == math.exp(entry["eval_loss"])
            assert TrainerState.read(saved).eval_loss == entry["eval_loss"]
        assert TrainerState.read(runs / "step_00000001").eval_loss is None
        best = min(steps, key=lambda step: found[step - 1]["eval_loss"])
        assert (runs / "best").resolve().name == f"step_{best:08d}"
        assert_equal(
            *(tensors(latest_checkpoint(folder / own / "checkpoints" / case.name)) for own in ("with", "without"))
        )


def hold_evaluation(folder: Path, wanted: Path) -> list[str]:
    """The first evaluation does not end before a checkpoint of the second step is there; rank 1 gets SIGTERM in it."""
    evaluate = ParallelModule.evaluate

    def held(module: ParallelModule, micro_batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        if os.environ["RANK"] == "1" and not wanted.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 240
        while not wanted.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return evaluate(module, micro_batches)

    validation = EvaluationConfig(PackedDataset.open(folder / "validation"), INTERVAL)
    args = dataclasses.replace(arguments(Case(1, 2), folder), name="held", max_train_steps=1000, evaluation=validation)
    with patch.object(ParallelModule, "evaluate", held), messages() as said:
        Trainer(args).run()
    return said


def test_sigterm_in_a_long_evaluation_saves_what_the_last_step_left(folder):
    """On all ranks, before the evaluation ends, which is given up."""
    wanted = folder / "checkpoints" / "held" / "step_00000002"
    said, _ = run(2, hold_evaluation, folder, wanted, init=False)
    assert any("stopped by a signal at step 2" in line for line in said)
    assert [path.name for path in complete_checkpoints(wanted.parent)] == [wanted.name]
    assert TrainerState.read(wanted).eval_loss is None
    lines = (folder / "runs" / "held" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("eval_loss") for line in lines] == [None, None]
