"""Bad input to train.py and ckpt_merger.py: one line that says what is wrong, exit status 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import ckpt_merger
import train
from nnscaler import planning
from nnscaler.cli.config import DatasetConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.command import run
from nnscaler.config import ComputeConfig
from nnscaler.data.packed import PackedDataset
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "small_vocabulary", vocab_size=16)
    tiny.write_dataset(folder / "data")
    ids = [[0, 1]] * 300
    for name, wrong in {"large_id": 96, "negative_id": -1}.items():
        Dataset.from_dict({"input_ids": [*ids, [wrong, 1], *ids]}).save_to_disk(str(folder / name))
    positions = [[*range(32)], [*range(31), 0]]
    apart = {"input_ids": [[1] * 32] * 2, "position_ids": positions}
    Dataset.from_dict(apart).save_to_disk(str(folder / "apart"))
    tiny.write_hardware(folder)
    return folder


@pytest.fixture
def fails(inputs, tmp_path, monkeypatch, capsys):
    """Runs a script with flags in an empty folder, and returns the one line that it prints when it fails.

    Where no plan fits, changes are not tried: see `tests.test_planning`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "TRYING_SECONDS", -1.0)

    def call(script, *flags: str) -> str:
        flags = tuple(flag.replace("{}", str(inputs)) for flag in flags)
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *flags])
        with pytest.raises(SystemExit) as stopped:
            run(script.main)
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1, lines
        assert list(tmp_path.iterdir()) == [], "nothing is written"
        return lines[0]

    return call


MODEL = ("--model_id", "{}/model")
DATA = ("--dataset_path", "{}/data")
PLAN = (*MODEL, "--sequence_length", "32", "--run_mode", "compile", "--precision", "fp32")
PIPELINE = (*PLAN, "--plan_ngpus", "2", "--explore_pipeline")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*DATA,), "--model_id is not given, and has no default"),
        ((*MODEL,), "neither dataset_path nor sequence_length is given"),
        ((*MODEL, "--dataset_path", "{}/nowhere"), "/nowhere', which does not exist"),
        ((*MODEL, "--dataset_path", "{}/model"), "is not a dataset that bookcorpus.py wrote"),
        (("--model_id", "{}/data", *DATA), "is not a model: it has no config.json"),
        (("--model_id", "no/such-model", *DATA), "no/such-model"),
        ((*MODEL, *DATA, "--sequence_length", "64"), "sequence_length is 64, but the dataset has 32"),
        ((*MODEL, *DATA, "--eval_dataset_path", "{}/nowhere"), "/nowhere', which does not exist"),
        ((*MODEL, *DATA, "--eval_dataset_path", "{}/model"), "error: eval_dataset_path is '"),
        (
            (*MODEL, *DATA, "--eval_dataset_path", "{}/large_id"),
            "whose sequences have 2 tokens, but those of dataset_path have 32",
        ),
        (
            ("--model_id", "{}/small_vocabulary", *DATA),
            "from 0 to 95, and the model knows those from 0 to 15",
        ),
        (
            (*MODEL, "--dataset_path", "{}/large_id"),
            "those from 0 to 95 (the first other one is in row 300)",
        ),
        ((*MODEL, "--dataset_path", "{}/negative_id"), "holds token ids from -1 to 1"),
        (
            (*PLAN, "--plan_ngpus", "4", "--runtime_ngpus", "6"),
            "runtime_ngpus is 6; it must be a multiple of plan_ngpus=4",
        ),
        ((*PLAN, "--plan_ngpus", "0"), "plan_ngpus is 0; it must be at least 1"),
        ((*MODEL, *DATA, "--runtime_ngpus", "2"), "runtime_ngpus is 2, but 1 process runs"),
        ((*MODEL, "--sequence_length", "32"), "training needs a dataset_path"),
        ((*MODEL, "--sequence_length", "1", "--run_mode", "compile"), "sequence_length is 1; it must be at least 2"),
        ((*PLAN, "--hardware", "b9000"), "hardware is 'b9000'; known are a100"),
        ((*PLAN, "--hardware", "{}/model/config.json"), "does not describe a machine"),
        ((*PLAN, "--recompute_modules", "LlamaBlock"), "not in the model; its modules are CausalLM, Embedding"),
        ((*PLAN, "--recompute_modules", "LlamaModel"), "contains LlamaDecoderLayer; name those instead"),
        (
            (*PLAN, "--gpu_mem_constraint", "0.0001", "--hardware", "h100"),
            "a device, constraint 0.0001 GiB: workspaces of libraries 0.1 GiB, moments",
        ),
        ((*MODEL, *DATA, "--explain"), "explain goes with run_mode compile; run_mode is run"),
        (
            (*PLAN, "--pipeline_pivots", "LlamaDecoderLayer"),
            "pipeline_pivots is 'LlamaDecoderLayer', but explore_pipeline is not given",
        ),
        ((*PLAN, "--pipeline_nstages", "2"), "pipeline_nstages is '2', but explore_pipeline is not given"),
        ((*PIPELINE, "--pipeline_pivots", "LlamaMLP"), "the model's repeated modules are LlamaDecoderLayer"),
        ((*PIPELINE, "--pipeline_nstages", "3"), "pipeline_nstages is 3, but plan_ngpus=2 and 2 places"),
        ((*PIPELINE, "--pipeline_schedule", "zb-v"), "pipeline_schedule is 'zb-v', but plan_ngpus=2 and 2 places"),
        (
            (*PIPELINE, "--pipeline_nstages", "2", "--grad_accumulation_steps", "1"),
            "grad_accumulation_steps is 1; pipeline schedule 1f1b with 2 stages on 2 ranks needs at least 2",
        ),
        ((*PLAN, "--gpu_mem_constraint", "-1"), "gpu_mem_constraint is -1.0; it must be more than 0"),
        ((*PLAN, "--document_length", "8"), "document_length is 8, which needs --document_mask"),
        (
            (*PLAN, "--document_mask", "--document_length", "64"),
            "document_length is 64; it must be at most sequence_length=32",
        ),
        ((*MODEL, *DATA, "--document_mask"), "does not say where documents begin; make it anew with bookcorpus.py"),
        ((*MODEL, "--dataset_path", "{}/apart"), "has a column 'position_ids' that keeps documents apart; give --docu"),
        ((*MODEL, *DATA, "--eval_dataset_path", "{}/apart"), "has a column 'position_ids' that keeps documents apart"),
        (
            (*MODEL, "--dataset_path", "{}/apart", "--document_mask", "--document_length", "16"),
            "document_length is 16, but the dataset's is 31",
        ),
        ((*MODEL, "--dataset_path", "{}/apart", "--document_mask", "--attn_implementation", "eager"), "leave it out"),
        ((*MODEL, *DATA, "--resume_path", "{}/nothing"), "/nothing', which does not exist"),
        ((*MODEL, *DATA, "--resume_path", "{}/data"), "holds no complete checkpoint"),
        ((*MODEL, *DATA, "--resume_path", "{}/hardware.json"), "is not a merged checkpoint"),
        ((*MODEL, *DATA, "--micro_batch_size", "0"), "micro_batch_size is 0; it must be at least 1"),
        ((*MODEL, *DATA, "--max_train_steps", "0"), "max_train_steps is 0; it must be at least 1"),
        ((*MODEL, *DATA, "--warmup_steps", "-1"), "warmup_steps is -1; it must be at least 0"),
        ((*MODEL, *DATA, "--no_such_flag"), "there is no flag --no_such_flag"),
    ],
)
def test_train(fails, flags, message):
    assert message in fails(train, *flags)


def test_a_plan_that_does_not_fit_says_what_takes_most(fails):
    small = ("--gpu_mem_constraint", "0.001", "--hardware", "h100", "--micro_batch_size", "64", "--search_seconds", "1")
    line = fails(train, *PLAN, *small)
    assert "no plan fits: needs" in line
    categories = line.split("constraint 0.001 GiB: ")[1].split(";")[0]
    found = {what: float(size) for what, size in re.findall(r"([a-z_ ]+) ([\d.]+) GiB", categories)}
    assert {"workspaces of libraries", " kept for backward"} <= found.keys()
    sizes = list(found.values())
    assert sizes == sorted(sizes, reverse=True)


def write_checkpoint(folder: Path) -> Path:
    """What a checkpoint's index and state look like, without tensors."""
    step = folder / "run" / "step_00000001"
    step.mkdir(parents=True)
    state = {
        "step": 1,
        "consumed": 1,
        "seed": 0,
        "run": "run",
        "model": "m",
        "parameters": {},
        "tied": {},
        "prefix": "",
    }
    (step / "trainer.json").write_text(json.dumps({**state, "saved_at": 0.0}))
    return step


def test_merging_nothing(fails, inputs):
    assert "nothing to write" in fails(ckpt_merger, "--ckpt_dir", "{}/data")
    assert "does not exist" in fails(ckpt_merger, "--ckpt_dir", "{}/nowhere", "--output_fname", "x.ckpt")
    assert "holds no complete checkpoint" in fails(ckpt_merger, "--ckpt_dir", "{}/data", "--output_fname", "x.ckpt")


def test_a_torn_checkpoint_is_neither_merged_nor_resumed(fails, inputs):
    write_checkpoint(inputs / "torn")
    torn = ("--ckpt_dir", "{}/torn", "--output_fname", "x.ckpt")
    assert "is incomplete: it has no checksums" in fails(ckpt_merger, *torn)
    assert "is incomplete: it has no checksums" in fails(train, *MODEL, *DATA, "--resume_path", "{}/torn")
    shutil.rmtree(inputs / "torn")


def test_the_process_exits_with_2_and_without_traceback(inputs, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--model_id", str(inputs / "model"), "--dataset-path", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: dataset_path is 'nowhere', which does not exist; make one with bookcorpus.py"
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_takes_more_samples_than_there_are_is_said(inputs, caplog):
    """And a vocabulary that is smaller than the tokenizer's does not matter where no row has the other ids."""
    dataset = PackedDataset.open(inputs / "data")
    compute = ComputeConfig(1, 4, micro_batches=16)
    model = ModelConfig(make=torch.nn.Identity, vocabulary=tiny.VOCABULARY)
    args = TrainerArgs(name="x", model=model, compute=compute, dataset=DatasetConfig(dataset), micro_batch_size=2)
    Trainer(args)._judge(dataset)
    assert "a step takes 128 samples (4 copies, 16 micro-batches of 2), and the dataset has 80" in caplog.text
    caplog.clear()
    Trainer(replace(args, micro_batch_size=1))._judge(dataset)
    assert caplog.text == ""
