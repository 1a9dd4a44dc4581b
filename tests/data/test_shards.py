"""Rows that are written behind a URL are those of a local dataset, also where writing was interrupted."""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import bookcorpus
from nnscaler.command import run
from nnscaler.data import conversations, shards
from nnscaler.data import pack as packing
from nnscaler.data.conversations import Speech, pack_conversations
from nnscaler.data.files import PROVENANCE, UNFINISHED
from nnscaler.data.shards import ShardWriter
from nnscaler.data.sources import Corpus, find_corpus
from nnscaler.data.streamed import StreamedDataset
from nnscaler.errors import UserError
from tests.data.test_conversations import MESSAGES, make_tokenizer, turn
from tests.data.test_pack import TOKENIZERS, small_pieces

MEMORY = fsspec.filesystem("memory")


class StoppedError(Exception):
    pass


def new_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def store(url: str, files: list[list[dict[str, Any]]]) -> str:
    for number, rows in enumerate(files):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        MEMORY.pipe(f"{url.removeprefix('memory:/')}/{number:02d}.jsonl", content.encode())
    return url


def rows_of(url: str) -> dict[str, list[list[int]]]:
    """Column -> the rows of all shards, in order."""
    root = url.removeprefix("memory:/")
    loaded = [pq.read_table(MEMORY.open(name)) for name in sorted(MEMORY.glob(f"{root}/data-*.parquet"))]
    return {name: [row for table in loaded for row in table[name].to_pylist()] for name in loaded[0].column_names}


def with_interruptions(write: Any, after: list[int]) -> Any:
    """`write()`, where the first attempts end after so many batches of rows."""
    original = ShardWriter._put
    for batches in after:
        left = iter(range(batches))

        def put(self: ShardWriter, batch: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise StoppedError
            original(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardWriter, "_put", put)
            try:
                return write()
            except StoppedError:
                pass
    return write()


files_of_texts = st.lists(st.lists(st.text("ab é漢\n", max_size=80), min_size=1, max_size=6), min_size=1, max_size=8)


@given(files_of_texts, st.integers(2, 20), st.lists(st.integers(0, 6), max_size=4), st.integers(1, 200))
@example([["ab " * 20] * 2] * 6, 4, [3, 4], 100)
@settings(max_examples=25, deadline=None)
def test_text_is_packed_as_in_a_local_dataset_whatever_interrupts(texts, length, after, shard):
    backend = TOKENIZERS["llama3"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    corpus = find_corpus(store(new_url(), [[{"text": text} for text in file] for file in texts]))
    url = new_url()
    with tempfile.TemporaryDirectory() as folder, small_pieces(100), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", shard)
        patch.setattr(shards, "NOTED", shard // 4)
        try:
            local = packing.pack(corpus, tokenizer, Path(folder, "out"), length, 2, {"tokenizer": "x"})
        except UserError:
            return
        wanted = datasets.load_from_disk(f"{folder}/out")
        found = with_interruptions(lambda: packing.pack(corpus, tokenizer, url, length, 2, {"tokenizer": "x"}), after)
    columns = rows_of(url)
    assert {name: columns[name] for name in wanted.column_names} == wanted.to_dict()
    assert found.counts() == local.counts()
    names = {name.rpartition("/")[2] for name in MEMORY.find(url.removeprefix("memory:/"))}
    assert PROVENANCE in names
    assert not [name for name in names if name.startswith("unfinished")]
    dataset = StreamedDataset.open(url)
    assert (len(dataset), dataset.sequence_length, dataset.documents) == (len(wanted), length, "document_starts")


def test_one_note_says_how_far_an_unfinished_dataset_is(monkeypatch):
    assert (shards.SHARD, shards.NOTED) == (2**26, 2**24), "four notes a file, of 67 million tokens"
    monkeypatch.setattr(shards, "SHARD", 8)
    monkeypatch.setattr(shards, "NOTED", 2)
    corpus = find_corpus(store(new_url(), [[{"text": "a b c d"}]] * 4))
    original, url = ShardWriter.keep, new_url()

    def keep(self: ShardWriter, kept: dict[str, Any]) -> None:
        original(self, kept)
        if self._done == 3:
            raise StoppedError

    monkeypatch.setattr(ShardWriter, "keep", keep)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["llama3"], bos_token="<s>", eos_token="</s>")
    with small_pieces(100), pytest.raises(StoppedError):
        packing.pack(corpus, tokenizer, url, 2, 2, {"tokenizer": "x"})
    (note,) = MEMORY.glob(f"{url.removeprefix('memory:/')}/{UNFINISHED}*")
    assert json.loads(MEMORY.cat_file(note))["done"] == 3


def writer_to(url: str) -> ShardWriter:
    """Of rows of two tokens."""
    return ShardWriter(url, find_corpus(store("memory://one-text", [[{"text": "x"}]])), 2, False, {})


def put(writer: ShardWriter, rows: int) -> None:
    writer.write(np.zeros(2 * rows, np.int32), np.zeros(1, np.int32))


def notes_of(url: str) -> list[dict[str, Any]]:
    return [json.loads(MEMORY.cat_file(name)) for name in MEMORY.glob(f"{url.removeprefix('memory:/')}/{UNFINISHED}*")]


@pytest.mark.parametrize(
    ("shard", "batches", "sizes"), [(8, [3, 1, 5, 1, 1], [4, 5, 2]), (7, [3, 1, 3, 1, 4], [4, 4, 4])]
)
def test_shards_are_numbered_and_end_as_soon_as_they_are_full(shard, batches, sizes, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", shard)
    url = new_url()
    with writer_to(url) as writer:
        for rows in batches:
            put(writer, rows)
        writer.describe({})
    root = url.removeprefix("memory:/")
    found = {name.rpartition("/")[2]: pq.read_table(MEMORY.open(name)) for name in MEMORY.glob(f"{root}/*.parquet")}
    assert {name: len(table) for name, table in found.items()} == {
        f"data-{number:05d}.parquet": rows for number, rows in enumerate(sizes)
    }


def test_a_full_shard_is_closed_since_some_file_systems_keep_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    with writer_to(f"file://{tmp_path}") as writer:
        for closed in (False, True, False):
            put(writer, 1)
            assert writer._file.closed is closed
    assert writer._file.closed


def test_a_note_is_made_after_enough_tokens_and_the_newest_whole_one_counts(monkeypatch):
    monkeypatch.setattr(shards, "NOTED", 4)
    url = new_url()
    with writer_to(url) as writer:
        for file, done in enumerate([0, 2, 2, 4, 4], 1):
            put(writer, 1)
            writer.keep({"file": file})
            assert [note["done"] for note in notes_of(url)] == [done]
    assert len(rows_of(url)["input_ids"]) == 5, "what is open is closed"
    (note,) = notes_of(url)
    assert (note["shards"], note["rows"], note["kept"]) == (2, 4, {"file": 4}), "a shard ends with each note"
    root, find = url.removeprefix("memory:/"), type(MEMORY).find
    corpus = find_corpus(store("memory://one-text", [[{"text": "x"}]]))
    MEMORY.pipe(f"{root}/{UNFINISHED}00003.json", json.dumps(note | {"done": 7, "shards": 3}).encode())
    MEMORY.pipe(f"{root}/{UNFINISHED}00004.json", b'{"about": ')
    for order in (1, -1):  # in which a file system tells what there is
        monkeypatch.setattr(type(MEMORY), "find", lambda *given, order=order: find(*given)[::order])
        with ShardWriter(url, corpus, 2, False, {}) as again:
            assert (again._done, again._shards, again.rows) == (7, 3, 4)


def test_only_the_very_same_is_gone_on_with():
    """Whatever differs: files, length, labels, or of what and how the rows are made."""
    corpora = [find_corpus(store(f"memory://text-{number}", [[{"text": "x"}]])) for number in range(2)]
    begun = {"corpus": corpora[0], "length": 2, "labels": False, "provenance": {"data": "a", "columns": ("x", None)}}
    url = new_url()
    with ShardWriter(url, **begun):
        pass
    others = {"corpus": corpora[1], "length": 3, "labels": True, "provenance": {"data": "a", "columns": ("y", None)}}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"^{url} holds what another command began: remove it"):
            ShardWriter(url, **begun | {name: value})
    with ShardWriter(url, **begun):
        pass


@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=5), min_size=1, max_size=5), st.lists(st.integers(0, 3))
)
@settings(max_examples=20, deadline=None)
def test_conversations_are_packed_file_by_file(sizes, after):
    files = [
        [
            {"messages": [turn("user", "x" * size), turn("assistant", f"{at} {number}")]}
            for number, size in enumerate(file)
        ]
        for at, file in enumerate(sizes)
    ]
    corpus, tokenizer = find_corpus(store(new_url(), files)), make_tokenizer()
    speech = Speech(tokenizer, MESSAGES, None, False)

    def write(url: str, part: Corpus = corpus) -> Any:
        return pack_conversations(part, speech, tokenizer, url, 128, 2, True, {})

    whole, interrupted = new_url(), new_url()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "NOTED", 200)
        fitting = write(whole)
        again = with_interruptions(lambda: write(interrupted), after)
        alone = [new_url() for _ in files]
        for url, part in zip(alone, corpus.each_file()):
            write(url, part)
    assert rows_of(interrupted) == rows_of(whole)
    assert again.counts() == fitting.counts()
    for name, rows in rows_of(whole).items():
        assert rows == [row for url in alone for row in rows_of(url)[name]]
    assert fitting.documents == sum(map(len, files))


def test_what_was_found_in_each_file_and_how_long_it_took_is_known_afterwards(monkeypatch):
    """Of three files, one with two bytes that are no text, and one without a row."""
    url, tokenizer = new_url(), make_tokenizer()
    root = url.removeprefix("memory:/")
    for name, content in {"a": b"caf\xe9 \xe9", "b": b"", "c": b"x"}.items():
        row = (
            b'{"text": "%s", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "%s"}]}\n'
        )
        MEMORY.pipe(f"{root}/{name}.jsonl", content and row % (content, content))
    speech = Speech(tokenizer, MESSAGES, None, False)
    for module, pack in (
        (packing, lambda corpus: packing.pack(corpus, tokenizer, new_url(), 2, 1, {})),
        (conversations, lambda corpus: pack_conversations(corpus, speech, tokenizer, new_url(), 64, 1, False, {})),
    ):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter([10.0, 14.5]).__next__))
        corpus = find_corpus(url)
        found = pack(corpus)
        assert found.seconds == 4.5
        assert ({path.name for path in corpus.replaced}, {path.name for path in corpus.silent}) == (
            {"a.jsonl"}, {"b.jsonl"},
        )  # fmt: skip


def test_what_is_not_finished_is_not_trained_on_and_others_places_are_left_alone(monkeypatch):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["gpt2"], eos_token="</s>")
    corpus, url = find_corpus(store(new_url(), [[{"text": "words"}]] * 3)), new_url()
    monkeypatch.setattr(shards, "NOTED", 1)
    with monkeypatch.context() as patch:
        patch.setattr(packing._MarkedTokenizer, "encode_pieces", _once(packing._MarkedTokenizer.encode_pieces))
        with pytest.raises(StoppedError):
            packing.pack(corpus, tokenizer, url, 2, 1, {})
    with pytest.raises(UserError, match=r"which bookcorpus.py has not finished; run it again as before"):
        StreamedDataset.open(url)
    with pytest.raises(UserError, match="holds what another command began"):
        packing.pack(corpus, tokenizer, url, 3, 1, {})
    packing.pack(corpus, tokenizer, url, 2, 1, {})
    assert len(StreamedDataset.open(url)) >= 3
    with pytest.raises(UserError, match="already exists and is not empty"):
        packing.pack(corpus, tokenizer, url, 2, 1, {})
    with pytest.raises(UserError, match="cannot write nowhere://x: Protocol not known"):
        packing.pack(corpus, tokenizer, "nowhere://x", 2, 1, {})


def _once(function: Any) -> Any:
    calls = iter([True])

    def call(*args: Any) -> Any:
        if not next(calls, False):
            raise StoppedError
        return function(*args)

    return call


def test_the_command_goes_from_url_to_url(tmp_path, monkeypatch, capsys):
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["llama3"], eos_token="</s>").save_pretrained(tmp_path / "t")
    source, target = store(new_url(), [[{"text": "a text of words " * 9}]] * 4), f"file://{tmp_path}/out"
    flags = {
        "data_path_or_name": source, "tokenizer_path_or_name": tmp_path / "t", "save_path": target, "num_proc": 1,
        "sequence_length": 16,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *(f"--{name}={value}" for name, value in flags.items())])
    run(bookcorpus.main)
    assert f"saved to   {target}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data-00000.parquet", "packing.json"]
    dataset = StreamedDataset.open(str(tmp_path / "out"))
    assert dataset.document_lengths.documents >= 4
    assert dataset.marks() == {"eos": 1}
    (tmp_path / "out" / "packing.json").write_text("cut o")
    assert dataset.marks() == {}
    assert len(datasets.load_dataset("parquet", data_files=f"{tmp_path}/out/*.parquet", split="train")) == len(dataset)
