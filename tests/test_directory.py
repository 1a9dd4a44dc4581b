"""A directory is complete, or it is not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nnscaler.directory import new_directory
from nnscaler.errors import UserError


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory"
    with new_directory(path) as partial:
        (partial / "file").write_text("content")
        assert not path.exists()
    assert [child.name for child in path.iterdir()] == ["file"]
    assert [child.name for child in path.parent.iterdir()] == ["directory"]


def write_and_raise(path: Path, error: BaseException) -> None:
    with new_directory(path) as partial:
        (partial / "file").write_text("content")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_fails(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write_and_raise(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*/out: No space left on device"):
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
        pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory"),
        new_directory(tmp_path / "file/out"),
    ):
        pytest.fail("the block must not run")
