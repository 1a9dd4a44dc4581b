"""What a run is made of: what its parts say of themselves, and which do not go together, at the limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nnscaler.batch import Batch, Division
from nnscaler.cli import config
from nnscaler.cli.config import (
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    LogConfig,
    LRSchedulerConfig,
    ModelConfig,
    TrainerArgs,
)
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError


def dataset(length: int = 12, asks: bool = False, lengths: tuple[int, float] | None = (7, 4.6)) -> Any:
    """A dataset whose documents need 7 positions, and are of 4.6 tokens; None: it does not say where they begin."""

    class Stub:
        path, sequence_length, asks_for_documents, documents = "rows", length, asks, "seq_idx"

        @property
        def parts(self) -> tuple[Any, ...]:
            return (self,)

        @property
        def document_lengths(self) -> Any:
            if lengths is None:
                raise UserError("does not say")
            return SimpleNamespace(positions=lengths[0], of_token=lengths[1])

    return Stub()


ARGS: dict[str, Any] = {
    "name": "x", "model": ModelConfig(make=nn.Identity), "compute": ComputeConfig(2, 6, micro_batches=5),
    "dataset": DatasetConfig(sequence_length=12),
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "length", "positions", "mean"),
    [
        ({"sequence_length": 2}, 2, 2, None),
        ({"sequence_length": 12, "document_mask": True}, 12, 12, 12),
        ({"sequence_length": 12, "document_mask": True, "document_length": 5}, 12, 12, 5),
        ({"sequence_length": 12, "document_mask": True, "document_length": 12}, 12, 12, 12),
        ({"dataset": dataset()}, 12, 12, None),
        ({"dataset": dataset(), "sequence_length": 12}, 12, 12, None),
        ({"dataset": dataset(), "document_mask": True}, 12, 7, 5),
        ({"dataset": dataset(asks=True), "document_mask": True, "document_length": 5}, 12, 7, 5),
        ({"dataset": dataset(lengths=None)}, 12, 12, None),
    ],
)
def test_what_a_dataset_is_for_a_model(given, length, positions, mean):
    found = DatasetConfig(**given)
    assert (found.length, found.positions, found.mean_document) == (length, positions, mean)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither dataset_path nor sequence_length is given"),
        ({"dataset": dataset(), "sequence_length": 13}, "sequence_length is 13, but the dataset has 12"),
        ({"dataset": dataset(1)}, "the length of dataset_path's sequences is 1; it must be at least 2"),
        ({"sequence_length": 12, "document_length": 5}, "document_length is 5, which needs --document_mask"),
        (
            {"sequence_length": 12, "document_mask": True, "document_length": 13},
            "document_length is 13; it must be at most sequence_length=12",
        ),
        (
            {"dataset": dataset(), "document_mask": True, "document_length": 4},
            "document_length is 4, but the dataset's is 5",
        ),
        ({"dataset": dataset(asks=True)}, "dataset 'rows' has a column 'seq_idx' that keeps documents apart"),
        ({"dataset": dataset(lengths=None), "document_mask": True}, "does not say"),
    ],
)
def test_what_does_not_go_with_a_dataset(given, said):
    with pytest.raises(UserError, match=f"^{said}"):
        DatasetConfig(**given)


def test_every_part_of_a_mixture_is_asked():
    for wrong, apart in ((dataset(asks=True), False), (dataset(lengths=None), True)):
        mixture = dataset()
        type(mixture).parts = (dataset(), wrong)
        with pytest.raises(UserError, match="keeps documents apart" if not apart else "does not say"):
            DatasetConfig(mixture, document_mask=apart)


def test_how_many_samples_a_step_has_and_what_is_left_to_the_planner():
    args = TrainerArgs(**ARGS, micro_batch_size=7)
    assert (args.step_samples, args.batch) == (3 * 7 * 5, None)
    said = replace(args, global_batch_size=105)
    assert (said.step_samples, said.batch) == (105, None)
    every = ("plan_ngpus", "micro_batch_size", "micro_batches")
    fixed = {"plan_ngpus": 2, "micro_batch_size": 7, "micro_batches": 5}
    open_ = replace(said, left_open=every, micro_batch_size=1)
    assert open_.step_samples == 105, "whatever stands where the planner chooses"
    for left in (every, *((name,) for name in every)):
        open_ = replace(said, left_open=left)
        assert open_.batch == Batch(105, 6, **{name: value for name, value in fixed.items() if name not in left})
        divided = open_.divided(Division(6, 3, 35))
        assert (divided.batch, divided.global_batch_size, divided.micro_batch_size) == (None, 105, 3)
        assert divided.compute == ComputeConfig(6, 6, micro_batches=35)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"global_batch_size": 100, "micro_batch_size": 7}, "global_batch_size is 100; with runtime_ngpus=6"),
        ({"evaluation": EvaluationConfig(dataset(13))}, "eval_dataset_path is 'rows', whose sequences have 13 tokens"),
        ({"evaluation": EvaluationConfig(dataset(asks=True))}, "dataset 'rows' has a column 'seq_idx'"),
        ({"max_train_steps": 4, "lr_scheduler": LRSchedulerConfig(warmup_steps=5)}, "warmup_steps is 5; it must be at"),
        ({"max_train_steps": 4, "log": LogConfig(profile=Path("p"))}, "max_train_steps is 4; with profile it must be"),
        ({"max_train_steps": 3, "num_train_epochs": 2.5}, "max_train_steps is 3 and num_train_epochs 2.5; one of them"),
        ({"explain": True}, "explain goes with run_mode compile; run_mode is run"),
        ({"precision": "fp32", "fp8_keep_bf16": ("last",)}, "fp8_keep_bf16 goes with precision fp8; precision is fp32"),
        ({"precision": "fp8", "fp8_keep_bf16": ("last", "x")}, "fp8_keep_bf16 is 'x'; allowed are first, last"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_what_does_not_go_together(given, said):
    with pytest.raises(UserError, match=f"^{said}"):
        TrainerArgs(**ARGS | given)


def test_what_goes_together_at_the_limits():
    TrainerArgs(
        **ARGS, global_batch_size=105, micro_batch_size=7, explain=True, run_mode="compile", max_train_steps=5,
        precision="fp8", fp8_keep_bf16=("last", "first"), lr_scheduler=LRSchedulerConfig(warmup_steps=5),
        evaluation=EvaluationConfig(dataset(12)), log=LogConfig(profile=Path("p")),
    )  # fmt: skip
    assert TrainerArgs(**ARGS, num_train_epochs=2.5).num_train_epochs == 2.5
    apart = DatasetConfig(sequence_length=12, document_mask=True)
    TrainerArgs(**ARGS | {"dataset": apart}, evaluation=EvaluationConfig(dataset(asks=True)))
    with pytest.raises(UserError, match="does not say"):
        TrainerArgs(**ARGS | {"dataset": apart}, evaluation=EvaluationConfig(dataset(lengths=None)))


def test_where_numbers_are_reported_to_has_to_be_installed(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    LogConfig()
    with pytest.raises(UserError, match=r"^report_to is wandb, which is not installed: pip install wandb$"):
        LogConfig(report_to="wandb")
    monkeypatch.setattr(config, "find_spec", lambda name: name)
    LogConfig(report_to="wandb")


def test_what_a_run_does_where_nothing_is_said():
    """As README and --help say."""
    args = TrainerArgs(**ARGS)
    assert (args.run_mode, args.precision, args.micro_batch_size, args.seed) == ("run", "auto", 1, 0)
    assert (args.max_train_steps, args.num_train_epochs, args.incomplete_step) == (None, None, "train")
    assert (args.gen_savedir, args.log, args.dataset.ignored_label) == (
        Path(".nnscaler"),
        LogConfig(Path("runs"), 1),
        -100,
    )
    assert args.checkpoint == CheckpointConfig(Path("checkpoints"), 100, 0.0, 3, None)
    assert args.lr_scheduler == LRSchedulerConfig("cosine", 0, 0.1)
    assert args.evaluation == EvaluationConfig(None, 100, None)
