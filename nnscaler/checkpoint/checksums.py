"""Checksums of a checkpoint's files, so that damage is found when a file is read, and is named.

The file `checksums` has a line for each piece of each file, with tabs between its fields:

    CRC-32 (hexadecimal)    begin (bytes)    length (bytes)    file    tensor (empty where the piece is the whole file)

The last line has the CRC-32 of all lines before it. The pieces cover every byte of every file of the checkpoint: so if
any byte is changed or missing, some checksum or length is wrong.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nnscaler.errors import UserError

CHECKSUMS = "checksums"
_READ_BYTES = 2**24


class CorruptCheckpoint(UserError):  # noqa: N818  a user reads the name in no message
    """A checkpoint's file is missing, cut short or changed. The message names the file, and the tensor if any."""


@dataclass(frozen=True)
class Piece:
    """A range of a file's bytes and its checksum."""

    crc: int
    begin: int
    length: int
    file: str
    tensor: str = ""

    @property
    def label(self) -> str:
        return f"file '{self.file}'" + (f", tensor '{self.tensor}'" if self.tensor else "")


class Checksums:
    """The pieces of a checkpoint's files."""

    def __init__(self, folder: Path, pieces: Iterable[Piece]) -> None:
        self.folder = folder
        self.pieces = {(piece.file, piece.begin): piece for piece in pieces}

    @staticmethod
    def read(folder: Path) -> Checksums:
        """The list of a folder. Raises CorruptCheckpoint where the list itself is missing or damaged."""
        try:
            lines = (folder / CHECKSUMS).read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise CorruptCheckpoint(f"checkpoint '{folder}' is incomplete: it has no {CHECKSUMS}") from error
        if not lines or lines[-1] != _last_line(b"".join(lines[:-1])):
            raise CorruptCheckpoint(
                f"checkpoint '{folder}' is damaged: file '{CHECKSUMS}' does not match its last line"
            )
        try:
            fields = [line.decode().rstrip("\n").split("\t") for line in lines[:-1]]
            pieces = [Piece(int(f[0], 16), int(f[1]), int(f[2]), f[3], f[4]) for f in fields]
        except (ValueError, IndexError) as error:
            raise CorruptCheckpoint(f"checkpoint '{folder}' has a {CHECKSUMS} that is no such list: {error}") from error
        paths = [Path(piece.file) for piece in pieces]
        outside = next((path for path in paths if path.is_absolute() or ".." in path.parts), None)
        if outside is not None:
            raise CorruptCheckpoint(f"checkpoint '{folder}' has a file '{outside}' outside of its folder")
        return Checksums(folder, pieces)

    def write(self) -> None:
        pieces = sorted(self.pieces.values(), key=lambda piece: (piece.file, piece.begin))
        lines = [f"{p.crc:08x}\t{p.begin}\t{p.length}\t{p.file}\t{p.tensor}\n" for p in pieces]
        text = "".join(lines).encode()
        (self.folder / CHECKSUMS).write_bytes(text + _last_line(text))

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        sizes: dict[str, int] = {}
        for piece in self.pieces.values():
            sizes[piece.file] = sizes.get(piece.file, 0) + piece.length
        return sizes

    def read_piece(self, file: BinaryIO, name: str, begin: int) -> bytes:
        """The bytes of a piece. Raises CorruptCheckpoint where they are not those that were written."""
        piece = self.pieces.get((name, begin))
        if piece is None:
            raise CorruptCheckpoint(f"checkpoint '{self.folder}' is damaged: {CHECKSUMS} knows no piece of '{name}'")
        file.seek(begin)
        data = file.read(piece.length)
        if len(data) != piece.length or zlib.crc32(data) != piece.crc:
            raise CorruptCheckpoint(f"checkpoint '{self.folder}' is damaged: {piece.label} has changed")
        return data

    def damages(self, shards: bool) -> Iterator[str]:
        """What is wrong with the files, a line for each piece. Of shards, only the length is checked, unless
        `shards`."""
        for name, size in self.sizes().items():
            path = self.folder / name
            if not path.is_file():
                yield f"checkpoint '{self.folder}' is incomplete: it has no {name}"
            elif (found := path.stat().st_size) != size:
                yield f"checkpoint '{self.folder}' is damaged: file '{name}' has {found} bytes, not {size}"
        for piece in self.pieces.values():
            path = self.folder / piece.file
            if not path.is_file() or (piece.tensor and not shards):
                continue
            if file_crc(path, piece.begin, piece.length) != piece.crc:
                yield f"checkpoint '{self.folder}' is damaged: {piece.label} has changed"

    def check(self) -> None:
        """Raises CorruptCheckpoint that names the first file which is missing, has another length, or (shards apart)
        has changed."""
        damage = next(self.damages(shards=False), None)
        if damage is not None:
            raise CorruptCheckpoint(damage)


def _last_line(text: bytes) -> bytes:
    return b"%08x\t0\t%d\t%s\t\n" % (zlib.crc32(text), len(text), CHECKSUMS.encode())


def file_crc(path: Path, begin: int = 0, length: int | None = None) -> int:
    """The CRC-32 of a range of a file, read in small steps. `length` None: to the end of the file"""
    crc, left = 0, path.stat().st_size - begin if length is None else length
    with path.open("rb") as file:
        file.seek(begin)
        while left > 0 and (data := file.read(min(left, _READ_BYTES))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def whole_file(folder: Path, path: Path) -> Piece:
    """A file as one piece."""
    return Piece(file_crc(path), 0, path.stat().st_size, path.relative_to(folder).as_posix())
