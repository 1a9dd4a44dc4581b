"""When checkpoints are written, which are kept, and that a disk in trouble hurts neither training nor older ones."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler import UserError
from nnscaler.checkpoint import due, saver
from nnscaler.checkpoint import folder as folders
from nnscaler.checkpoint.checksums import Checksums, whole_file
from nnscaler.checkpoint.due import Due
from nnscaler.checkpoint.folder import TrainerState, complete_checkpoints, latest_checkpoint, remove_old
from nnscaler.checkpoint.randomness import as_tensors, random_states
from nnscaler.checkpoint.stored import describe_all
from nnscaler.cli.trainer import Trainer
from nnscaler.runtime.module import ParallelModule
from tests.checkpoint.jobs import assert_equal, job, losses, publish_one, random_tensors, tensors, train
from tests.launch import run
from tests.parity import Case

TWO = Case(1, 2)
ONE = Case(1, 1, accumulation=2)


def names(runs: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(runs)]


def test_the_newest_and_those_that_links_point_to_are_kept(tmp_path):
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.0], 1):
        publish_one(tmp_path, step, loss)
        assert (tmp_path / "last").resolve().name == f"step_{step:08d}"
        remove_old(tmp_path, 2, "run")
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]
    assert (tmp_path / "best").resolve().name == "step_00000002"  # not the equal one that came later
    publish_one(tmp_path, 6, 0.5)
    remove_old(tmp_path, 1, "run")
    assert names(tmp_path) == ["step_00000006"]
    publish_one(tmp_path, 6, 0.7)  # again, after going back: nothing complete is ever replaced
    remove_old(tmp_path, 0, "run")
    assert set(names(tmp_path)) == {"step_00000006", "step_00000006-2"}
    assert (tmp_path / "last").resolve().name == "step_00000006-2"
    assert {path.name for path in tmp_path.iterdir()} == {*names(tmp_path), "last", "best"}


def test_what_was_saved_to_be_kept_is_kept(tmp_path):
    """And another run's."""
    for step, (owner, keep) in enumerate([("run", 1), ("run", 0), ("other", 1), ("run", 1), ("run", 1)], 1):
        publish_one(tmp_path, step, float(9 - step), owner, keep)
    remove_old(tmp_path, 1, "run")
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000005"]


def test_the_best_is_that_of_the_lowest_validation_loss(tmp_path):
    """Training losses count only while nothing has been evaluated."""
    best = []
    for step, (loss, eval_loss) in enumerate(
        [(3.0, None), (2.0, None), (2.5, 4.0), (1.0, None), (0.9, 4.5), (1.1, 3.0)], 1
    ):
        publish_one(tmp_path, step, loss, eval_loss=eval_loss)
        best.append(int((tmp_path / "best").resolve().name[-1]))
    assert best == [1, 2, 3, 3, 3, 6]
    listed = list(describe_all(tmp_path))
    assert listed[0].endswith("step 1, loss 3.000000")
    assert listed[-1].endswith("step 6, loss 1.100000, validation loss 3.000000  <- last, best")


def test_a_step_that_is_saved_again_gets_a_number(tmp_path):
    """As where a run goes on from an older checkpoint. The links are to the newest, and to the first of the best."""
    names = ["step_00000008", "step_00000008-2", "step_00000008-3"]
    for name, loss in zip(names, (2.0, 1.0, 1.0)):
        assert publish_one(tmp_path, 8, loss) == tmp_path / name
        assert os.readlink(tmp_path / "last") == name
    assert os.readlink(tmp_path / "best") == names[1]
    assert not (tmp_path / ".step_8.writing").exists()
    for nothing, said in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "none", "holds no complete checkpoint"),
    ):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"'{nothing}' {said}$"):
            latest_checkpoint(nothing)


def test_due_by_steps_and_by_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr(due, "time", SimpleNamespace(monotonic=lambda: now))
    by_steps, by_time, never = Due(3, 0), Due(0, 2), Due(0, 0)
    assert [by_steps.after(step)[0] for step in range(1, 8)] == [False, False, True, False, False, True, False]
    now += 119
    assert by_time.after(1) == (False, False)
    now += 1
    assert [by_time.after(step)[0] for step in (2, 3)] == [True, False]
    assert not any(never.after(step)[0] for step in range(1, 4))
    now += 119
    assert by_time.after(4) == (False, False), "minutes count from the last save"
    by_steps.postpone()
    assert [by_steps.after(step)[0] for step in (8, 9, 10, 11, 12)] == [True, True, False, False, True], "once"
    both = Due(3, 2)
    now += 100
    assert both.after(3)[0]
    now += 100
    assert not both.after(4)[0], "of either kind"
    assert never.after(4, stop=True) == (False, True)


def test_what_a_checkpoint_takes_is_told_in_seconds(tmp_path, monkeypatch, caplog):
    """Of 4 processes here, each with 3 MiB of its own, and 1 MiB that all have: 13 MiB, at a second for 8 MiB."""
    monkeypatch.setattr(saver, "_PROBE", 2**23)
    monkeypatch.setattr(saver, "LARGE", 13 * 2**20)
    clock = iter(range(100))
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    made = saver.Saver.__new__(saver.Saver)
    part = lambda mebibytes: SimpleNamespace(tensor=torch.empty(mebibytes * 2**18))  # noqa: E731
    made.run, made._owned, made._fixed = tmp_path, [part(1), part(2)], [part(1)]

    def told(limit: str) -> list[str]:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", limit)
        made._told_limit = False
        caplog.clear()
        for _ in range(2):
            made.predict_seconds()
        return [record.getMessage() for record in caplog.records]

    (line,) = told("1.6")
    assert line.startswith("a checkpoint is to take 2 s: for one to be saved on SIGTERM, torchrun needs ")
    assert line.endswith("--shutdown-timeout 4 or more")
    assert told("1.7") == [], "13/8 of a second are less"
    monkeypatch.setattr(saver, "LARGE", 13 * 2**20 + 1)
    assert told("1.6") == []


def test_a_run_keeps_what_it_should(folder):
    train(ONE, folder, 6, "kept", {"interval": 2, "keep": 1})
    found = losses(folder, "kept")
    best = 2 * min(range(3), key=lambda index: found[2 * index + 1]) + 2
    assert set(names(folder / "checkpoints" / "kept")) == {f"step_{best:08d}", "step_00000006"}


def train_until_terminated(folder: Path) -> list[str]:
    """Rank 1 alone gets SIGTERM, after three steps."""

    def terminate() -> None:
        metrics = folder / "runs" / "terminated" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=terminate, daemon=True).start()
    with messages() as said:
        train(TWO, folder, 100_000, "terminated", {"interval": 0})
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return said


def test_sigterm_saves_on_all_ranks_and_ends(folder):
    said = run(2, train_until_terminated, folder, init=False)[0]
    steps = len(losses(folder, "terminated"))
    assert 3 <= steps < 100_000
    assert f"stopped by a signal at step {steps}" in "\n".join(said)
    saved = latest_checkpoint(folder / "checkpoints" / "terminated")
    assert saved.name == f"step_{steps:08d}"
    assert not list(Checksums.read(saved).damages(shards=True))


@contextmanager
def messages():
    """What the package logs here."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nnscaler")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of two megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def train_on(disk: Path, folder: Path, name: str, steps: int) -> tuple[list[str], str]:
    with messages() as said:
        try:
            train(TWO, folder, steps, name, {"interval": 1, "keep": 0, "directory": disk})
        except UserError as error:
            return said, str(error)
    return said, ""


def assert_unhurt(folder: Path, name: str, saved: list[Path]) -> None:
    """Training found the losses that it finds without trouble, and what was saved before is what would have been."""
    if not (folder / "checkpoints" / "healthy").exists():
        run(2, train, TWO, folder, 8, "healthy", {"interval": 1, "keep": 0}, init=False)
    assert losses(folder, name) == losses(folder, "healthy")
    assert saved
    for checkpoint in saved:
        assert_equal(tensors(checkpoint), tensors(folder / "checkpoints" / "healthy" / checkpoint.name))


def test_a_full_disk(folder, disk):
    (said, error), (other_said, other) = run(2, train_on, disk, folder, "full", 8, init=False)
    saved = complete_checkpoints(disk / "full")
    assert 0 < len(saved) < 7
    failures = [line for line in said if "cannot save a checkpoint" in line]
    step = len(saved) + 1
    assert failures[0] == (
        f"cannot save a checkpoint of step {step} in '{disk / 'full'}': No space left on device; "
        f"the newest complete one is '{saved[-1]}'; training goes on"
    )
    assert len(failures) == 8 - step  # one line for each, but for the last, which ends the run
    assert error.startswith("cannot save a checkpoint of step 8")
    assert "No space left on device" in error
    assert "\n" not in error + failures[0]
    assert other == error, "so that the command says it once, whichever rank ends first"
    assert not other_said
    assert not [path for path in (disk / "full").iterdir() if path.name.endswith(".writing")]
    assert_unhurt(folder, "full", saved)


def train_until_read_only(disk: Path, folder: Path) -> tuple[list[str], str]:
    """The disk can only be read once a third checkpoint has its name."""
    publish = folders.publish

    def publish_and_lock(work: Path, state: TrainerState) -> Path:
        path = publish(work, state)
        if state.step == 3:
            while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode != 0:
                time.sleep(0.001)  # while the other rank writes a file
        return path

    with patch.object(folders, "publish", publish_and_lock):
        return train_on(disk, folder, "locked", 8)


def test_a_directory_that_becomes_read_only(folder, disk):
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    (said, error), _ = run(2, train_until_read_only, disk, folder, init=False)
    saved = complete_checkpoints(disk / "locked")
    assert names(disk / "locked") == [f"step_{step:08d}" for step in (1, 2, 3)]
    assert error.endswith(f"Read-only file system; the newest complete one is '{saved[-1]}'")
    failures = [line for line in said if "cannot save" in line]
    assert failures
    assert all("Read-only file system" in line for line in failures)
    assert_unhurt(folder, "locked", saved)


def test_a_directory_that_is_read_only_from_the_start(folder, disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match=r"cannot write checkpoints into .*: Read-only file system"):
        Trainer(job(ONE, folder, 3, "never", directory=disk)).run()


def hold_step(folder: Path, name: str, wanted: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The fourth step's computation does not end before a checkpoint of the third is there; rank 1 gets SIGTERM.

    Returns also the states of the random number generators before that step, which draws from them.
    """
    accumulate, count, states = ParallelModule.accumulate, 0, {}

    def held(module: ParallelModule, micro_batches: Iterable[Mapping[str, Tensor]], *drawn: int) -> Tensor:
        nonlocal count, states
        count += 1
        if count == 4:
            states = as_tensors(random_states(torch.device("cpu")))
            torch.rand(1), random.random(), np.random.random()
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 240
            while not wanted.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return accumulate(module, micro_batches, *drawn)

    with patch.object(ParallelModule, "accumulate", held), messages() as said:
        train(TWO, folder, 1000, name, {"interval": 0})
    return said, {f"random.{name}.{os.environ['RANK']}": tensor.numpy() for name, tensor in states.items()}


def test_sigterm_in_a_long_step_saves_what_the_last_one_left(folder):
    """On all ranks, before the step under way ends, which is then given up."""
    wanted = folder / "checkpoints" / "long" / "step_00000003"
    (said, first), (_, second) = run(2, hold_step, folder, "long", wanted, init=False)
    assert any("stopped by a signal at step 3" in line for line in said)
    assert names(wanted.parent) == ["step_00000003"]
    assert len(losses(folder, "long")) == 3
    run(2, train, TWO, folder, 3, "short", {"interval": 0}, init=False)
    assert_equal(tensors(wanted), tensors(folder / "checkpoints" / "short" / "step_00000003"))
    assert_equal(random_tensors(wanted), {name: torch.from_numpy(array) for name, array in {**first, **second}.items()})


def test_the_limit_that_sigterm_needs_is_said_once(folder, monkeypatch):
    """At the start, from the disk's speed; else when the first save has taken too long."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"}.items():
        monkeypatch.setenv(name, value)
    for large, verb in ((0, "is to take"), (2**30, "took")):
        monkeypatch.setattr(saver, "LARGE", large)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/job{large}/attempt_0/0/error.json")
        with messages() as said:
            train(ONE, folder, 2, f"limit{large}", {"interval": 1})
        (line,) = [line for line in said if "--shutdown-timeout" in line]
        assert verb in line


def test_a_name_is_given_when_everything_is_on_disk(tmp_path):
    """Every file and folder is synced before the rename, and the run's folder after it: the order is recorded."""
    happened, opened = [], {}
    originals = os.open, os.fsync, Path.rename

    def record_open(path, *arguments, **keywords):
        handle = originals[0](path, *arguments, **keywords)
        opened[handle] = Path(path).relative_to(tmp_path).as_posix()
        return handle

    def record_fsync(handle):
        happened.append(("sync", opened[handle]))
        originals[1](handle)

    def record_rename(path, target):
        happened.append(("rename", path.name, target.name))
        return originals[2](path, target)

    with (
        patch.object(os, "open", record_open),
        patch.object(os, "fsync", record_fsync),
        patch.object(Path, "rename", record_rename),
    ):
        publish_one(tmp_path, 1, 1.0)
    renamed = happened.index(("rename", ".step_1.writing", "step_00000001"))
    work = ".step_1.writing"
    assert {one[1] for one in happened[:renamed]} == {work, f"{work}/trainer.json", f"{work}/checksums"}
    assert happened[renamed + 1 :] == [("sync", ".")]


def test_what_belongs_to_a_checkpoint_is_written_and_judged_before_it_gets_its_name(tmp_path, monkeypatch):
    """Its state, what the model needs, and checksums of all; a folder that is another run's gets no checkpoint."""
    happened, work = [], tmp_path / ".step_00000003.writing"
    work.mkdir()
    (work / "shard").write_bytes(b"own")
    made = saver.Saver.__new__(saver.Saver)
    made.run, made._assets, made._check = tmp_path, None, lambda: happened.append("checked")

    def save_assets(folder: Path) -> None:
        happened.append("assets")
        (folder / "deep").mkdir()
        (folder / "deep" / "config.json").write_text("{}")

    def publish(folder: Path, state: object) -> None:
        listed = Checksums.read(folder)
        happened.append(("published", sorted(listed.sizes()), list(listed.damages(shards=True))))

    made._save_assets = save_assets
    monkeypatch.setattr(folders, "publish", publish)
    monkeypatch.setattr(folders, "remove_old", lambda *given: happened.append(("removed", *given)))
    written = SimpleNamespace(keep=5, owner="me", write=lambda folder: (folder / "trainer.json").write_text("{}"))
    shard = whole_file(work, work / "shard")
    made._complete(work, written, [shard])
    files = ["model/deep/config.json", "shard", "trainer.json"]
    assert happened == ["assets", "checked", ("published", files, []), ("removed", tmp_path, 5, "me")]
    happened.clear()
    made._complete(work, written, [shard])
    assert "assets" not in happened, "they do not change"

    def another_s() -> None:
        raise UserError("another one has claimed it")

    happened.clear()
    made._check = another_s
    with pytest.raises(UserError, match="another one has claimed it"):
        made._complete(work, written, [shard])
    assert happened == []
