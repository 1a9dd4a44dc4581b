"""Whatever byte of a checkpoint changes or is missing, it is noticed and named, and training falls back."""

from __future__ import annotations

import random
import re
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

import ckpt_merger
from nnscaler import UserError
from nnscaler import command as command_line
from nnscaler.checkpoint import checksums, export, merge
from nnscaler.checkpoint.checksums import CHECKSUMS, Checksums, CorruptCheckpoint, file_crc
from nnscaler.checkpoint.folder import BEST, LAST, complete_checkpoints, latest_checkpoint
from nnscaler.checkpoint.merge import MergedFile, merge_to_file
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.trainer import Trainer
from tests.checkpoint.jobs import assert_equal, final, job, losses, tensors, train
from tests.launch import run
from tests.parity import Case

TWO = Case(1, 2)
ONE = Case(1, 1, accumulation=2)


@pytest.fixture(scope="module")
def folder(folder):
    run(2, train, TWO, folder, 6, "run", {"interval": 2, "keep": 0}, init=False)
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    return latest_checkpoint(folder / "checkpoints" / "run")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run" / saved.name))


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def read_all(folder: Path) -> None:
    """Reads a checkpoint as training and merging do, every piece of it."""
    checkpoint = Checkpoint.open(folder)
    for name, entry in checkpoint.entries.items():
        checkpoint.read(name, tuple(entry.size))


SHARDS = ["__0_0.distcp", "__1_0.distcp"]
KINDS = [*SHARDS, ".metadata", "trainer.json", "model/config.json", CHECKSUMS]


def test_these_are_all_kinds_of_files(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert files == {*KINDS, "model/generation_config.json"} & files
    assert files >= set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_bit_is_found(copy, name):
    """By who reads the whole checkpoint, and is named."""
    path, generator = copy / name, random.Random(name)
    original = path.read_bytes()
    edges = [(0, 0), (0, 7), (len(original) - 1, 0), (len(original) - 1, 7)]
    places = [(generator.randrange(len(original)), generator.randrange(8)) for _ in range(16)]
    for place, bit in [*edges, *places]:
        flip(path, place, bit)
        with pytest.raises(CorruptCheckpoint, match=f"file '{name}'") as found:
            read_all(copy)
        assert name not in SHARDS or re.search(r"tensor '(model|exp_avg|exp_avg_sq|random)\.", str(found.value))
        path.write_bytes(original)
    read_all(copy)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_all_of_a_range_counts_in_its_checksum(step, tmp_path, monkeypatch):
    """Of what is read in many steps, too."""
    monkeypatch.setattr(checksums, "_READ_BYTES", step)
    data = bytes(range(50))
    (tmp_path / "data").write_bytes(data)
    assert file_crc(tmp_path / "data", 10, 25) == zlib.crc32(data[10:35])
    assert file_crc(tmp_path / "data", 10) == zlib.crc32(data[10:])


@pytest.mark.parametrize("name", KINDS)
def test_every_truncation_is_found(copy, name):
    path, generator = copy / name, random.Random(name)
    original = path.read_bytes()
    for length in (0, 1, len(original) - 1, *(generator.randrange(len(original)) for _ in range(4))):
        path.write_bytes(original[:length])
        with pytest.raises(CorruptCheckpoint, match=f"file '{name}'"):
            Checkpoint.open(copy)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"has no {name}"):
        Checkpoint.open(copy)


def test_every_flipped_bit_of_a_merged_file_is_found(saved, tmp_path):
    path = tmp_path / "merged.ckpt"
    merge_to_file(Checkpoint.open(saved), path)
    original, generator = path.read_bytes(), random.Random(0)
    names = list(Checkpoint.open(saved).shapes())
    edges = [0, 40, len(original) // 2, len(original) - 30, len(original) - 1]
    for place in [*edges, *(generator.randrange(len(original)) for _ in range(25))]:
        flip(path, place, generator.randrange(8))
        with pytest.raises(UserError, match="damaged"):
            MergedFile.open(path).check(names)
        path.write_bytes(original)
    for length in (0, 1, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(UserError, match="is not a merged checkpoint, or is cut short"):
            MergedFile.open(path)
    path.write_bytes(original)
    MergedFile.open(path).check(names)


def what_loading_says(path: Path) -> str:
    try:
        MergedFile.open(path).load([])
    except CorruptCheckpoint as damage:
        return str(damage)
    return ""


def test_every_tensor_of_a_merged_file_is_checked_where_it_is_loaded(saved, tmp_path):
    """The ranks share the work, and all of them hear of damage."""
    path = tmp_path / "merged.ckpt"
    merge_to_file(Checkpoint.open(saved), path)
    original, opened = path.read_bytes(), MergedFile.open(path)
    assert what_loading_says(path) == ""
    for name, place in opened._places.items():
        if name in opened._crcs:
            flip(path, place.begin + place.length // 2, 3)
            assert f"'{name}' has changed" in what_loading_says(path)
            path.write_bytes(original)
    for name in list(opened._crcs)[:2]:
        flip(path, opened._places[name].begin, 3)
        assert all(f"'{name}' has changed" in said for said in run(2, what_loading_says, path))
        path.write_bytes(original)


def damage_tensor(folder: Path, tensor: str) -> None:
    """Flips a bit of the last piece of a tensor's data."""
    piece = [p for p in Checksums.read(folder).pieces.values() if p.tensor.startswith(tensor)][-1]
    flip(folder / piece.file, piece.begin + piece.length // 2, 3)


def resume_from(folder: Path, run_folder: Path, caplog) -> tuple[str, str]:
    """Trains on in a copy of a run's folder; returns the run's name and what was said."""
    caplog.clear()
    Trainer(job(ONE, folder, 7, run_folder.name, resume=run_folder)).run()
    return run_folder.name, "\n".join(record.getMessage() for record in caplog.records)


def test_training_falls_back_and_says_so(folder, saved, caplog):
    caplog.set_level("INFO", logger="nnscaler")
    runs = folder / "checkpoints"
    shutil.copytree(runs / "run", runs / "tensor", symlinks=True)
    damage_tensor(runs / "tensor" / saved.name, "exp_avg_sq.model.model.layers.1")
    name, said = resume_from(folder, runs / "tensor", caplog)
    assert "step_00000006' is damaged: file '__" in said
    assert "tensor 'exp_avg_sq.model.model.layers.1" in said
    assert "falling back" in said
    assert "step_00000004: step 4, 8 samples" in said
    whole = losses(folder, "run")
    assert losses(folder, name)[:2] == pytest.approx(whole[4:], rel=1e-5)  # the fifth and sixth once more
    shutil.copytree(runs / "run", runs / "state", symlinks=True)
    flip(runs / "state" / saved.name / "trainer.json", 20, 1)
    (runs / "state" / "step_00000004" / ".metadata").unlink()
    name, said = resume_from(folder, runs / "state", caplog)
    assert "step_00000006' is damaged: file 'trainer.json' has changed; falling back" in said
    assert "step_00000004' is incomplete: it has no .metadata; falling back" in said
    assert "step_00000002: step 2, 4 samples" in said


def test_two_ranks_fall_back_together_from_the_named_checkpoint(folder, saved):
    """The damage is in a shard that not every rank reads; nothing newer than what was asked for is taken."""
    runs = folder / "checkpoints"
    shutil.copytree(runs / "run", runs / "named", symlinks=True)
    damage_tensor(runs / "named" / "step_00000004", "model.model.model.layers.0.mlp.up_proj")
    run(2, train, TWO, folder, 6, "named", {"resume": runs / "named" / "step_00000004"}, init=False)
    assert losses(folder, "named") == losses(folder, "run")[2:]
    assert_equal(final(folder, "named"), tensors(saved))


def test_where_all_are_damaged_training_does_not_begin(folder, saved, tmp_path):
    shutil.copytree(saved, tmp_path / saved.name)
    damage_tensor(tmp_path / saved.name, "model.")
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'model\."):
        Trainer(job(ONE, folder, 7, "none", resume=tmp_path)).run()


@pytest.fixture
def merger(monkeypatch, capsys):
    def call(*flags: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["ckpt_merger.py", *map(str, flags)])
        with suppress(SystemExit):
            command_line.run(ckpt_merger.main)
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        return captured.out, "\n".join(errors)

    return call


def test_listing(folder, saved, merger, copy):
    out, error = merger("--ckpt_dir", folder / "checkpoints" / "run", "--list")
    assert not error
    assert len(out.splitlines()) == len(complete_checkpoints(folder / "checkpoints" / "run")), "a line each"
    out, error = merger("--ckpt_dir", folder / "checkpoints" / "run", "--list", "--tensors")
    assert not error
    assert "step_00000006  step 6, loss " in out
    marked = [line for line in out.splitlines() if "<-" in line]
    assert any(LAST in line and "step_00000006" in line for line in marked)
    assert any(BEST in line for line in marked)
    assert "step 6, 12 samples of a dataset of 80, seed 3" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "float32   96 x 32 " in lines["model.model.lm_head.weight"]
    assert "uint8" in lines["random.torch.1"]
    flip(copy / "__1_0.distcp", 5000, 0)
    (copy / "model" / "config.json").unlink()
    out, error = merger("--ckpt_dir", copy.parent, "--list", "--tensors")
    assert "is incomplete: it has no model/config.json" in out
    assert "is incomplete: it has no model/config.json" in error


def test_verifying(saved, copy, merger, tmp_path, monkeypatch):
    out, error = merger("--ckpt_dir", copy, "--verify")
    assert "every file is as it was written" in out
    flip(copy / "__1_0.distcp", 5000, 0)
    out, error = merger("--ckpt_dir", copy, "--verify")
    assert "file '__1_0.distcp', tensor '" in out
    assert "has 1 damaged piece" in error
    out, error = merger("--ckpt_dir", copy, "--output_fname", tmp_path / "x.ckpt")
    assert "file '__1_0.distcp', tensor '" in error
    outputs = ("--output_fname", tmp_path / "x.ckpt", "--output_dir", tmp_path / "model")
    for module, pattern in ((merge, "merged checkpoint"), (export, "file 'model.safetensors' is damaged: tensor '")):
        with monkeypatch.context() as patch:  # the disk does not give back what was written
            patch.setattr(module, "forget_cached", lambda path: flip(path, path.stat().st_size // 2, 0))
            out, error = merger("--ckpt_dir", saved, "--verify", *outputs)
            assert pattern in error
    assert not (tmp_path / "model").exists()
    (tmp_path / "x.ckpt").unlink()
    out, error = merger("--ckpt_dir", saved, "--verify", *outputs)
    assert not error
    assert out.count("and read it again") == 2
    assert complete_checkpoints(copy.parent)
