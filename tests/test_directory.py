"""A directory is complete, or it is not there."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from nnscaler.compiler import put_in_place
from nnscaler.directory import (
    alone_in,
    check_name,
    check_new,
    check_writable,
    new_directory,
    system_error,
    work_beside,
    writing,
)
from nnscaler.errors import UserError
from nnscaler.identity import DONE


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory"
    with new_directory(path) as partial:
        (partial / "file").write_text("content")
        assert not path.exists()
    assert [child.name for child in path.iterdir()] == ["file"]
    assert [child.name for child in path.parent.iterdir()] == ["directory"]


def test_all_of_it_is_on_disk_before_it_appears_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened, rename, fsync = [], Path.rename, os.fsync

    def record_rename(self: Path, target: Path) -> Path:
        happened.append(f"named {target.name}")
        return rename(self, target)

    def record_sync(handle: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".partial")[0])
        fsync(handle)

    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(os, "fsync", record_sync)
    with new_directory(tmp_path / "parent" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
    before, after = happened[: happened.index("named out")], happened[happened.index("named out") + 1 :]
    assert sorted(before) == ["file", "inner", "out"]
    assert after == ["parent"]


def write_and_raise(path: Path, error: BaseException) -> None:
    with new_directory(path) as partial:
        (partial / "file").write_text("content")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_fails(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write_and_raise(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_the_system_s_error_is_found_behind_that_of_a_library() -> None:
    full, closing = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos")
    closing.__context__ = ValueError("between")
    closing.__context__.__cause__ = full
    assert system_error(closing) is full
    assert system_error(RuntimeError("alone")) is None


def test_an_error_of_ours_is_none_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours"), writing(tmp_path):
        raise RuntimeError("ours")


def test_a_full_disk_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write '.*/out': No space left on device"):
        write_and_raise(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))


def test_an_empty_directory_is_taken_and_any_other_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as partial:
        (partial / "file").write_text("content")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / name):
            pytest.fail("the block must not run")


def test_one_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "out"):
        (tmp_path / "out" / "of somebody else").mkdir(parents=True)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with (
        pytest.raises(UserError, match=r"cannot write '.*file/out': Not a directory"),
        new_directory(tmp_path / "file/out"),
    ):
        pytest.fail("the block must not run")


def test_no_two_processes_are_inside_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plans" / "llama"
    with alone_in(folder):
        assert not folder.exists()
        with (folder.parent / ".llama.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (folder.parent / ".llama.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    asked: list[int] = []

    def busy_first(lock: int, how: int) -> None:
        asked.append(how)
        if how & fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", busy_first)
    with alone_in(folder):
        assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX], "it waits"


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOTSUP, True), (errno.ENOLCK, True), (errno.EIO, False)])
def test_where_there_are_no_locks_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number, goes_on
) -> None:
    def without_locks(lock: int, how: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with nullcontext() if goes_on else pytest.raises(OSError, match="no locks"), alone_in(tmp_path / "x"):
        assert goes_on


def test_whether_a_folder_can_be_written_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "gen_savedir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"gen_savedir is '.*file/a', which cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "a", "gen_savedir")


def test_a_compile_replaces_what_a_compile_wrote_and_nothing_else(tmp_path: Path) -> None:
    """What says that all is there goes first and comes last."""

    def work() -> Path:
        folder = tmp_path / "work"
        folder.mkdir()
        for name in ("a.txt", DONE, "gencode_stage0.py"):
            (folder / name).write_text("new")
        return folder

    place = tmp_path / "place"
    put_in_place(work(), place)
    assert sorted(path.name for path in place.iterdir()) == sorted(["a.txt", DONE, "gencode_stage0.py"])
    for name in ("gencode_stage1.py", "plan_stage0.html", "weights.ckpt"):
        (place / name).write_text("old")
    (place / "plan.json").mkdir()  # a folder of somebody's
    put_in_place(work(), place)
    assert {path.name: path.read_text() for path in place.iterdir() if path.is_file()} == {
        "a.txt": "new", DONE: "new", "gencode_stage0.py": "new", "weights.ckpt": "old"
    }  # fmt: skip
    assert (place / "plan.json").is_dir()
    assert not (tmp_path / "work").exists()
    (place / DONE).unlink()
    with pytest.raises(UserError, match="it is not a folder that a compile made"):
        put_in_place(work(), place)


def test_work_is_renamed_to_a_folder_that_others_may_read_as_any_other(tmp_path: Path) -> None:
    place, other = tmp_path / "new" / "place", tmp_path / "other"
    with work_beside(place) as work:
        (work / "file").write_text("new")
        work.rename(place)
        assert [path.name for path in place.iterdir()] == ["file"]
    assert [path.name for path in place.parent.iterdir()] == ["place"]
    assert (place / "file").read_text() == "new"
    other.mkdir()
    assert place.stat().st_mode == other.stat().st_mode


def test_that_all_is_there_is_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    rename = Path.rename

    def record(path: Path, target: Path) -> Path:
        moved.append(path.name)
        assert (target.parent / DONE).exists() == (path.name == "never")
        return rename(path, target)

    (tmp_path / "place").mkdir()
    (tmp_path / "place" / DONE).write_text("old")
    (tmp_path / "work").mkdir()
    for name in (DONE, "plan.json", "zebra.txt"):
        (tmp_path / "work" / name).write_text("new")
    monkeypatch.setattr(Path, "rename", record)
    put_in_place(tmp_path / "work", tmp_path / "place")
    assert moved == ["plan.json", "zebra.txt", DONE]


def test_a_name_may_have_two_hundred_bytes() -> None:
    for name in ("a" * 200, "é" * 100, "A-b.c+d=e@f_1"):
        check_name(name)
    with pytest.raises(UserError, match=r"^run has 202 bytes; it names folders, and may have at most 200$"):
        check_name("é" * 101, "run")
    with pytest.raises(UserError, match=r"^run is 'a b'; it names folders"):
        check_name("a b", "run")


def test_the_folder_that_a_command_runs_in_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(UserError, match=r"is the folder that this command runs in: choose another path$"):
            check_new(path)


def test_who_wants_to_be_alone_makes_the_folders_above(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a" / "b" / "c"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [".c.lock"]
