"""Weights that are stored as their master weights alone: trained to the last bit as with a copy beside them, saved,
continued with one and without, and as small as they are said to be."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from nnscaler import planner, planning
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.cli.config import CheckpointConfig, EvaluationConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.compiler import Source, compile_model
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.data.training import PackedDataset
from nnscaler.loaded import LoadedModel
from nnscaler.plan import Key
from nnscaler.recompute import ON_DEVICE, ON_HOST
from tests import tiny
from tests.checkpoint.jobs import assert_equal, tensors
from tests.launch import run
from tests.parity import Case, arguments, gathered, planned

STEPS, SAVED = 6, 3
HERE, AWAY = (tuple(level.name for level in levels[2:]) for levels in (ON_DEVICE, ON_HOST))
COPIED = Case(2, 2, accumulation=2, precision="bf16", levels=HERE)
MASTERS = dataclasses.replace(COPIED, master_only=True)
ON_THE_HOST = dataclasses.replace(MASTERS, levels=AWAY)  # with the optimizer's state there
COPIED_THERE = dataclasses.replace(COPIED, levels=AWAY)  # the master weights, too
ROWS = 64
FP8 = {"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 4e9}
STAGES = dataclasses.replace(COPIED, plan=4, runtime=4, schedule="1f1b", stages=2, levels=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    tiny.write_hardware(folder)
    tiny.write_dataset(folder / "data")
    tiny.write_dataset(folder / "validation", rows=5)
    return folder


def train(jobs: list[tuple[Case, str, Path | None]], folder: Path) -> None:
    """On every rank: trains each (case, name of the run, checkpoint to go on from).

    Gradients are not clipped: their norm is added up bucket by bucket, and what has a copy lies in buckets of its own.
    """
    for index, (case, name, resume) in enumerate(jobs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
        args = arguments(case, folder)
        args = dataclasses.replace(
            args, name=name, max_train_steps=STEPS, optimizer=OptimizerConfig(clip_gnorm=0.0),
            checkpoint=CheckpointConfig(folder / "checkpoints", interval=SAVED, keep=0, resume=resume),
            evaluation=EvaluationConfig(PackedDataset.open(folder / "validation"), SAVED),
        )  # fmt: skip
        with planned(case):
            Trainer(args).run()


def metrics(folder: Path, name: str) -> list[tuple[float, float | None]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [(entry["loss"], entry.get("eval_loss")) for entry in map(json.loads, lines)]


def last(folder: Path, name: str) -> dict[str, Tensor]:
    return tensors(latest_checkpoint(folder / "checkpoints" / name))


def without_copies(folder: Path, name: str) -> list[str]:
    plan = json.loads((folder / "code" / name / "plan.json").read_text())
    parts = plan["stages"] if "pipeline" in plan else [plan]
    return [path for part in parts for path, one in part["parameters"].items() if one["master_only"]]


@pytest.fixture(scope="module")
def trained(folder):
    names = {"copied": COPIED, "masters": MASTERS, "on-the-host": ON_THE_HOST, "copied-there": COPIED_THERE}
    run(2, train, [(case, name, None) for name, case in names.items()], folder, init=False)
    return folder


def test_training_and_validation_are_the_same_to_the_last_bit(trained):
    assert not without_copies(trained, "copied")
    assert len(without_copies(trained, "masters")) > 10
    code = (trained / "code" / "masters" / "gencode_stage0.py").read_text()
    assert re.search(r"\(axes.devices, \d\), dtype=torch.bfloat16, again=True\)", code)
    assert metrics(trained, "masters") == metrics(trained, "copied")
    assert [loss is not None for _, loss in metrics(trained, "copied")].count(True) == STEPS // SAVED
    assert_equal(last(trained, "masters"), last(trained, "copied"))


def test_moments_may_lie_on_the_host_and_masters_too_where_there_are_copies(trained):
    assert json.loads((trained / "code" / "on-the-host" / "plan.json").read_text())["state_on_host"]
    assert without_copies(trained, "on-the-host") == without_copies(trained, "masters")
    assert not without_copies(trained, "copied-there")
    for name in ("on-the-host", "copied-there"):
        assert metrics(trained, name) == metrics(trained, "copied")
        assert_equal(last(trained, name), last(trained, "copied"))


def test_one_is_continued_as_the_other(trained):
    """The master weight itself is saved: what is rounded when it is gathered goes on unrounded."""
    jobs = []
    for case, name, of in (
        (COPIED, "then-copied", "masters"), (MASTERS, "then-masters", "copied"),
        (COPIED_THERE, "then-there", "masters"), (MASTERS, "then-from-there", "copied-there"),
    ):  # fmt: skip
        saved = trained / "checkpoints" / of / f"step_{SAVED:08d}"
        jobs.append((case, name, Path(shutil.copytree(saved, trained / "checkpoints" / name / saved.name))))
    run(2, train, jobs, trained, init=False)
    for _, name, _ in jobs:
        assert metrics(trained, name) == metrics(trained, "copied")[SAVED:]
        assert_equal(last(trained, name), last(trained, "copied"))


def test_in_a_pipeline(folder):
    cases = {"stages": STAGES, "stages-of-masters": dataclasses.replace(STAGES, master_only=True)}
    run(4, train, [(case, name, None) for name, case in cases.items()], folder, init=False)
    assert len(without_copies(folder, "stages-of-masters")) > 10
    assert metrics(folder, "stages-of-masters") == metrics(folder, "stages")
    assert_equal(last(folder, "stages-of-masters"), last(folder, "stages"))


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def held(folder: Path, source: Source) -> dict[str, int]:
    """Bytes of this rank: of parameters, of their gradients, and of what else the optimizer has."""
    loaded = LoadedModel(folder, source, OptimizerConfig(), torch.device("cpu"))
    buckets, optimizer = loaded.module.buckets, loaded.optimizer
    stored = {bucket.flat.untyped_storage().data_ptr(): bucket.flat.untyped_storage().nbytes() for bucket in buckets}
    masters = [one for one in optimizer.masters if one.untyped_storage().data_ptr() not in stored]
    moments = [tensor for state in optimizer.state for tensor in state.values()]
    whole = [bucket.gradient if bucket.summed is None else bucket.summed for bucket in buckets]
    groups = {"gradients": whole, "master weights": masters, "moments": moments}
    return {"parameters": sum(stored.values()), **{what: sum(t.nbytes for t in each) for what, each in groups.items()}}


def alive(folder: Path, source: Source) -> dict[str, int]:
    """Bytes of this rank after two steps, of all tensors as large as weights that anything holds: in bf16, fp8, and
    else."""
    loaded = LoadedModel(folder, source, OptimizerConfig(), torch.device("cpu"))
    loaded.initialise(0)
    for _ in range(2):
        loaded.module.accumulate([{"x": torch.rand(ROWS, 64).bfloat16()} for _ in range(2)])
        loaded.optimizer.step(labels=1.0, lr=0.1)
    loaded.optimizer.finish()
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.is_cpu]
    memory = {one.untyped_storage().data_ptr(): (one.untyped_storage().nbytes(), one.dtype) for one in tensors}
    found = dict.fromkeys(("bf16", "fp8", "else"), 0)
    for size, dtype in memory.values():
        if size >= 32 * 64:
            found[{torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}.get(dtype, "else")] += size
    return found


def compiled(folder: Path, away: bool = False, fp8: bool = False) -> tuple[Source, dict[str, Path]]:
    """The products, with copies beside their masters and without.

    away  whether gradients and the optimizer's state lie on the host
    fp8   whether products may be in fp8
    """
    source = Source(Products, {"x": torch.empty((ROWS, 64), dtype=torch.bfloat16, device="meta")}, fp8=fp8)
    config = ComputeConfig(2, 2, hardware=tiny.write_hardware(folder, flops=FP8), micro_batches=2)
    folders = {name: folder / name for name in ("copied", "masters")}
    for name, own in folders.items():

        def find_plan(*args, alone=name == "masters", **options):
            plan = planner.find_plan(*args, **options)
            plan.master_only = gathered(plan) if alone else set()
            plan.host |= dict.fromkeys([Key("state"), Key("gradients")] if away else [], 1e9)  # more than there is
            return plan

        with patch.object(planning, "find_plan", find_plan):
            compile_model(source, config, own)
    return source, folders


def test_it_takes_the_bytes_that_it_is_said_to(tmp_path):
    """Three weights of 64 x 64, a half of each on a device."""
    elements = 3 * 64 * 64 // 2
    source, folders = compiled(tmp_path)
    rest = {"gradients": 4 * elements, "moments": 8 * elements}
    wanted = {
        "copied": {"parameters": 2 * elements, "master weights": 4 * elements, **rest},
        "masters": {"parameters": 4 * elements, "master weights": 0, **rest},
    }
    for name, sizes in wanted.items():
        assert run(2, held, folders[name], source) == [sizes] * 2


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("away", [False, True])
def test_nothing_holds_a_copy_when_no_weight_is_in_use(away, fp8, tmp_path):
    """Each of a weight, its gradient and two moments in fp32; with copies, the weight is in bf16 beside that; without,
    and gathered in fp8, its shard is kept in fp8. What lies on the host is there in a place for each of three parts of
    the state, and in a gradient's slot, too."""
    elements = 3 * 64 * 64 // 2
    source, folders = compiled(tmp_path, away, fp8)
    in_fp32 = 4 * elements * (8 if away else 4)
    for name, copies, rounded in (("copied", 2 * elements, 0), ("masters", 0, elements * fp8)):
        assert ("weight_in_fp8(" in (folders[name] / "gencode_stage0.py").read_text()) == fp8
        wanted = {"bf16": copies, "fp8": rounded, "else": in_fp32}
        assert run(2, alive, folders[name], source) == [wanted] * 2
