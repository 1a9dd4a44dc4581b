"""Files behind URLs, as fsspec opens them: read a little at a time, and again where a connection breaks."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

import fsspec

from nnscaler import hub
from nnscaler.errors import UserError

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

READ = 1 << 18  # bytes asked for at a time, at least
TRIES = 6  # to read, with pauses in between that double from a second on


def located(url: str) -> tuple[Any, str]:
    """The file system of a URL, or of a local path, and the name that it has there. Raises what fsspec does, for a URL
    of an unknown kind or one whose library is not installed."""
    system, name = fsspec.core.url_to_fs(url)
    return system, name.rstrip("/")


def opened(system: Any, name: str) -> IO[bytes]:
    """A file of a file system, to be read. Reading raises UserError where all attempts fail."""
    return io.BufferedReader(_SteadyFile(system, name), READ)


class _SteadyFile(io.RawIOBase):
    """A file that is opened anew, at the same place, where reading fails."""

    def __init__(self, system: Any, name: str) -> None:
        self._system, self._name, self._at = system, name, 0
        self._size: int | None = None
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            self._size = self._tried(lambda: int(self._system.size(self._name)))
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._tried(lambda: self._read(len(buffer)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _read(self, count: int) -> bytes:
        if self._file is None:
            self._file = self._system.open(self._name, "rb")
        if self._file.tell() != self._at:
            self._file.seek(self._at)
        return bytes(self._file.read(count))

    def _tried(self, what: Callable[[], Result]) -> Result:
        """What it gives, at the first attempt or a later one."""
        for tried in range(TRIES):
            try:
                return what()
            except Exception as error:  # libraries of networks raise whatever they may
                self._let_go()
                if isinstance(error, FileNotFoundError) or tried == TRIES - 1:
                    raise UserError(f"cannot read '{self._name}': {hub.first_line(error)}") from error
                logger.warning("cannot read '%s', trying again: %s", self._name, hub.first_line(error))
                time.sleep(2**tried)
        raise AssertionError
