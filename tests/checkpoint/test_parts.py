"""The parts of checkpoints by themselves: pieces, files of an export, random streams, what is listed, and SIGTERM."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import signal
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nnscaler import UserError
from nnscaler.checkpoint import claim as claims
from nnscaler.checkpoint import sharded, termination
from nnscaler.checkpoint.export import _header, _shards
from nnscaler.checkpoint.folder import TrainerState, is_checkpoint, own_checkpoints, remove_old, saved_at
from nnscaler.checkpoint.randomness import new_random_states
from nnscaler.checkpoint.sharded import Part, whole
from nnscaler.checkpoint.stored import Checkpoint, describe
from nnscaler.checkpoint.termination import Termination
from nnscaler.checkpoint.whole import gather_whole, scatter_whole
from nnscaler.models.unread import Unread
from nnscaler.shards import Box
from tests.checkpoint.jobs import publish_one


def test_a_part_is_written_in_pieces_that_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of five, which begin at (2, 1) of the whole, in pieces of four elements at most."""
    monkeypatch.setattr(sharded, "PIECE_ELEMENTS", 4)
    full = torch.arange(60.0).view(6, 10)
    box = Box((2, 1), (3, 5))
    pieces = list(Part("model.x", (6, 10), box, full[box.slices].contiguous()).pieces())
    assert all((piece.name, piece.shape) == ("model.x", (6, 10)) for piece in pieces)
    assert max(piece.tensor.numel() for piece in pieces) <= 4
    assert sum(piece.tensor.numel() for piece in pieces) == 15
    for piece in pieces:
        assert torch.equal(piece.tensor, full[piece.box.slices])
    assert len({piece.key for piece in pieces}) == len(pieces)


def test_whole_tensors_from_parts_and_back() -> None:
    """In one process: of a part that is there twice, one is taken."""
    full = torch.arange(12.0).view(3, 4)
    boxes = [Box((0, 0), (3, 1)), Box((0, 1), (3, 3)), Box((0, 1), (3, 3))]
    parts = [Part("x", (3, 4), box, full[box.slices].clone()) for box in boxes] + [whole("y", torch.tensor(7))]
    found = gather_whole(parts)
    assert torch.equal(found["x"], full)
    assert found["y"].tolist() == 7
    assert found["y"].dtype == torch.int64
    scatter_whole(parts, {"x": 2 * full, "y": torch.tensor(8), "z": full})
    assert [torch.equal(part.tensor, 2 * full[part.box.slices]) for part in parts[:3]] == [True] * 3
    assert parts[3].tensor.item() == 8
    with pytest.raises(UserError, match="the state has no 'y'"):
        scatter_whole(parts, {"x": full})
    with pytest.raises(UserError, match=r"the state's 'y' has shape \[1\], the model's \[\]"):
        scatter_whole(parts, {"x": 3 * full, "y": torch.ones(1)})
    with pytest.raises(UserError, match=r"the state's 'x' has shape \[5, 4\], the model's \[3, 4\]"):
        scatter_whole(parts, {"x": torch.ones(5, 4), "y": torch.tensor(8)})
    assert torch.equal(parts[0].tensor, 2 * full[boxes[0].slices]), "nothing is filled where one does not fit"


def unread(*shape: int, dtype: torch.dtype = torch.float32) -> Unread:
    return Unread(shape, dtype, lambda box: torch.zeros(box.sizes))


def test_an_export_is_divided_where_a_file_would_be_too_large() -> None:
    tensors = {"a": unread(10), "b": unread(15), "c": unread(1), "d": unread(60), "e": unread(2)}  # 4 bytes each
    found = _shards(tensors, 100)
    assert {name: list(shard) for name, shard in found.items()} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e"],
    }
    assert list(_shards({"a": unread(10), "b": unread(15)}, 100)) == ["model.safetensors"]
    assert list(_shards({"a": unread(10), "b": unread(15)}, 99)) != ["model.safetensors"]


def test_the_head_of_a_file_of_an_export_is_read_by_its_library(tmp_path: Path) -> None:
    kinds = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.bool,
        torch.int64,
        torch.int32,
        torch.int16,
    ]
    kinds += [torch.int8, torch.uint8]
    shard = {f"t{i}": unread(2, i + 1, dtype=kind) for i, kind in enumerate(kinds)} | {"scalar": unread()}
    header = _header(shard)
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length
    assert length % 8 == 0, "so that tensors are aligned"
    size = sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in shard.values())
    (tmp_path / "x.safetensors").write_bytes(header + bytes(size))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in shard.items()
    }


def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.random()


def test_ranks_without_a_saved_stream_begin_streams_of_their_own() -> None:
    found = []
    for seed, step, rank in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 1), (1, 23, 1), (1, 2, 3)):
        new_random_states(seed, step, rank)
        found.append(drawn())
    assert found[0] == found[-1]
    for index in range(3):
        assert len({draw[index] for draw in found}) == 6


def test_each_of_many_ranks_has_its_own_streams(tmp_path: Path) -> None:
    from tests.checkpoint.test_merging import write_checkpoint

    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, 1, 1, 1))
    (entry, *_) = checkpoint.entries.values()
    saved = {f"random.{name}.{rank}": entry for name in ("numpy", "torch") for rank in range(12)}
    crowd = replace(checkpoint, entries=saved)
    for rank in range(13):
        wanted = {name for name in (f"random.numpy.{rank}", f"random.torch.{rank}") if name in saved}
        assert crowd.random_states(rank).keys() == wanted


def test_what_is_said_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.checkpoint.test_merging import write_checkpoint

    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, 3, 5, 1))
    lines = list(describe(checkpoint))
    assert lines[1].startswith("run         run: 1 process, saved ")
    assert lines[2] == "position    step 1, 1 sample of a dataset of 1, seed 0"
    assert lines[3] == "loss        1.000000"
    assert not any(line.startswith("validation") for line in lines)
    sizes = [
        path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file() and path.name != "checksums"
    ]
    assert f"files       {len(sizes)}, {sum(sizes):,} bytes" in lines
    assert lines[-1].split() == ["model.layer0", "float32", "3", "x", "5", "1", "60"]
    state = replace(checkpoint.state, loss=None, eval_loss=2.5, schedule={"kind": "cosine", "peak": 0.1})
    lines = list(describe(replace(checkpoint, state=state)))
    assert lines[3:6] == ["loss        not reported", "validation  2.500000", "schedule    kind cosine, peak 0.1"]


def test_what_older_checkpoints_do_not_say(tmp_path: Path) -> None:
    """They are kept: nobody knows whose they are, nor for how long."""
    folders = [publish_one(tmp_path, step, 9.0 - step, owner="me", keep=1) for step in (1, 2, 3)]
    for saved, missing in zip(folders, ("owner", "keep", None)):
        fields = json.loads((saved / "trainer.json").read_text())
        for name in (missing, "updates", "eval_loss", "mixture"):
            fields.pop(name, None)
        (saved / "trainer.json").write_text(json.dumps(fields))
        state = TrainerState(**fields)
        assert (state.updates, state.eval_loss, state.mixture) == (None, None, {})
        assert state.owner == ("" if missing == "owner" else "me")
        assert state.keep == (0 if missing == "keep" else 1)
    for step in (4, 5):
        publish_one(tmp_path, step, 9.0 - step, owner="me", keep=1)
    for owner in ("", "me"):
        remove_old(tmp_path, 1, owner)
    assert [path.name[-1] for path in own_checkpoints(tmp_path)] == ["1", "2", "5"]


def test_what_is_a_checkpoint_and_when_it_was_saved(tmp_path: Path) -> None:
    saved = publish_one(tmp_path, 7, 1.0)
    assert is_checkpoint(saved)
    assert saved_at(saved) == 7.0
    (saved / "trainer.json").write_text("damaged")
    assert saved_at(saved) == saved.stat().st_mtime
    (saved / "trainer.json").unlink()
    assert is_checkpoint(saved), "a damaged one"
    (saved / "checksums").unlink()
    assert not is_checkpoint(saved)
    (tmp_path / ".step_00000008.writing").mkdir()
    (tmp_path / ".step_00000008.writing" / "trainer.json").write_text("{}")
    assert not is_checkpoint(tmp_path / ".step_00000008.writing")
    assert saved_at(tmp_path / "gone") == 0.0


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF, errno.EIO])
def test_locks_of_all_kinds_of_file_systems(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks the claim alone tells; NFS locks what is open for writing; any other error is one."""
    modes = []

    def flock(handle: int, how: int) -> None:
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & 3)
        if error != errno.EBADF or modes[-1] == 0:
            raise OSError(error, "x")

    monkeypatch.setattr(fcntl, "flock", flock)
    if error == errno.EIO:
        with pytest.raises(OSError, match="x"):
            claims._lock(tmp_path / "lock")
    else:
        assert claims._lock(tmp_path / "lock") is not None
    assert modes == ([0, 2] if error == errno.EBADF else [0])


class Store:
    """A store in which other ranks answer each question, one answer a question."""

    def __init__(self, *answers: str | None) -> None:
        self.values: dict[str, str] = {}
        self.answers = list(answers)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value
        if key.count("/") == 3 and (answer := self.answers.pop(0)) is not None:
            self.values[key.rsplit("/", 1)[0] + "/1"] = answer

    def get(self, key: str) -> str:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(termination, "_ASK", 0.001)
    monkeypatch.setattr(termination.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(termination.dist, "get_world_size", lambda: 2)

    def make(step: int | None, *answers: str | None) -> tuple[Termination, Store, list[str]]:
        store, saved = Store(*answers), []
        return Termination(store, "a", lambda: step, lambda: saved.append("saved")), store, saved  # type: ignore[arg-type]

    return make


def test_ranks_save_after_the_same_step_or_ask_again(asking: Any) -> None:
    told, store, saved = asking(5, "4", "-1", "5")
    assert [told._ask(count) for count in range(3)] == [False, False, True]
    assert saved == ["saved"]
    assert [store.values[f"terminate/a/{count}/0"] for count in range(3)] == ["5", "5", "5"]
    assert told.updating.acquire(blocking=False), "it lets the lock go"


def test_while_a_rank_updates_it_says_that_it_is_busy(asking: Any) -> None:
    told, store, saved = asking(5, "5", "5")
    with told.updating:
        assert not told._ask(0)
        assert told.updating.locked(), "the lock is another's"
    assert store.values["terminate/a/0/0"] == "-1"
    assert not saved
    told, store, saved = asking(None, "-1")
    assert not told._ask(0), "a state that must not be saved; all are busy"
    assert not saved


def test_where_a_rank_leaves_or_is_gone_nothing_is_saved(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, store, saved = asking(5, "-2")
    assert told._ask(0)
    told, store, _ = asking(5, "5")
    told.leave()
    assert told._ask(0)
    assert store.values["terminate/a/0/0"] == "-2"
    monkeypatch.setattr(termination, "_PATIENCE", 0.05)
    told, store, more = asking(5, None)
    began = time.monotonic()
    assert told._ask(0), "nobody answers"
    assert time.monotonic() - began >= 0.05
    assert not saved + more


def test_another_rank_s_signal_is_seen_in_the_store(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "_POLL", 0.001)
    told, store, _ = asking(5)
    assert not told._is_told()
    store.values["terminate/b"] = ""
    assert not told._is_told(), "of an earlier start"
    store.values["terminate/a"] = ""
    assert told._is_told()
    alone = Termination(None, "a", lambda: 3, lambda: None)
    assert not alone._is_told()
    alone._told.set()
    assert alone._is_told()
    assert alone._answers(0, 3) == {3}


def test_each_of_three_ranks_answers_under_its_number(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three must say the same step."""
    monkeypatch.setattr(termination.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(termination.dist, "get_world_size", lambda: 3)
    for first, second, agreed in (("7", "7", True), ("6", "7", False), ("7", "-1", False), ("-2", "7", True)):
        told, store, saved = asking(7, None)
        store.values |= {"terminate/a/11/0": first, "terminate/a/11/1": second}
        assert told._ask(11) is agreed
        assert store.values["terminate/a/11/2"] == "7"
        assert bool(saved) == (first == second)


def test_a_told_rank_tells_the_others_and_a_store_that_is_gone_ends_nothing(asking: Any, monkeypatch: Any, caplog: Any):
    monkeypatch.setattr(termination, "_POLL", 0.001)
    told, store, saved = asking(5, "5")
    with told:
        os.write(told._wake, bytes([signal.SIGCHLD]))
        time.sleep(0.02)
        assert not told.told, "another signal"
        os.write(told._wake, bytes([signal.SIGUSR1, signal.SIGTERM]))
        told._thread.join(60.0)
    assert "terminate/a" in store.values
    assert saved == ["saved"]

    def gone(key: str, value: str) -> None:
        raise RuntimeError("connection closed")

    told, store, saved = asking(5)
    monkeypatch.setattr(store, "set", gone)
    with told:
        os.write(told._wake, bytes([signal.SIGINT]))
        told._thread.join(60.0)
    assert not saved
    assert "cannot save what the last step left: connection closed" in caplog.text


def test_who_is_woken_by_signals_otherwise_is_so_again() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with Termination(None, "a", lambda: 3, lambda: None):
            pass
        assert signal.set_wakeup_fd(writing) == writing
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_ctrl_c_ends_at_once(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Whatever the thread takes to save: time passes as the test says."""
    now = 100.0
    monkeypatch.setattr(termination, "_POLL", 3600.0)
    monkeypatch.setattr(termination, "time", SimpleNamespace(monotonic=lambda: now))
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    saved = threading.Event()
    told = Termination(None, "a", lambda: 3, saved.set)
    with caplog.at_level(logging.INFO, "nnscaler"), told:
        signal.raise_signal(number)
        assert saved.wait(300.0), "the thread does not wait for its next look"
        assert told.told
        assert told.interrupted == (number == signal.SIGINT)
        now += termination._AGAIN
        signal.raise_signal(number)  # as torchrun does, which passes on what the terminal has sent to all
        now += 0.01
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "left is saved; the current step goes on up to its update, which is not made (a further c" in caplog.text
