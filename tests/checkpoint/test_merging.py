"""Merging and exporting take the memory of the largest tensor, not of the model."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from nnscaler.checkpoint import export, merge, sharded
from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint, whole_file
from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import ASSETS, BEST, TrainerState, complete_checkpoints, latest_checkpoint, publish
from nnscaler.checkpoint.merge import MergedFile, merge_to_file
from nnscaler.checkpoint.sharded import save_parts, whole
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.errors import UserError
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


@pytest.mark.parametrize("write", [merge_to_file, export_model])
def test_all_is_on_disk_before_it_gets_its_name(write, tmp_path, monkeypatch):
    """What a file holds when it is synced for the last time is what it holds in the end."""
    synced: dict[str, bytes] = {}
    named = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def record_sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        assert not named, f"{path} is synced after {named}"
        synced[path.name] = path.read_bytes() if path.is_file() else b""
        sync(handle)

    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "runs", 4, 8, 3))
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", lambda path, target: [named.append(target), rename(path, target)])
    monkeypatch.setattr(Path, "replace", lambda path, target: [named.append(target), replace(path, target)])
    output = tmp_path / "output"
    write(checkpoint, output, **({"shard_bytes": 100} if write is export_model else {}))
    assert named == [output]
    files = [path for path in output.rglob("*") if path.is_file()] if output.is_dir() else [output]
    assert len(files) == (5 if write is export_model else 1), "three shards, their index and config.json"
    if write is export_model:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 3 * 4 * 8 * 2, "bytes of three tensors in bf16"
    for path in files:
        assert synced[path.name if output.is_dir() else f".{path.name}.writing"] == path.read_bytes()


@pytest.mark.parametrize(("module", "damaged"), [(merge, ".output.writing"), (export, "00001"), (export, "00003")])
def test_what_is_not_as_written_gets_no_name(module, damaged, tmp_path, monkeypatch):
    """Verified: whichever file the disk does not give back as it was. A merged file from before stays."""
    checkpoint, output = Checkpoint.open(write_checkpoint(tmp_path / "runs", 4, 8, 3)), tmp_path / "output"

    def change(path: Path) -> None:
        if damaged in path.name:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 if module is merge else -1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(module, "forget_cached", change)
    write = partial(export_model, shard_bytes=100)
    if module is merge:
        write = merge_to_file
        merge_to_file(checkpoint, output)
        before = output.read_bytes()
    with pytest.raises(CorruptCheckpoint, match="is damaged"):
        write(checkpoint, output, verify=True)
    assert output.read_bytes() == before if module is merge else not output.exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that gets full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("write", "room"), [(merge_to_file, 10), (merge_to_file, 500), (export_model, 1)])
def test_a_disk_without_room_is_one_line(write, room, tmp_path):
    """torch.save's own errors do not say what is wrong, and those of copies come as a list."""
    checkpoint, output = Checkpoint.open(write_checkpoint(tmp_path / "runs", 4, 8, 1)), tmp_path / "output"
    with pytest.raises(UserError, match=f"^cannot write '{output}': [^()]*File too large"), files_of_at_most(room):
        write(checkpoint, output)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_file_that_is_something_else_is_not_replaced(tmp_path):
    """A merged file is, a damaged one too, and an empty file."""
    checkpoint, output = Checkpoint.open(write_checkpoint(tmp_path / "runs", 4, 8, 1)), tmp_path / "output"
    output.touch()
    merge_to_file(checkpoint, output)
    data = bytearray(output.read_bytes())
    data[MergedFile.open(output)._places["checksums"].begin] ^= 1
    output.write_bytes(data)
    merge_to_file(checkpoint, output)
    MergedFile.open(output).load([])
    output.write_text("thesis")
    with pytest.raises(UserError, match=r"output' already exists and is not a merged checkpoint: remove it or choose"):
        merge_to_file(checkpoint, output)
    assert output.read_text() == "thesis"


@pytest.mark.parametrize("write", [merge_to_file, export_model])
def test_nothing_is_read_again_unless_it_is_to_be_verified(write, tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "runs", 4, 8, 3))
    for module in (merge, export):
        monkeypatch.setattr(module, "forget_cached", lambda path: pytest.fail("nobody has asked for it"))
    write(checkpoint, tmp_path / "output")
    assert (tmp_path / "output").exists()


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


def test_checkpoints_are_found_through_links(tmp_path):
    """`best` and `last`, a run's folder or what holds it as links, a checkpoint's own folder; loops come to an end."""
    first = write_checkpoint(tmp_path / "disk" / "run", 2, 2, 1)
    newest = write_checkpoint(tmp_path / "disk" / "run", 2, 2, 1)
    (tmp_path / "disk" / "run" / BEST).unlink()
    (tmp_path / "disk" / "run" / BEST).symlink_to(first.name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run").symlink_to(tmp_path / "disk" / "run")
    (tmp_path / "linked").symlink_to(tmp_path / "checkpoints")
    (tmp_path / "disk" / "run" / "loop").symlink_to(tmp_path / "disk")
    for path, wanted in {
        "checkpoints/run/best": first, "checkpoints/run/last": newest, "disk/run/best": first, "disk": newest,
        "checkpoints/run": newest, "checkpoints": newest, "linked": newest, f"linked/run/{first.name}": first,
    }.items():  # fmt: skip
        assert latest_checkpoint(tmp_path / path).resolve() == wanted, path
    assert len(complete_checkpoints(tmp_path / "linked")) == 2


@pytest.mark.parametrize("tensor", [f"{kind}.layer{i}" for kind in ("model", "exp_avg", "exp_avg_sq") for i in (0, 1)])
def test_every_tensor_of_a_merged_file_is_checked_when_it_is_loaded(merged, tensor):
    """Also those that the training of now has no use for."""
    path, places = merged
    data = bytearray(path.read_bytes())
    data[places[tensor]] ^= 1
    damaged = path.with_name("damaged")
    damaged.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"tensor '{tensor}' has changed"):
        MergedFile.open(damaged).load([])


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    merge_to_file(Checkpoint.open(write_checkpoint(folder / "run", 4, 4, 2)), folder / "merged.ckpt")
    MergedFile.open(folder / "merged.ckpt").load([])
    layout = MergedFile.open(folder / "merged.ckpt")._places
    return folder / "merged.ckpt", {name: place.begin for name, place in layout.items()}
