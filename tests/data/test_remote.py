"""Files behind URLs are read as they are, also where connections break."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler.data import remote
from nnscaler.data.remote import opened
from nnscaler.data.sources import find_corpus
from nnscaler.data.streamed import StreamedDataset
from nnscaler.errors import UserError

CONTENT = bytes(range(256)) * 4


class Breaking:
    """A file system of one file; opening it, and each of its reads, may fail."""

    def __init__(self, failures: Iterator[bool]) -> None:
        self._failures = failures

    def size(self, name: str) -> int:
        self.fail()
        return len(CONTENT)

    def open(self, name: str, mode: str) -> Any:
        self.fail()
        system = self

        class File(io.BytesIO):
            def read(self, count: int | None = -1) -> bytes:
                found = super().read(count)
                system.fail()  # after its place has moved on
                return found

        return File(CONTENT)

    def fail(self) -> None:
        if next(self._failures, False):
            raise ConnectionResetError("reset by peer")


places = st.tuples(st.integers(0, 1023), st.integers(0, 300))


@pytest.fixture(autouse=True, scope="module")
def no_pauses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.time, "sleep", lambda seconds: None)
        yield


@given(st.lists(places, max_size=8), st.lists(st.booleans(), max_size=20), st.sampled_from([16, 100, 5000]))
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_what_is_there(wanted, failures, buffer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "TRIES", 30)
        patch.setattr(remote, "READ", buffer)
        with opened(Breaking(iter(failures)), "x") as file:
            for place, count in wanted:
                assert file.seek(place) == place
                assert file.read(count) == CONTENT[place : place + count]
                assert file.tell() == min(place + count, len(CONTENT))
            file.seek(-10, io.SEEK_END)
            assert file.read() == CONTENT[-10:]


def test_what_cannot_be_read_is_said(caplog):
    with (
        pytest.raises(UserError, match="cannot read 'x': reset by peer"),
        opened(Breaking(iter([True] * 99)), "x") as f,
    ):
        f.read(1)
    assert caplog.text.count("trying again: reset by peer") == remote.TRIES - 1
    caplog.clear()
    memory = fsspec.filesystem("memory")
    with pytest.raises(UserError, match="cannot read '/no/such'"), opened(memory, "/no/such") as file:
        file.read(1)
    assert not caplog.text, "what is not there will not come"


def test_pauses_double_and_what_was_open_is_closed(monkeypatch):
    pauses, files = [], []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    system = Breaking(iter([False, True, True, True, False, False]))  # a read, and opening it again twice
    opening = system.open
    monkeypatch.setattr(system, "open", lambda name, mode: files.append(opening(name, mode)) or files[-1])
    with opened(system, "x") as file:
        assert file.read(4) == CONTENT[:4]
        assert [one.closed for one in files] == [True, False]
    assert pauses == [1, 2, 4]
    assert files[-1].closed


def texts(url: str, **given: Any) -> list[str]:
    return ["".join(document) for document in find_corpus(url, **given).documents()]


def test_each_file_is_read_as_the_corpus_is_and_what_is_found_is_noted():
    memory = fsspec.filesystem("memory")
    memory.pipe("/columns/a.jsonl", '{"text": "x", "body": "é"}\n'.encode("latin-1"))
    memory.pipe("/columns/b.jsonl", b"")
    for encoding, text, replaced in (("latin-1", "é", {}), (None, "\ufffd", {Path("/columns/a.jsonl"): 1})):
        corpus, found = find_corpus("memory://columns", text_column="body", encoding=encoding), []
        for part in corpus.each_file():
            found.append(list(part.documents()))
            corpus.note(part)
        assert found == [[text], []]
        assert (corpus.silent, corpus.replaced) == ([Path("/columns/b.jsonl")], replaced)


def test_the_files_behind_a_url_are_a_corpus():
    memory = fsspec.filesystem("memory")
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content in {
        "b.jsonl.gz": gzip.compress(rows), "a/train.txt": b"first", "a/test.txt": b"second", "README.md": b"about",
        ".gitattributes.txt": b"hidden", ".cache/a/inner.txt": b"hidden", "picture.png": b"",
    }.items():  # fmt: skip
        memory.pipe(f"/texts/{name}", content)
    assert texts("memory://texts") == ["second", "first", "one", "two"]
    assert texts("memory://texts", split="train") == ["first"]
    assert texts("memory://texts/b.jsonl.gz") == ["one", "two"]
    corpus = find_corpus("memory://texts")
    assert corpus.size == len(gzip.compress(rows)) + len("first") + len("second")
    assert [len(list(part.documents())) for part in corpus.each_file()] == [1, 1, 2]
    memory.pipe("/texts/damaged.jsonl.gz", gzip.compress(rows)[:-12])
    with pytest.raises(UserError, match=r"^/texts/damaged.jsonl.gz: damaged gzip data"):
        texts("memory://texts/damaged.jsonl.gz")
    for url, said in {
        "memory://nothing": "no such file or folder: memory://nothing",
        "nowhere://x": "cannot read nowhere://x: Protocol not known",
        "memory://texts/picture.png": "cannot read this type of file",
    }.items():
        with pytest.raises(UserError, match=said):
            find_corpus(url)


def test_a_network_may_fail_with_any_error(monkeypatch):
    """That of the hub's client is no OSError."""

    class ConnectError(Exception):
        pass

    def fail(self: Any, *args: Any, **given: Any) -> Any:
        raise ConnectError("Name or service not known")

    for asks in ("find", "glob"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), asks, fail)
    with pytest.raises(UserError, match=r"^cannot read memory://rows: Name or service not known$"):
        find_corpus("memory://rows")
    with pytest.raises(UserError, match=r"'memory://rows', which cannot be read: Name or service not known$"):
        StreamedDataset.open("memory://rows")


def test_a_server_need_not_tell_how_large_a_file_is(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/untold/a.txt", b"text")
    found = {"/untold/a.txt": {"size": None}, "/untold/b.txt": {"size": 7}}
    monkeypatch.setattr(type(memory), "find", lambda self, root, detail: found)
    corpus = find_corpus("memory://untold")
    assert (corpus.size, corpus.files) == (7, [Path(name) for name in found])
    assert "".join(next(corpus.documents())) == "text"


def test_it_is_read_in_large_parts_and_from_any_place(monkeypatch):
    """A request takes as long for a byte as for many."""
    asked: list[tuple[int, int]] = []  # where, and how much

    class File(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            asked.append((self.tell(), count or 0))
            return super().read(count)

    class System:
        opened = sized = 0

        def open(self, name: str, mode: str) -> Any:
            self.opened += 1
            assert (name, mode) == ("x", "rb")
            return File(CONTENT)

        def size(self, name: str) -> int:
            self.sized += 1
            return len(CONTENT)

    system = System()
    with opened(system, "x") as file:
        assert file.read(1) == CONTENT[:1]
        assert asked == [(0, 2**18)]
    monkeypatch.setattr(remote, "READ", 16)
    with opened(system, "x") as file:
        assert (file.readable(), file.seekable(), file.tell()) == (True, True, 0)
        assert file.seek(-4, io.SEEK_END) == file.seek(-4, io.SEEK_END) == 1020
        assert file.seek(100) == 100
        assert file.read(2) == CONTENT[100:102]
        assert file.seek(300, io.SEEK_CUR) == 402
        assert file.read(3) == CONTENT[402:405]
        assert file.seek(2000) == 2000
        assert file.read(1) == b"", "behind its end is nothing"
    assert (system.opened, system.sized) == (2, 1)
