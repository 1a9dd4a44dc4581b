"""Pipelines whose stages have unequal numbers of devices: they give what the plain loop does, and any plan goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.trainer import Trainer
from nnscaler.mesh import PipelineMesh
from nnscaler.pipeline import search
from nnscaler.placement import Placement, Shard
from nnscaler.schedules import Schedule
from tests import tiny
from tests.distributed.test_pipeline import case, compare, compare_weights, losses_of, resume_copy, train
from tests.launch import run
from tests.parity import STEPS, TOLERANCE, Case, arguments, plain_loops

SEQUENCE, FEATURES = Shard(1), Shard(2)


@dataclasses.dataclass(frozen=True)
class Uneven:
    """A pipeline of one stage a rank on so many devices each, in some copies, and along what its tensors cross."""

    devices: tuple[int, ...]
    along: Placement
    tied: bool = True
    recompute: bool = False
    copies: int = 1

    @property
    def case(self) -> Case:
        count, stages = sum(self.devices), len(self.devices)
        one = case("1f1b", count, stages, 4, self.tied, self.recompute)
        return dataclasses.replace(one, layers=3, runtime=self.copies * count)


@contextmanager
def forced(uneven: Uneven) -> Iterator[None]:
    """Inside, the only plan that is tried is the pipeline's."""
    stages = len(uneven.devices)
    on = search._On(
        Schedule("1f1b", stages, stages, 4), PipelineMesh.of([(size,) for size in uneven.devices], uneven.copies)
    )
    with (
        patch.object(search, "_rounds", lambda *given: [(False, [on])]),
        patch.object(search, "_best_layout", lambda *given: (uneven.along,)),
    ):
        yield


def train_each(all_of_them: list[Uneven], folder: Path) -> None:
    for index, one in enumerate(all_of_them):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)  # where they meet, each time anew
        with forced(one):
            Trainer(arguments(one.case, folder)).run()


def train_one(uneven: Uneven, folder: Path, name: str, steps: int, resume: Path | None = None) -> None:
    with forced(uneven):
        train(uneven.case, folder, name, steps, resume)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    hardware = Path(tiny.write_hardware(folder))
    hardware.write_text(hardware.read_text().replace('"Test"', '"CPU"'))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return plain_loops(tiny.write_dataset(folder / "data"))


def plan_of(folder: Path, name: str) -> dict:
    return json.loads((folder / "code" / name / "plan.json").read_text())


MATRIX = {
    3: [Uneven((2, 1), SEQUENCE), Uneven((1, 2), FEATURES, tied=False, recompute=True)],
    4: [Uneven((1, 2, 1), SEQUENCE)],
    6: [Uneven((4, 2), FEATURES), Uneven((1, 2), SEQUENCE, copies=2)],
}


@pytest.mark.parametrize("world", MATRIX)
def test_plain_loop_and_uneven_pipeline_agree(world, folder, reference):
    run(world, train_each, MATRIX[world], folder, init=False)
    for one in MATRIX[world]:
        losses = compare(one.case, folder, reference)
        assert losses[-1] < losses[0] - 0.05
        plan = plan_of(folder, one.case.name)
        assert [tuple(stage["mesh"]["sizes"]) for stage in plan["stages"]] == [(size,) for size in one.devices]
        sides = [(tensors[0]["sent"], tensors[0]["received"]) for tensors in plan["pipeline"]["crossing"]]
        laid = ["R" if size == 1 else str(one.along) for size in one.devices]
        assert sides == list(pairwise(laid))
        assert bool(plan["pipeline"]["shared"]) == one.tied


def test_resuming_on_other_numbers_of_devices(folder, reference):
    """With tied weights, of which each stage's devices own other parts: 2 + 1, then 1 + 2, then alone, and back."""
    first, second = Uneven((2, 1), SEQUENCE), Uneven((1, 2), FEATURES)
    alone = dataclasses.replace(first.case, plan=1, runtime=1, schedule=None)
    losses, weights, _ = reference(alone)

    def resumed(of: str, name: str) -> Path:
        return resume_copy(latest_checkpoint(folder / "checkpoints" / of), folder, name)

    run(3, train_one, first, folder, "a", 2, init=False)
    run(3, train_one, second, folder, "b", 4, resumed("a", "b"), init=False)
    run(1, train, alone, folder, "c", 5, resumed("b", "c"), init=False)
    shutil.copytree(folder / "code" / "a", folder / "code" / "d")
    run(3, train_one, first, folder, "d", STEPS, resumed("c", "d"), init=False)
    found = [loss for name in "abcd" for loss in losses_of(folder, name)]
    assert found == pytest.approx(losses, rel=TOLERANCE)
    compare_weights(Checkpoint.open(latest_checkpoint(folder / "checkpoints" / "d")), weights)
