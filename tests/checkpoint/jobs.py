"""Small training runs with checkpoints, and what they left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nnscaler.checkpoint.checksums import Checksums, whole_file
from nnscaler.checkpoint.folder import TrainerState, latest_checkpoint, publish
from nnscaler.checkpoint.randomness import RANDOM
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.config import CheckpointConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.models.files import AssetWriter
from tests import tiny
from tests.parity import Case, arguments, planned


def job(case: Case, folder: Path, steps: int, name: str, precision: str = "fp32", **checkpoint: Any) -> TrainerArgs:
    """A run of the tiny Llama with `CheckpointConfig(**checkpoint)`; by default only the last step is saved."""
    args = arguments(case, folder)
    writer = AssetWriter(tiny.config(), {"fp32": "float32", "bf16": "bfloat16"}[precision], "none", None)
    config = {"directory": folder / "checkpoints", "interval": 0, **checkpoint}
    return dataclasses.replace(
        args, name=name, max_train_steps=steps, precision=precision,
        model=dataclasses.replace(args.model, save_assets=writer), checkpoint=CheckpointConfig(**config),
    )  # fmt: skip


def train(case: Case, folder: Path, steps: int, name: str, options: dict[str, Any] | None = None) -> None:
    with planned(case):
        Trainer(job(case, folder, steps, name, **(options or {}))).run()


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    opened = Checkpoint.open(checkpoint)
    return {name: opened.read(name, shape) for name, shape in opened.shapes().items()}


def random_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The states of every rank's random number generators."""
    opened = Checkpoint.open(checkpoint)
    names = [name for name in opened.entries if name.startswith(RANDOM)]
    return {name: opened.read(name, tuple(opened.entries[name].size)) for name in names}


def final(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors."""
    return tensors(latest_checkpoint(folder / "checkpoints" / name))


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def publish_one(
    runs: Path, step: int, loss: float | None, owner: str = "run", keep: int = 3, eval_loss: float | None = None
) -> Path:
    """A complete checkpoint without tensors."""
    work = runs / f".step_{step}.writing"
    work.mkdir(parents=True)
    state = TrainerState(
        step, step, 0, 9, {}, loss, "run", "model", 1, {}, {}, "", float(step), None, owner, keep, eval_loss
    )
    state.write(work)
    Checksums(work, [whole_file(work, work / "trainer.json")]).write()
    return publish(work, state)
