"""Killed at any moment, training goes on from what was saved: by hand, and by torchrun itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnscaler.checkpoint.folder import complete_checkpoints, latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.recompute import ON_HOST
from tests import tiny
from tests.checkpoint.crashes import NAME, assert_as_if_never_crashed, crashes
from tests.checkpoint.jobs import publish_one
from tests.parity import Case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    return tmp_path


def test_kill_at_random_moments(folder):
    """Few here; the full count is in benchmarks/crash.py."""
    found = list(crashes(folder, times=4, seed=1))
    assert any(crash.writing or crash.begun for crash in found)
    assert found[-1].newest > 0
    assert_as_if_never_crashed(folder, found[-1].newest)


def test_kill_with_the_optimizers_state_on_the_host(folder):
    away = Case(1, 2, levels=tuple(level.name for level in ON_HOST[:2]))
    found = list(crashes(folder, times=2, seed=2, case=away))
    assert json.loads((folder / "code" / NAME / "plan.json").read_text())["state_on_host"]
    assert found[-1].newest > 0
    assert_as_if_never_crashed(folder, found[-1].newest, away)


TRAIN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from nnscaler.checkpoint import folder
from nnscaler.command import run

publish = folder.publish


def publish_and_die(work, state):
    publish(work, state)
    if state.step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


folder.publish = publish_and_die
run(train.main)
"""


def test_torchrun_restarts_from_its_own_checkpoints(folder):
    """A rank is killed in mid-training, when a second checkpoint has its name; beside an older run of the same name,
    whose checkpoints are left alone."""
    tiny.write_model(folder / "model")
    flags = {
        "model_id": folder / "model", "dataset_path": folder / "data", "precision": "fp32", "name": "elastic",
        "plan_ngpus": 1, "grad_accumulation_steps": 1, "max_train_steps": 12, "checkpoint_interval": 2,
        "hardware": folder / "hardware.json", "checkpoint_dir": folder / "checkpoints", "log_dir": folder / "runs",
        "gen_savedir": folder / "code", "lr_schedule": "constant",
    }  # fmt: skip
    script = folder / "train.py"
    script.write_text(TRAIN.format(root=str(ROOT)))
    train = [str(script), *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    older = publish_one(folder / "checkpoints" / "elastic", step=99, loss=1.0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    done = subprocess.run([*command, *train], capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    runs = folder / "checkpoints" / "elastic-2"
    assert "restarted by torchrun: " in said
    resumed = re.search(r"continuing from .*/elastic-2/step_(\d+): step (\d+)", said)
    assert resumed
    assert int(resumed[2]) == 4
    steps = [json.loads(line)["step"] for line in (folder / "runs" / "elastic-2" / "metrics.jsonl").open()]
    assert steps == list(range(1, 13))
    assert Checkpoint.open(latest_checkpoint(runs)).state.step == 12
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["elastic", "elastic-2"]
    assert complete_checkpoints(older.parent) == [older]
