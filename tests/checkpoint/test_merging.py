"""Merging and exporting take the memory of the largest tensor, not of the model."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from nnscaler.checkpoint import sharded
from nnscaler.checkpoint.checksums import Checksums, whole_file
from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import ASSETS, TrainerState, publish
from nnscaler.checkpoint.merge import merge_to_file
from nnscaler.checkpoint.sharded import save_parts, whole
from nnscaler.checkpoint.stored import Checkpoint
from tests.launch import run

MIB = 2**20
ROWS, COLUMNS, TENSORS = 8192, 2048, 3  # of 64 MiB each, and their two moments: 576 MiB in all


def measure(folder: Path, output: Path, what: str) -> int:
    """Bytes by which merging or exporting, with verification, raises the peak of this process's resident memory."""
    write = merge_to_file if what == "merge" else export_model
    small = write_checkpoint(output.with_name("small"), 1, 1, 1)
    write(Checkpoint.open(small), output.with_name("first"), verify=True)  # which imports all that it needs
    checkpoint = Checkpoint.open(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(checkpoint, output, verify=True)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def write_checkpoint(runs: Path, rows: int, columns: int, tensors: int) -> Path:
    """A checkpoint of one process with the moments of some matrices."""
    names = [f"layer{index}" for index in range(tensors)]
    work = runs / ".step_00000001.writing"
    parameters = {name: {"shape": [rows, columns], "dtype": "bfloat16"} for name in names}
    state = TrainerState(1, 1, 0, 1, {}, 1.0, "run", "model", 1, parameters, {}, "", 0.0)

    def complete(pieces):
        state.write(work)
        (work / ASSETS).mkdir()
        (work / ASSETS / "config.json").write_text("{}")
        others = [work / "trainer.json", work / ".metadata", work / ASSETS / "config.json"]
        Checksums(work, [*pieces, *(whole_file(work, path) for path in others)]).write()

    parts = [
        whole(f"{kind}.{name}", torch.full((rows, columns), float(index)))
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for index, name in enumerate(names)
    ]
    save_parts(work, parts, complete)
    return publish(work, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "PIECE_ELEMENTS", 2**20)  # small beside a tensor, so that a second one would be noticed
        return write_checkpoint(tmp_path_factory.mktemp("large"), ROWS, COLUMNS, TENSORS)


@pytest.mark.parametrize("what", ["merge", "export"])
def test_peak_memory(saved, tmp_path, what):
    """At most the largest tensor and the pieces it is read in, whatever the number of tensors."""
    (peak,) = run(1, measure, saved, tmp_path / "output", what)
    largest = 4 * ROWS * COLUMNS
    assert largest / 2 < peak < largest + 56 * MIB, f"{peak / MIB} MiB; all tensors are {9 * largest / MIB} MiB"
    if what == "merge":
        content = torch.load(tmp_path / "output", mmap=True, weights_only=True)
        assert content["model"]["layer2"].eq(2.0).all()
    else:
        config = json.loads((tmp_path / "output" / "config.json").read_text())
        assert config == {}
