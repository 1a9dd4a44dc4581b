"""Directories that are either complete or absent, and names that they may have."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)


def check_writable(folder: Path, name: str) -> None:
    """Raises UserError, which calls the folder `name`, unless it can be written into, or made.

    It tries this out: permissions do not show a read-only file system, nor who may write anywhere.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".nnscaler-", dir=there):
            pass
    except OSError as error:
        raise UserError(f"{name} is '{folder}', which cannot be written: {error.strerror or error}") from error


MOST_IN_A_NAME = 200  # bytes: file systems allow 255, and names get endings such as `.partial-123`


def check_name(name: str, called: str = "name") -> None:
    """Raises UserError, which calls it `called`, unless this is a name that a folder inside another one can have."""
    if not re.fullmatch(r"\w[\w.+=@-]*", name):
        raise UserError(
            f"{called} is {name!r}; it names folders: letters, digits and any of _ . + = @ - are allowed, after a "
            "letter, a digit or _"
        )
    length = len(name.encode())
    if length > MOST_IN_A_NAME:
        raise UserError(f"{called} has {length} bytes; it names folders, and may have at most {MOST_IN_A_NAME}")


def check_new(path: Path) -> None:
    """Raises UserError unless a path is absent, or an empty directory that this process is not in."""
    if path.absolute() == Path.cwd():
        raise UserError(f"{path} is the folder that this command runs in: choose another path")
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} already exists and is not empty: remove it or choose another path")


def system_error(error: BaseException) -> OSError | None:
    """The system's error behind one of a library: torch.save raises its own when it closes a file that it could not
    write."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block in which `path` is written. Raises UserError where the system refuses that: no right to, a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refused = system_error(error)
        if refused is None:
            raise
        # Where several files were copied, each has its own reason.
        reason = refused.args[0][0][2] if isinstance(refused, shutil.Error) else refused.strerror or refused
        raise UserError(f"cannot write '{path}': {reason}") from error


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write into, and renames it to `path` at the end of the block, when all of
    it is on disk.

    If the block raises, the sibling is removed. If the process is killed, a directory `<path>.partial-<process id>`
    stays behind, and `path` does not exist.

    Raises:
        UserError: `path` is in use, or cannot be written (permissions, a full disk).
    """
    check_new(path)
    partial = path.absolute().with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with writing(path):
            partial.mkdir(parents=True)
            yield partial
            sync(partial)
            check_new(path)
            partial.rename(path)
            sync_entry(partial.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def work_beside(directory: Path) -> Iterator[Path]:
    """Yields a new folder to write into, on the file system of `directory`, so that it can be renamed to that. What is
    left of it is removed.

    Others may read it as they may any new folder: one that `mkdtemp` makes is for its owner alone.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}-", dir=directory.parent, ignore_cleanup_errors=True
    ) as unique:
        work = Path(unique, directory.name)
        work.mkdir()
        yield work


def sync(folder: Path) -> None:
    """Asks the system to put a folder's files and entries on disk."""
    for path in folder.rglob("*"):
        sync_entry(path)
    sync_entry(folder)


def sync_entry(path: Path) -> None:
    """Asks the system to put a file's content, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Inside the block, no other process is in such a block for the same directory; it waits for that.

    The directory need not exist. On a file system without locks, it does not wait.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory.parent / f".{directory.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that begins with %s", directory)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                raise
        yield
    finally:
        os.close(lock)
