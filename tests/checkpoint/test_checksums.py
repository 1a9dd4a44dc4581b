"""Checksums of files and of their pieces, on files written by hand: what is changed is found, and named."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import pytest

from nnscaler.checkpoint import checksums
from nnscaler.checkpoint.checksums import CHECKSUMS, Checksums, CorruptCheckpoint, Piece, file_crc, whole_file

SHARD, STATE = b"0123456789abc", b'{"step": 11}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of two tensors, of 4 and 9 bytes, and a file in a folder inside."""
    (tmp_path / "shard").write_bytes(SHARD)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "state").write_bytes(STATE)
    pieces = [Piece(zlib.crc32(SHARD[4:]), 4, 9, "shard", "y"), Piece(zlib.crc32(SHARD[:4]), 0, 4, "shard", "x")]
    Checksums(tmp_path, [*pieces, whole_file(tmp_path, tmp_path / "model" / "state")]).write()
    return tmp_path


def damages(folder: Path, shards: bool) -> list[str]:
    return [text.removeprefix(f"checkpoint '{folder}' is ") for text in Checksums.read(folder).damages(shards)]


def test_what_was_written_is_read(folder: Path) -> None:
    found = Checksums.read(folder)
    assert found.sizes() == {"model/state": 12, "shard": 13}
    assert {key: piece.tensor for key, piece in found.pieces.items()} == {
        ("model/state", 0): "", ("shard", 0): "x", ("shard", 4): "y"
    }  # fmt: skip
    assert damages(folder, False) == damages(folder, True) == []
    found.check()


@pytest.mark.parametrize(
    ("name", "content", "quick", "thorough"),
    [
        ("shard", b"0123456789abd", [], ["damaged: file 'shard', tensor 'y' has changed"]),
        ("shard", b"1123456789abc", [], ["damaged: file 'shard', tensor 'x' has changed"]),
        (
            "shard", b"0123456789ab", ["damaged: file 'shard' has 12 bytes, not 13"],
            ["damaged: file 'shard' has 12 bytes, not 13", "damaged: file 'shard', tensor 'y' has changed"],
        ),
        ("shard", SHARD + b"d", *[["damaged: file 'shard' has 14 bytes, not 13"]] * 2),
        ("shard", None, *[["incomplete: it has no shard"]] * 2),
        ("model/state", b'{"step": 12}', *[["damaged: file 'model/state' has changed"]] * 2),
        ("model/state", None, *[["incomplete: it has no model/state"]] * 2),
    ],
)  # fmt: skip
def test_every_change_is_named(name, content, quick, thorough, folder: Path) -> None:
    """Of shards, whose pieces are checked when they are read, only the length is looked at, unless all is."""
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert damages(folder, False) == quick
    assert damages(folder, True) == thorough
    found = Checksums.read(folder)
    if not quick:
        found.check()
        return
    with pytest.raises(CorruptCheckpoint, match=f"^checkpoint '{folder}' is {quick[0]}$"):
        found.check()


def test_a_piece_is_read_where_it_is_and_as_it_was(folder: Path) -> None:
    found = Checksums.read(folder)
    file = io.BytesIO(SHARD)
    assert [found.read_piece(file, "shard", begin) for begin in (4, 0)] == [SHARD[4:], SHARD[:4]]
    for content in (SHARD[:-1], SHARD[:-1] + b"d", b""):
        with pytest.raises(CorruptCheckpoint, match=r"is damaged: file 'shard', tensor 'y' has changed$"):
            found.read_piece(io.BytesIO(content), "shard", 4)
    for name, begin in (("shard", 1), ("other", 0)):
        with pytest.raises(CorruptCheckpoint, match=f"is damaged: checksums knows no piece of '{name}'$"):
            found.read_piece(file, name, begin)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(b"\t9\t", b"\t8\t"), "is damaged: file 'checksums' does not match its last line"),
        (lambda text: text[:-1], "is damaged: file 'checksums' does not match its last line"),
        (lambda text: b"", "is damaged: file 'checksums' does not match its last line"),
        (None, "is incomplete: it has no checksums"),
    ],
)
def test_the_list_itself_is_checked(change, said, folder: Path) -> None:
    path = folder / CHECKSUMS
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    with pytest.raises(CorruptCheckpoint, match=f"^checkpoint '{folder}' {said}$"):
        Checksums.read(folder)


@pytest.mark.parametrize("outside", ["/etc/passwd", "../x", "a/../../x"])
def test_no_file_outside_of_the_folder_is_named(outside, tmp_path: Path) -> None:
    Checksums(tmp_path, [Piece(0, 0, 1, outside)]).write()
    with pytest.raises(CorruptCheckpoint, match=f"has a file '{outside}' outside of its folder"):
        Checksums.read(tmp_path)


def test_a_range_of_a_file_has_a_checksum_however_it_is_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "x").write_bytes(SHARD)
    for step in (1, 3, 100):
        monkeypatch.setattr(checksums, "_READ_BYTES", step)
        for begin, length in ((0, None), (3, None), (0, 5), (3, 7), (12, 1), (13, 0)):
            end = None if length is None else begin + length
            assert file_crc(tmp_path / "x", begin, length) == zlib.crc32(SHARD[begin:end])
