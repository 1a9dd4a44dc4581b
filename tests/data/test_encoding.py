"""Which encoding a file is read in, by what is asked for, or else by its first bytes."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest

from nnscaler.data import encoding
from nnscaler.data.encoding import Replaced, check_encoding, open_text
from nnscaler.errors import UserError


def text_of(content: bytes, asked_for: str | None = None) -> str:
    return open_text(io.BufferedReader(io.BytesIO(content)), Path("a.txt"), asked_for).read()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE), ("utf-32-be", codecs.BOM_UTF32_BE), ("utf-16-le", b""), ("utf-16-be", b""),
        ("utf-8", b""),
    ],
)  # fmt: skip
def test_a_mark_or_zeros_between_letters_say_the_encoding_which_is_logged(name, mark, caplog):
    """But for UTF-8, which is what people expect."""
    caplog.set_level("INFO")
    assert text_of(mark + "Bücher, and tea".encode(name)) == "Bücher, and tea"
    shown = name if not mark and name != "utf-8" else name.removesuffix("-le").removesuffix("-be")
    assert caplog.messages == ([f"a.txt is read as {shown}"] if name != "utf-8" else [])


def test_what_is_asked_for_counts_whatever_the_first_bytes_are():
    assert text_of(codecs.BOM_UTF8 + b"tea", "latin-1") == "ï»¿tea"
    assert text_of("caf\xe9".encode("cp1252"), "cp1252") == "café"


@pytest.mark.parametrize("content", [bytes(64), bytes(range(256))])
def test_bytes_that_no_text_has_are_refused(content):
    """Zeros everywhere are no letters of two bytes."""
    with pytest.raises(UserError, match=r"^a.txt is not text: it holds bytes that no text has$"):
        text_of(content)


def test_a_text_may_hold_what_terminals_read_and_a_few_other_bytes():
    for text in ("\x1b[31mred\x1b[0m", "page\f\tone\b\r\n", "a" * 95 + "\x01" * 4, "", "\n"):
        assert text_of(text.encode()) == text
    with pytest.raises(UserError, match="is not text"):
        text_of(b"a" * 94 + b"\x01" * 6)


def test_each_character_that_cannot_be_read_counts_once(monkeypatch):
    monkeypatch.setattr(Replaced, "count", 5)
    assert text_of(b"caf\xe9 \xff tea") == "caf\ufffd \ufffd tea"
    assert Replaced.count == 7


@pytest.mark.parametrize("name", ["utf-9", "rot13", "hex", "a\0b"])
def test_names_of_no_text_encoding(name):
    with pytest.raises(UserError, match="which Python does not know; it knows utf-8, utf-16, latin-1 and others"):
        check_encoding(name)
    check_encoding("CP1252")


def test_a_pointer_of_git_lfs_is_no_text_and_can_still_be_read_on():
    for content, points in ((encoding.LFS_POINTER + b"v1\noid sha256:1\n", True), (b"version 1\n", False)):
        file = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
        if points:
            with pytest.raises(UserError, match="get it with: git lfs pull"):
                encoding.check_not_a_pointer(file, Path("a.txt"))
        else:
            encoding.check_not_a_pointer(file, Path("a.txt"))
        assert file.read() == content
