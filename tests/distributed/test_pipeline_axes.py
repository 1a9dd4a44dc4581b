"""Stages whose devices are two mesh axes: what the plain loop gives, and checkpoints for any other plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.mesh import PipelineMesh
from nnscaler.pipeline import search
from nnscaler.placement import Shard
from nnscaler.schedules import Schedule
from tests import tiny
from tests.distributed.test_pipeline import case, compare_weights, losses_of, norms_of, resume_copy, train
from tests.launch import run
from tests.parity import STEPS, TOLERANCE, Case, norms_agree, plain_loops

TWO_BY_TWO = dataclasses.replace(case("1f1b", 8, 2, 2, tied=True, recompute=False), layers=2)
CROSSES = (Shard(1), Shard(2))  # a sequence's halves, and halves of the features


def train_on_two_axes(case: Case, folder: Path, name: str, steps: int, resume: Path | None = None) -> None:
    on = search._On(Schedule("1f1b", 2, 2, case.accumulation), PipelineMesh.of([(2, 2)] * 2, 1))
    with (
        patch.object(search, "_rounds", lambda *given: [(False, [on])]),
        patch.object(search, "_best_layout", lambda *given: CROSSES),
    ):
        train(case, folder, name, steps, resume)


def test_stages_of_two_axes_agree_with_the_plain_loop_and_resume_elsewhere(tmp_path):
    """Two stages of two by two devices, with tied weights on both; then one device, and back."""
    tiny.write_hardware(tmp_path)
    reference = plain_loops(tiny.write_dataset(tmp_path / "data"))
    losses, weights, norms = reference(TWO_BY_TWO)
    alone = dataclasses.replace(TWO_BY_TWO, plan=1, runtime=1, schedule=None)
    code, checkpoints = tmp_path / "code", tmp_path / "checkpoints"

    def resumed(name: str) -> Path:
        return resume_copy(latest_checkpoint(checkpoints / name), tmp_path, f"after-{name}")

    run(8, train_on_two_axes, TWO_BY_TWO, tmp_path, "first", 2, init=False)
    assert losses_of(tmp_path, "first") == pytest.approx(losses[:2], rel=TOLERANCE)
    assert norms_agree(norms_of(tmp_path, "first"), norms[:2])
    plan = json.loads((code / "first" / "plan.json").read_text())
    assert [stage["mesh"]["sizes"] for stage in plan["stages"]] == [[2, 2]] * 2
    assert [(one["sent"], one["received"]) for one in plan["pipeline"]["crossing"][0]] == [("S(1),S(2)",) * 2]
    run(1, train, alone, tmp_path, "after-first", 4, resumed("first"), init=False)
    assert losses_of(tmp_path, "after-first") == pytest.approx(losses[2:4], rel=TOLERANCE)
    shutil.copytree(code / "first", code / "after-after-first")  # else it is searched for again
    run(8, train_on_two_axes, TWO_BY_TWO, tmp_path, "after-after-first", STEPS, resumed("after-first"), init=False)
    assert losses_of(tmp_path, "after-after-first") == pytest.approx(losses[4:], rel=TOLERANCE)
    compare_weights(Checkpoint.open(latest_checkpoint(checkpoints / "after-after-first")), weights)
