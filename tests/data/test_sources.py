"""Datasets of the Hugging Face hub, with a hub made of files of this test."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from nnscaler import hub
from nnscaler.data import readers, sources
from nnscaler.data.sources import find_corpus
from nnscaler.errors import UserError

PARQUET = {"repo_type": "dataset", "revision": "refs/convert/parquet"}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts files into the hub; each holds one document, its own name."""

    def list_repo_files(self: Any, repo_id: str, **kwargs: Any) -> list[str]:
        assert (repo_id, kwargs) == ("owner/name", PARQUET)
        return [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]

    def hf_hub_download(repo_id: str, filename: str, local_files_only: bool, **kwargs: Any) -> str:
        assert (repo_id, kwargs) == ("owner/name", PARQUET)
        return str(tmp_path / filename)

    def snapshot_download(repo_id: str, local_files_only: bool, **kwargs: Any) -> str:
        assert (repo_id, local_files_only, kwargs) == ("owner/name", True, PARQUET)
        return str(tmp_path)

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def store(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": [name]}), tmp_path / name)

    return store


def texts(name: str, split: str | None = None) -> list[str]:
    return ["".join(document) for document in find_corpus(name, split=split).documents()]


def test_a_dataset_is_read_from_the_parquet_branch(stored: Any) -> None:
    stored("plain_text/train/0001.parquet", "plain_text/train/0000.parquet", "plain_text/test/0000.parquet")
    assert texts("owner/name") == ["plain_text/train/0000.parquet", "plain_text/train/0001.parquet"]
    assert texts("owner/name", "test") == ["plain_text/test/0000.parquet"]


def test_a_column_of_a_dataset_on_the_hub(stored: Any, tmp_path: Path) -> None:
    stored("default/train/0000.parquet")
    pq.write_table(pa.table({"text": ["not this"], "body": ["this"]}), tmp_path / "default/train/0000.parquet")
    assert list(find_corpus("owner/name", text_column="body").documents()) == ["this"]


def test_a_dataset_in_the_cache_is_read_without_a_network(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored("plain_text/train/0000.parquet")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", None)
    assert texts("owner/name") == ["plain_text/train/0000.parquet"]


def test_one_of_several_configs(stored: Any) -> None:
    """They are told in the order of their names."""
    names = [chr(letter) * 2 for letter in range(ord("z"), ord("d"), -1)]
    stored("de/train/0000.parquet", "de/test/0000.parquet", *(f"{name}/train/0000.parquet" for name in names))
    with pytest.raises(UserError, match=rf"owner/name:CONFIG; there are {', '.join(['de', *reversed(names)])}$"):
        texts("owner/name")
    with pytest.raises(UserError, match=r"there are de, ee"):
        texts("owner/name:fr")
    assert texts("owner/name:ff") == ["ff/train/0000.parquet"]
    with pytest.raises(UserError, match=r"no split 'validation'; there are test, train$"):
        texts("owner/name:de", "validation")
    stored("default/train/0000.parquet")
    assert texts("owner/name") == ["default/train/0000.parquet"]


def test_a_config_or_split_whose_name_begins_like_another_s_is_another(stored: Any) -> None:
    stored("en/train/0000.parquet", "en/train_2/0000.parquet", "en_US/train/0000.parquet", "en_US/test/0000.parquet")
    assert texts("owner/name:en") == ["en/train/0000.parquet"]
    assert texts("owner/name:en", "train_2") == ["en/train_2/0000.parquet"]
    with pytest.raises(UserError, match=r"no split 'test'; there are train, train_2$"):
        texts("owner/name:en", "test")


def test_a_dataset_that_is_converted_in_part(stored: Any, caplog: pytest.LogCaptureFixture) -> None:
    stored("default/partial-train/0000.parquet")
    assert texts("owner/name") == ["default/partial-train/0000.parquet"]
    assert "only the first part" in caplog.text


def test_a_dataset_that_is_not_there(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, **kwargs: Any) -> None:
        raise RepositoryNotFoundError("404: no such repository\nmore", response=mock.Mock())

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(UserError, match=r"^cannot get the dataset owner/name from the hub: 404: no such repository$"):
        texts("owner/name")

    def break_off(self: Any, **kwargs: Any) -> None:
        raise RuntimeError("the network broke")  # a client's errors are of kinds of its own

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", break_off)
    with pytest.raises(UserError, match=r"^cannot get the dataset owner/name from the hub: the network broke$"):
        texts("owner/name")

    def not_cached(**kwargs: Any) -> None:
        raise LocalEntryNotFoundError("a long story")

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    with pytest.raises(UserError, match=r"owner/name; it is not in the local cache, and the hub cannot be reached$"):
        texts("owner/name")


def test_characters_that_are_replaced_are_counted_for_each_file(tmp_path: Path) -> None:
    for name, count in (("a.txt", 3), ("b.txt", 0), ("c.txt", 2)):
        (tmp_path / name).write_bytes(b"caf\xe9 " * count + b"tea")
    corpus = find_corpus(str(tmp_path))
    for _ in range(2):
        assert len(["".join(document) for document in corpus.documents()]) == 3
        assert {path.name: count for path, count in corpus.replaced.items()} == {"a.txt": 3, "c.txt": 2}


def test_characters_of_parquet_files_are_counted_too(tmp_path: Path) -> None:
    binary = pa.array([b"caf\xe9", b"tea", None], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = find_corpus(str(tmp_path / "a.parquet"))
    assert list(corpus.documents()) == ["caf\ufffd", "tea", ""]
    assert list(corpus.replaced.values()) == [1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_texts_of_parquet_files_are_of_any_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    """The only column of them is the one, however many numbers there are."""
    columns = {"id": pa.array([1, 2, 3]), "body": pa.array(["one", None, "three"], kind), "raw": pa.array([b"x"] * 3)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("body").type == kind
    assert list(find_corpus(str(tmp_path / "a.parquet")).documents()) == ["one", "", "three"]


def test_a_column_may_lie_within_another_and_be_empty_there(tmp_path: Path) -> None:
    """A column's own name counts before that. A row without text is one of no characters."""
    rows = [
        {"a.b": "own", "a": {"b": "inner"}},
        {"a": {"b": "inner"}},
        {"a": {"b": ""}},
        {"a": {"b": None}},
        {"a": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(find_corpus(str(tmp_path), text_column="a.b").documents()) == ["own", "inner", "", "", ""]
    for row in ({"a": {"c": "x"}}, {"a": "x"}, {"b": "x"}):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"a.jsonl, line 1: there is no column 'a.b'; "):
            list(find_corpus(str(tmp_path), text_column="a.b").documents())


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 13, 1000])
def test_rows_are_the_same_wherever_reading_them_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Within a word, a number, or a sign that is spelled with several letters."""
    rows = [{"a": True, "b": None, "c": -1.5e3, "text": "\u00e9\n😀", "d": [False, {}]}, {"text": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(readers, "BLOCK", block)
    found = [(row, Path(place).name) for row, place in find_corpus(str(tmp_path)).rows()]
    assert found == [(rows[0], "a.json, line 2"), (rows[1], "a.json, line 12")] + [
        (row, f"b.json, line {number}") for number, row in enumerate(rows, 1)
    ]


def test_a_long_row_is_not_looked_at_each_time_that_more_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, original = [], json.JSONDecoder.raw_decode

    def decode(self: json.JSONDecoder, text: str, at: int) -> Any:
        tried.append(len(text))
        return original(self, text, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", decode)
    monkeypatch.setattr(readers, "BLOCK", 8)
    (tmp_path / "a.json").write_text(json.dumps({"text": "x" * 10_000}))
    assert list(find_corpus(str(tmp_path)).documents()) == ["x" * 10_000]
    assert len(tried) < 20, "but each time when it has doubled"


@pytest.mark.parametrize(("rows", "groups", "at_once"), [(1000, [4000, 6000], 1000), (10, [10**6] * 4, 1),
                                                         (1024, [2**20] * 2, 129), (0, [], 1000)])  # fmt: skip
def test_as_many_rows_are_decoded_at_once_as_are_small(rows: int, groups: list[int], at_once: int) -> None:
    """Of 2 KiB each, 128 are as large as what is read at a time, and one more; at most a thousand."""
    sizes = [SimpleNamespace(total_byte_size=size) for size in groups]
    metadata = SimpleNamespace(num_rows=rows, row_group=sizes.__getitem__)
    assert readers.BLOCK == 2**18
    assert readers._rows_at_once(SimpleNamespace(metadata=metadata, num_row_groups=len(groups))) == at_once  # type: ignore[arg-type]


def test_what_is_left_out_is_listed_up_to_five_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("x")
    for suffix in "pqrst":
        (tmp_path / f"a.{suffix}").write_text("x")
    (tmp_path / "b.t").write_text("x")
    find_corpus(str(tmp_path))
    assert "left out 6 files of other types (.t 2, .p, .q, .r, .s)" in sorted_kinds(caplog.text)
    (tmp_path / "a.u").write_text("x")
    caplog.clear()
    find_corpus(str(tmp_path))
    assert "left out 7 files of other types (.t 2, " in caplog.text
    assert ", ...)" in caplog.text


def test_what_is_about_the_data_is_not_read(tmp_path: Path) -> None:
    about = [
        "README.md", "readme.txt", "README_first.txt", "LICENSE.txt", "licence-MIT.md", "COPYING.txt", "Changelog.md",
        "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "citation.txt", "croissant.json", "dataset_info.json",
        "dataset_infos.json", "dataset_dict.json", "state.json", "packing.json", "Readme of 2024.txt",
    ]  # fmt: skip
    data = ["a readme.txt", "licensed.txt", "mystate.json", "packing.jsonl", "readmes.md", "statement.json"]
    for name in (*about, *data):
        (tmp_path / name).write_text("")
    assert [path.name for path in find_corpus(str(tmp_path)).files] == data


def test_a_named_pipe_is_refused_before_anybody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for place in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"a\.txt is no regular file; documents are read from regular files alone$"):
            find_corpus(str(place))


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content in {"A.TXT": b"first", "B.JSONL.GZ": gzip.compress(rows), "c.Md": b"last"}.items():
        (tmp_path / name).write_bytes(content)
    assert texts(str(tmp_path)) == ["first", "one", "two", "last"]
    assert texts(str(tmp_path / "B.JSONL.GZ")) == ["one", "two"]


@pytest.mark.parametrize(
    ("split", "files"),
    [
        ("train", ["deep/train/x.txt", "train", "train-1.txt", "train.txt", "train_b.txt"]),
        ("test", ["test.txt"]),
        ("a+b", ["a+b.txt"]),
    ],
)
def test_which_files_are_of_a_split(tmp_path: Path, split: str, files: list[str]) -> None:
    """In a folder of its name, or of a name that begins with it, and with no longer word."""
    for name in (
        "deep/train/x.txt", "train/y.txt", "train.txt", "train-1.txt", "train_b.txt", "training.txt", "train2.txt",
        "test.txt", "latest.txt", "a+b.txt", "aab.txt", "deep/trained/train1.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [path.relative_to(tmp_path).as_posix() for path in find_corpus(str(tmp_path), split=split).files]
    assert found == [name if name != "train" else "train/y.txt" for name in files]
    with pytest.raises(UserError, match="has no split 'tes': no subfolder of that name and no file tes-"):
        find_corpus(str(tmp_path), split="tes")


def test_files_without_a_row_or_a_byte_are_told_of(tmp_path: Path) -> None:
    """Not those whose documents are empty: these are counted."""
    for name, content in {"a.json": "[]", "b.txt": "", "c.csv": "text\n", "d.jsonl": '{"text": ""}'}.items():
        (tmp_path / name).write_text(content)
    corpus = find_corpus(str(tmp_path))
    for _ in range(2):
        assert ["".join(document) for document in corpus.documents()] == ["", ""]
        assert [path.name for path in corpus.silent] == ["a.json", "b.txt", "c.csv"]


def test_only_a_line_feed_ends_a_row_of_json(tmp_path: Path) -> None:
    """Other ends of lines may stand between its words, or within a text."""
    (tmp_path / "a.jsonl").write_bytes('{"text":\r"one\u2028\x85"}\r\n\n{"text": "two"}\n{'.encode())
    rows = find_corpus(str(tmp_path / "a.jsonl")).rows()
    assert [(row["text"], place.rpartition(", ")[2]) for row, place in (next(rows), next(rows))] == [
        ("one\u2028\x85", "line 1"), ("two", "line 3"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"a.jsonl, line 4: not JSON: Expecting property name"):
        next(rows)
    (tmp_path / "a.jsonl").write_text('{"text": "one\ttwo"}')
    with pytest.raises(UserError, match=r"line 1: not JSON: Invalid control character$"):
        next(find_corpus(str(tmp_path / "a.jsonl")).rows())


def test_a_sign_between_fields_is_told_unless_it_is_a_comma(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name, sign in (("a.csv", ","), ("b.csv", "|"), ("c.tsv", "\t")):
        (tmp_path / name).write_text(f"text{sign}other\none{sign}1\n")
        assert texts(str(tmp_path / name)) == ["one"]
    assert caplog.messages == [f"{tmp_path}/b.csv: fields are separated by '|'"]


def test_a_column_of_a_parquet_file_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    """Of 2 MB in one group of rows."""
    system, sizes = fsspec.filesystem("memory"), []
    table = pa.table({"text": [f"{number:020000d}" for number in range(100)]})
    with system.open("/wide/a.parquet", "wb") as file:
        pq.write_table(table, file, compression="none", use_dictionary=False, write_batch_size=1, data_page_size=1000)

    class File(io.BufferedReader):
        def readinto(self, buffer: Any) -> int:
            sizes.append(len(buffer))
            return super().readinto(buffer)

        def read(self, count: int | None = -1) -> bytes:
            sizes.append(count or 0)
            return super().read(count)

    found = readers.read_documents(Path("a.parquet"), File(system.open("/wide/a.parquet")), "text", None)
    assert list(found) == table["text"].to_pylist()
    assert readers.BLOCK <= max(sizes) < 2 * readers.BLOCK


def test_a_home_is_where_its_owner_s_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert find_corpus("~").files == find_corpus("~/a.txt").files == [tmp_path / "a.txt"]


def test_a_file_on_another_disk_is_another_file() -> None:
    """Also where it has the same number there."""
    disks: Any = [SimpleNamespace(stat=lambda disk=disk: SimpleNamespace(st_dev=disk, st_ino=7)) for disk in (1, 2)]
    seen: set[tuple[int, int]] = set()
    assert [sources._is_new(path, seen) for path in (*disks, *disks)] == [True, True, False, False]


def sorted_kinds(text: str) -> str:
    """What stands in parentheses at the end, the kinds with equal counts in the order of their names."""
    before, _, kinds = text.strip().rpartition("(")
    first, *others = kinds.removesuffix(")").split(", ")
    return f"{before}({', '.join([first, *sorted(others)])})"
