"""Directories that are either complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnscaler.errors import UserError


def check_new(path: Path) -> None:
    """Raises a `UserError` if `path` is anything but absent or an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} already exists and is not empty: remove it or choose another path")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write into, and renames it to `path` when the block ends well.

    When the block raises, the sibling is removed. When the process is killed, a directory named
    `<path>.partial-<process id>` stays behind, and `path` does not exist.

    Raises:
        UserError: `path` is in use, or cannot be written (permissions, a full disk).
    """
    check_new(path)
    partial = path.absolute().with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        check_new(path)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
