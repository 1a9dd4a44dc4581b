"""Saved and continued, training is as if it had never stopped; merged, it loads in transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nnscaler import UserError
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import Checkpoint, export_model, merge_to_file
from nnscaler.cli.config import CheckpointConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.data.training import PackedDataset
from nnscaler.models.files import AssetWriter
from tests import tiny
from tests.launch import run
from tests.parity import SEED, TOLERANCE, Case, arguments, plain_loop


def job(case: Case, folder: Path, steps: int, name: str, resume: Path | None = None, precision: str = "fp32"):
    args = arguments(case, folder)
    writer = AssetWriter(tiny.config(), {"fp32": "float32", "bf16": "bfloat16"}[precision], "none", None)
    return dataclasses.replace(
        args, name=name, max_train_steps=steps, precision=precision,
        model=dataclasses.replace(args.model, save_assets=writer),
        checkpoint=CheckpointConfig(folder / "checkpoints", interval=0, resume=resume),
    )  # fmt: skip


def train(case: Case, *job_arguments) -> None:
    Trainer(job(case, *job_arguments)).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_hardware(folder)
    tiny.write_dataset(folder / "data")
    return folder


ONE = Case(2, 2, accumulation=2)  # two sequences a step


@pytest.fixture(scope="module")
def saved(folder):
    """Five steps, saved; and twelve without a stop, for comparison."""
    run(2, train, ONE, folder, 12, "straight", init=False)
    run(2, train, ONE, folder, 5, "first", init=False)
    return latest_checkpoint(folder / "checkpoints" / "first")


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / name))
    return {name: checkpoint.read(name, shape) for name, shape in checkpoint.shapes().items()}


def resume_copy(saved: Path, folder: Path, name: str) -> Path:
    """A copy of a checkpoint in a run folder of its own, so that a run that goes on from it leaves the original."""
    return Path(shutil.copytree(saved, folder / "checkpoints" / name / saved.name))


def test_on_the_same_plan_it_is_bit_exact(folder, saved):
    run(2, train, ONE, folder, 12, "same", resume_copy(saved, folder, "same"), init=False)
    assert losses(folder, "same") == losses(folder, "straight")[5:]
    wanted = state(folder, "straight")
    for name, tensor in state(folder, "same").items():
        assert torch.equal(tensor, wanted[name]), name


OTHERS = [(Case(1, 4), 4), (Case(1, 1, accumulation=2), 2), (Case(2, 4, chunk_loss=True, accumulation=2), 4)]


@pytest.mark.parametrize(("case", "sequences"), OTHERS, ids=lambda value: getattr(value, "name", ""))
def test_on_another_plan_it_goes_on_at_the_exact_sample(folder, saved, case, sequences):
    """Straight from the shards, with other numbers of processes and of sequences a step."""
    resumed = resume_copy(saved, folder, case.name)
    run(case.runtime, train, case, folder, 10, case.name, resumed, init=False)
    rows = PackedDataset.open(folder / "data").rows.with_format("numpy")["input_ids"]
    wanted, weights = plain_loop(np.asarray(rows), [2] * 5 + [sequences] * 5)
    assert losses(folder, case.name) == pytest.approx(wanted[5:], rel=TOLERANCE)
    found = state(folder, case.name)
    for name, weight in weights.items():
        assert tiny.close(found[f"model.{name}"], weight) < TOLERANCE, name


def test_a_merged_file_resumes_on_any_number_of_processes(folder, saved, tmp_path):
    checkpoint = Checkpoint.open(saved)
    merge_to_file(checkpoint, tmp_path / "merged.ckpt")
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert set(content) == {"model", "optimizer", "trainer"}
    assert set(content["optimizer"]) == {"exp_avg", "exp_avg_sq"}
    for name, tensor in content["model"].items():
        assert torch.equal(tensor, state(folder, "first")[f"model.{name}"])
    for case in (Case(1, 1, accumulation=2), Case(1, 2)):
        run(case.runtime, train, case, folder, 12, f"merged-{case.name}", tmp_path / "merged.ckpt", init=False)
        assert losses(folder, f"merged-{case.name}") == pytest.approx(losses(folder, "straight")[5:], rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_merged_model_is_the_training_model(folder, tmp_path, precision):
    """transformers loads it with nothing missing or unexpected, and its logits are those of the trained weights."""
    name = f"export-{precision}"
    run(2, train, ONE, folder, 2, name, None, precision, init=False)
    checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / name))
    export_model(checkpoint, tmp_path / "model")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    trained = AutoModelForCausalLM.from_config(tiny.config(), dtype=loaded.dtype).eval()
    with torch.no_grad():
        for parameter, tensor in trained.named_parameters():
            tensor.copy_(checkpoint.read(f"model.model.{parameter}", tuple(tensor.shape)))
        tokens = torch.arange(20).unsqueeze(0)
        assert torch.equal(loaded(tokens).logits, trained(tokens).logits)
    # The loss that training itself finds next is the merged model's loss on the same samples.
    run(2, train, ONE, folder, 3, name, checkpoint.folder, precision, init=False)
    rows = np.asarray(PackedDataset.open(folder / "data").rows["input_ids"])
    order = np.random.default_rng((SEED, 0)).permutation(len(rows))[4:6]
    batch = torch.from_numpy(rows[order].astype(np.int64))
    with torch.no_grad():
        logits = loaded(batch).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    tolerance = {"fp32": TOLERANCE, "bf16": 2e-3}[precision]
    assert losses(folder, name)[2] == pytest.approx(loss.item(), rel=tolerance)
    with pytest.raises(UserError, match="is not empty"):
        export_model(checkpoint, tmp_path / "model")
