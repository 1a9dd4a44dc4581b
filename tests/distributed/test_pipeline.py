"""Trained in a pipeline, a model's losses, gradients' norms and weights are those of the plain single-process loop; so
are they after resuming from a pipeline's checkpoint without one, and the reverse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import merge_to_file
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.config import CheckpointConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, RECOMPUTES_ALL
from tests import tiny
from tests.launch import run
from tests.parity import TOLERANCE, Case, arguments, norms_agree, plain_loops, planned, train_all

RECOMPUTED = ("LlamaDecoderLayer",)


def case(schedule: str, devices: int, stages: int, accumulation: int, tied: bool, recompute: bool) -> Case:
    """Pipelines of `devices` devices in one copy of the model."""
    return Case(
        devices, devices, recompute=RECOMPUTED if recompute else (), accumulation=accumulation, tied=tied,
        schedule=schedule, stages=stages, layers=max(4, stages),
    )  # fmt: skip


# Two pipeline ranks of one device; two of two, and four of one.
MATRIX = {
    2: [
        case("1f1b", 2, 2, 8, tied=True, recompute=False),
        case("interleaved", 2, 4, 4, tied=False, recompute=True),
        case("zb-v", 2, 4, 4, tied=True, recompute=False),
        # Planned and run as on an accelerator, where regions are compiled.
        dataclasses.replace(
            case("dualpipe-v", 2, 4, 4, tied=True, recompute=True), hardware="compiled.json", compiled=True
        ),
    ],
    4: [
        case("1f1b", 4, 2, 4, tied=False, recompute=True),
        case("interleaved", 4, 4, 4, tied=True, recompute=True),
        case("zb-v", 4, 4, 4, tied=False, recompute=False),
        case("interleaved", 4, 8, 4, tied=False, recompute=False),
        # Two replicas of a pipeline of two: gradients are reduced between replicas, stage by stage.
        dataclasses.replace(case("zb-v", 2, 4, 4, tied=True, recompute=False), runtime=4),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    hardware = Path(tiny.write_hardware(folder))
    hardware.write_text(hardware.read_text().replace('"Test"', '"CPU"'))  # not compiled
    tiny.write_hardware(folder, "compiled.json")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return plain_loops(tiny.write_dataset(folder / "data"))


def losses_of(folder: Path, name: str, which: str = "loss") -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[which] for line in lines]


def norms_of(folder: Path, name: str) -> list[float]:
    return losses_of(folder, name, "gradient_norm")


def compare_weights(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    shapes = checkpoint.shapes()
    assert {name.removeprefix("model.") for name in shapes if name.startswith("model.")} == set(weights)
    for name, wanted in weights.items():
        assert tiny.close(checkpoint.read(f"model.{name}", shapes[f"model.{name}"]), wanted) < TOLERANCE, name


def compare(case: Case, folder: Path, reference) -> list[float]:
    """A case's losses, norms and weights are those of the plain loop, whose losses it returns."""
    losses, weights, norms = reference(case)
    assert losses_of(folder, case.name) == pytest.approx(losses, rel=TOLERANCE), case.name
    assert norms_agree(norms_of(folder, case.name), norms), case.name
    compare_weights(Checkpoint.open(latest_checkpoint(folder / "checkpoints" / case.name)), weights)
    return losses


@pytest.mark.parametrize("world", MATRIX)
def test_plain_loop_and_pipeline_agree(world, folder, reference):
    reference(MATRIX[world][0])
    run(world, train_all, MATRIX[world], folder, init=False)
    for case in MATRIX[world]:
        losses = compare(case, folder, reference)
        plan = json.loads((folder / "code" / case.name / "plan.json").read_text())
        assert len(plan["stages"]) == case.stages
        assert plan["pipeline"]["schedule"]["kind"] == case.schedule
        if case.schedule in ("zb-v", "dualpipe-v") and case.plan == case.stages // 2:  # no stage gathers weights
            assert plan["pipeline"]["splits"] == [True] * case.stages
        again = any(block["recompute"].get("keeps all", 0) == 0 for block in plan["stages"][0]["blocks"].values())
        assert again == bool(case.recompute)
        assert losses[-1] < losses[0] - 0.05, "the reference does not learn: the comparison would say little"


HERE = ("recomputes all", "recomputes all but attention")
AWAY = tuple(f"{name}, on the host" for name in HERE)


def test_stages_use_the_host_and_pieces(folder, reference):
    """To the last bit as without the host, though another micro-batch's forward comes before a backward."""
    plain = dataclasses.replace(case("1f1b", 2, 2, 4, tied=True, recompute=False), levels=HERE)
    cases = [
        plain,
        dataclasses.replace(plain, levels=AWAY),
        dataclasses.replace(plain, levels=AWAY, compiled=True, hardware="compiled.json"),
        dataclasses.replace(case("zb-v", 2, 4, 4, tied=False, recompute=False), levels=AWAY),
        dataclasses.replace(case("interleaved", 2, 4, 4, tied=False, recompute=False), levels=AWAY, pieces=4),
    ]
    run(2, train_all, cases, folder, init=False)
    for one in cases:
        compare(one, folder, reference)
        code = folder / "code" / one.name
        plan = json.loads((code / "plan.json").read_text())
        texts = [(code / f"gencode_stage{stage}.py").read_text() for stage in range(one.stages)]
        away = one.levels == AWAY
        assert all(("axes.host.keeping(" in text) == away for text in texts)
        assert all(("= in_pieces(" in text) == bool(one.pieces) for text in texts)
        for what in ("state_on_host", "gradients_on_host"):
            assert [bool(stage[what]) for stage in plan["stages"]] == [away] * one.stages
        assert plan["pipeline"]["splits"] == [False] * one.stages, "1f1b has no backward in two parts"
    here, away = (Checkpoint.open(latest_checkpoint(folder / "checkpoints" / one.name)) for one in cases[:2])
    assert here.shapes() == away.shapes()
    for name, shape in here.shapes().items():
        assert torch.equal(here.read(name, shape), away.read(name, shape)), name


def test_stages_compute_groups_of_layers_again(folder, reference):
    """Also where backward is split in two, of which the first computes the groups again."""
    twos = {level.inner: level.name for level in IN_GROUPS if level.size == 2}
    cases = [
        dataclasses.replace(case("1f1b", 2, 2, 4, tied=True, recompute=False), levels=(twos[RECOMPUTES_ALL],) * 2),
        dataclasses.replace(
            case("zb-v", 2, 4, 4, tied=False, recompute=False), layers=8, levels=(twos[KEEPS_ALL],) * 2
        ),
    ]
    run(2, train_all, cases, folder, init=False)
    for one in cases:
        compare(one, folder, reference)
        code = folder / "code" / one.name
        splits = json.loads((code / "plan.json").read_text())["pipeline"]["splits"]
        assert splits == [one.schedule == "zb-v"] * one.stages
        assert all("def group(" in (code / f"gencode_stage{stage}.py").read_text() for stage in range(one.stages))


def train(case: Case, folder: Path, name: str, steps: int, resume: Path | None = None) -> None:
    args = arguments(case, folder)
    checkpoint = CheckpointConfig(folder / "checkpoints", interval=0, resume=resume)
    with planned(case):
        Trainer(dataclasses.replace(args, name=name, max_train_steps=steps, checkpoint=checkpoint)).run()


def resume_copy(saved: Path, folder: Path, name: str) -> Path:
    """A copy of a checkpoint in a run folder of its own, so that a run that goes on from it leaves the original."""
    return Path(shutil.copytree(saved, folder / "checkpoints" / name / saved.name))


PIPELINES = [
    case("1f1b", 2, 2, 4, tied=True, recompute=False),
    case("zb-v", 2, 4, 4, tied=True, recompute=False),
]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda case: case.name)
def test_resuming_with_and_without_a_pipeline(pipeline, folder, reference, tmp_path):
    """From a pipeline's shards to one device and back, and from its merged file."""
    losses, *_ = reference(pipeline)
    alone = dataclasses.replace(pipeline, plan=1, runtime=1, schedule=None)
    first, there, back, merged = (f"{pipeline.schedule}-{name}" for name in ("first", "there", "back", "merged"))

    def last(name: str) -> Path:
        return latest_checkpoint(folder / "checkpoints" / name)

    run(2, train, pipeline, folder, first, 2, init=False)
    run(1, train, alone, folder, there, 4, resume_copy(last(first), folder, there), init=False)
    assert losses_of(folder, there) == pytest.approx(losses[2:4], rel=TOLERANCE)
    shutil.copytree(folder / "code" / first, folder / "code" / back)  # else it is searched for again
    run(2, train, pipeline, folder, back, 6, resume_copy(last(there), folder, back), init=False)
    assert losses_of(folder, back) == pytest.approx(losses[4:6], rel=TOLERANCE)
    merge_to_file(Checkpoint.open(last(first)), tmp_path / "merged.ckpt")
    run(1, train, alone, folder, merged, 4, tmp_path / "merged.ckpt", init=False)
    assert losses_of(folder, merged) == losses_of(folder, there)


def test_resuming_with_state_on_the_host(folder, reference):
    """From one device into a pipeline, to the last bit as without the host; within the pipeline; and back."""
    here = dataclasses.replace(case("1f1b", 2, 2, 4, tied=True, recompute=False), levels=HERE)
    away = dataclasses.replace(here, levels=AWAY)
    alone = dataclasses.replace(here, plan=1, runtime=1, schedule=None, levels=())
    losses, *_ = reference(alone)

    def resumed(one: Case, name: str, steps: int, of: str) -> dict[str, Tensor]:
        saved = latest_checkpoint(folder / "checkpoints" / of)
        run(one.runtime, train, one, folder, name, steps, resume_copy(saved, folder, name), init=False)
        assert losses_of(folder, name) == pytest.approx(losses[steps - 2 : steps], rel=TOLERANCE)
        checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / name))
        return {name: checkpoint.read(name, shape) for name, shape in checkpoint.shapes().items()}

    run(1, train, alone, folder, "alone", 1, init=False)
    ours, theirs = resumed(away, "to-host", 3, "alone"), resumed(here, "to-device", 3, "alone")
    plan = json.loads((folder / "code" / "to-host" / "plan.json").read_text())
    assert all(stage["state_on_host"] for stage in plan["stages"])
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    resumed(away, "from-host", 5, "to-host")
    resumed(alone, "alone-again", 7, "from-host")
