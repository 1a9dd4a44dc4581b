"""From bytes to text: which encoding a file has, and how many characters could not be read."""

from __future__ import annotations

import codecs
import io
import logging
from pathlib import Path
from typing import IO

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# The longer marks first: that of UTF-16 is the beginning of one of UTF-32.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\r\f\b\x1b"})
_MOST_CONTROL = 0.05  # of the bytes of a text; of random ones it is a tenth


class Replaced:
    """Counts the characters that no encoding reads. `REPLACE` is the name of an error handler for Python's codecs.

    Python has one table of such handlers for the whole process; so this is one count, too.
    """

    count = 0

    @classmethod
    def handle(cls, error: UnicodeError) -> tuple[str | bytes, int]:
        cls.count += 1
        return codecs.replace_errors(error)


REPLACE = "nnscaler.replace"
codecs.register_error(REPLACE, Replaced.handle)


def check_encoding(name: str) -> None:
    """Raises UserError where Python has no text encoding of this name."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"encoding is '{name}', which Python does not know; it knows utf-8, utf-16, latin-1 and others"
        ) from error


def open_text(file: IO[bytes], path: Path, encoding: str | None, newline: str = "") -> io.TextIOWrapper:
    """The text of an open file: in the encoding that is asked for, else in that of its first bytes, else in UTF-8.

    Raises UserError for a file that is not text.
    """
    return io.TextIOWrapper(file, encoding or _encoding(file, path), errors=REPLACE, newline=newline)


def check_not_a_pointer(file: IO[bytes], path: Path) -> None:
    """Raises UserError where a file only says where Git LFS has its content."""
    if _head(file).startswith(LFS_POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself; get it with: git lfs pull")


def _head(file: IO[bytes]) -> bytes:
    """The first bytes of a file, some thousands at most; they can still be read."""
    return file.peek(1 << 13)  # type: ignore[attr-defined]


def _encoding(file: IO[bytes], path: Path) -> str:
    head = _head(file)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            if encoding != "utf-8-sig":
                logger.info("%s is read as %s", path, encoding)
            return encoding
    # Of two bytes for a Latin letter in UTF-16 one is 0, the first or the second throughout.
    zeros = head[0::2].count(0), head[1::2].count(0)
    for encoding, here, other in (("utf-16-le", zeros[1], zeros[0]), ("utf-16-be", zeros[0], zeros[1])):
        if here > len(head) // 8 and other <= here // 8:
            logger.info("%s is read as %s", path, encoding)
            return encoding
    if len(head.translate(None, _CONTROL)) < (1 - _MOST_CONTROL) * len(head):
        raise UserError(f"{path} is not text: it holds bytes that no text has")
    return "utf-8"
