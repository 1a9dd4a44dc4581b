"""Weights that are gathered in fp8: trained to the last bit as if they were gathered in bf16, and rounded then."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.cli.config import CheckpointConfig, EvaluationConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.data.training import PackedDataset
from nnscaler.recompute import ON_DEVICE, ON_HOST
from nnscaler.runtime import module
from tests import tiny
from tests.checkpoint.jobs import assert_equal, tensors
from tests.launch import run
from tests.parity import Case, arguments, compiled_regions, planned

STEPS, SAVED, BUCKET = 4, 2, 3000
EACH, AWAY = (tuple(level.name for level in levels) for levels in (ON_DEVICE, ON_HOST))
NARROW = Case(2, 2, accumulation=2, precision="fp8", hardware="fp8.json", layers=4, levels=EACH)
COMPILED = dataclasses.replace(NARROW, compiled=True, pieces=2, levels=EACH[:1] * 2 + EACH[3:] * 2)
COPIES = dataclasses.replace(NARROW, runtime=4)
AXES = dataclasses.replace(NARROW, plan=4, runtime=4, hardware="far.json", levels=EACH[:1] * 2 + EACH[3:] * 2)
STAGES = dataclasses.replace(NARROW, plan=4, runtime=4, schedule="1f1b", stages=2, levels=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    flops = {"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 4e9}
    tiny.write_hardware(folder, NARROW.hardware, flops=flops)
    link = {"bandwidth": 1e9, "latency": 0.0}
    tiny.write_hardware(folder, AXES.hardware, flops=flops, devices_per_node=2, intra=link, inter=link)
    tiny.write_dataset(folder / "data")
    tiny.write_dataset(folder / "validation", rows=5)
    return folder


def train(jobs: list[tuple[Case, str, Path | None]], folder: Path) -> None:
    """On every rank: trains each (case, name of the run, checkpoint to go on from), in small buckets, which cut
    weights. What is compiled is not evaluated, for which it would be compiled once more."""
    buckets = functools.partial(module.make_buckets, elements=BUCKET)
    for index, (case, name, resume) in enumerate(jobs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
        args = dataclasses.replace(
            arguments(case, folder), name=name, max_train_steps=STEPS,
            checkpoint=CheckpointConfig(folder / "checkpoints", interval=SAVED, keep=0, resume=resume),
            evaluation=EvaluationConfig(None if case.compiled else PackedDataset.open(folder / "validation"), SAVED),
        )  # fmt: skip
        regions = compiled_regions() if case.compiled else nullcontext()
        with planned(case), regions, patch.object(module, "make_buckets", buckets):
            Trainer(args).run()


def metrics(folder: Path, name: str) -> list[tuple[float, float, float | None]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    found = map(json.loads, lines)
    return [(entry["loss"], entry["gradient_norm"], entry.get("eval_loss")) for entry in found]


def last(folder: Path, name: str) -> dict[str, Tensor]:
    return tensors(latest_checkpoint(folder / "checkpoints" / name))


def code_of(folder: Path, name: str) -> str:
    return (folder / "code" / name / "gencode_stage0.py").read_text()


def assert_alike(folder: Path, name: str, other: str) -> None:
    """And that one gathers in fp8 what the other does not."""
    assert code_of(folder, name).count("= axes.gathers.weight_in_fp8(") >= 5
    assert "weight_in_fp8" not in code_of(folder, other)
    assert metrics(folder, name) == metrics(folder, other)
    assert_equal(last(folder, name), last(folder, other))


def both(case: Case, name: str) -> list[tuple[Case, str, None]]:
    return [(case, name, None), (dataclasses.replace(case, in_bf16=True), f"{name}-in-bf16", None)]


@pytest.fixture(scope="module")
def trained(folder):
    masters = dataclasses.replace(NARROW, master_only=True)
    on_the_host = dataclasses.replace(NARROW, levels=AWAY)
    others = [*both(masters, "masters"), (on_the_host, "on-the-host", None)]
    run(2, train, [*both(NARROW, "narrow"), *others, *both(COMPILED, "regions")], folder, init=False)
    run(4, train, [*both(COPIES, "copies"), *both(STAGES, "stages"), *both(AXES, "axes")], folder, init=False)
    return folder


def test_on_two_devices(trained):
    assert_alike(trained, "narrow", "narrow-in-bf16")
    assert "again=True" in code_of(trained, "narrow")
    assert metrics(trained, "narrow")[-1][0] < metrics(trained, "narrow")[0][0] - 0.05


def test_of_masters_and_with_state_and_activations_on_the_host(trained):
    assert "dtype=torch.bfloat16" in code_of(trained, "masters")
    assert "axes.host.keeping(" in code_of(trained, "on-the-host")
    assert_alike(trained, "masters", "masters-in-bf16")  # in buckets of their own, whose norms add up otherwise
    assert_alike(trained, "on-the-host", "narrow-in-bf16")


def test_one_is_continued_as_the_other(trained):
    jobs = []
    for (case, name, _), of in zip(both(NARROW, "then"), ("narrow-in-bf16", "narrow")):
        saved = trained / "checkpoints" / of / f"step_{SAVED:08d}"
        jobs.append((case, name, Path(shutil.copytree(saved, trained / "checkpoints" / name / saved.name))))
    run(2, train, jobs, trained, init=False)
    for _, name, _ in jobs:
        assert metrics(trained, name) == metrics(trained, "narrow")[SAVED:]
        assert_equal(last(trained, name), last(trained, "narrow"))


def test_in_compiled_regions_and_in_pieces(trained):
    assert_alike(trained, "regions", "regions-in-bf16")
    assert "in_pieces(llama_decoder_layer_region_" in code_of(trained, "regions")


def test_over_two_axes(trained):
    """Weights are gathered along one, so that products take parts of them: these have the scale of the whole weight."""
    found, wanted = ([loss for loss, *_ in metrics(trained, name)] for name in ("axes", "axes-in-bf16"))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert code_of(trained, "axes").count("_s0_whole_fp8 = axes.gathers.weight_in_fp8(") >= 1
    assert len(json.loads((trained / "code" / "axes" / "plan.json").read_text())["mesh"]["sizes"]) == 2


@pytest.mark.parametrize("name", ["copies", "stages"])
def test_where_owners_share_a_shard_and_in_stages(name, trained):
    assert_alike(trained, name, f"{name}-in-bf16")
