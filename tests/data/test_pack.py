"""No token is lost, doubled or changed, whatever the documents, the pieces they are cut into, and the threads."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nnscaler.data import cut
from nnscaler.data import pack as packing
from nnscaler.data.sources import Corpus
from nnscaler.errors import UserError

PROSE = (
    "It was a dark night, and the wind's 1,234 voices said: don't! We'll see... (maybe)\n\n\tWie schön. 汉字，测试。"
)


def train(model: models.Model, trainer: trainers.Trainer, pre: object, normalizer: object = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    return tokenizer


def byte_level(regex: str | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is None:
        return train(models.BPE(), trainer, byte)
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return train(models.BPE(), trainer, pre_tokenizers.Sequence([split, byte]))


def spaces_in_front() -> Tokenizer:
    """As Llama 2 has it: a space put before every text, and no division into words before the merges."""
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<unk>"], max_token_length=8)
    tokenizer = train(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Metaspace())
    front = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))
    tokenizer.normalizer = front
    return tokenizer


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {"gpt2": byte_level(), "llama3": byte_level(LLAMA3), "llama2": spaces_in_front()}

characters = st.characters(exclude_categories=["Cs"])
prose = st.integers(0, len(PROSE)).flatmap(lambda start: st.integers(1, 40).map(lambda n: PROSE[start:] + PROSE[:n]))
runs = st.tuples(st.sampled_from([*" \n\t0aé汉.!'", "12", "\r\n", "ab "]), st.integers(1, 400)).map(
    lambda r: r[0] * r[1]
)
long_texts = st.lists(st.one_of(prose, runs, st.text(characters, max_size=60)), max_size=20).map("".join)


@contextmanager
def small_pieces(size: int) -> Iterator[None]:
    """Constants that make pieces and batches of small corpora; a piece is never cut by force."""
    small_cut = mock.patch.multiple(cut, PIECE=size, CONTEXT=32, SEARCHED=size // 2, LONGEST_PIECE=1 << 30)
    with small_cut, mock.patch.multiple(packing, BATCH=size, PIECE_COST=3, WRITTEN=50):
        yield


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(text=long_texts, block=st.integers(1, 300))
@example(text="1" * 333 + " a" + "2" * 500, block=100)
@example(text=("word " * 100 + " \n " * 100) * 2, block=7)
def test_pieces_have_the_tokens_of_the_whole(name: str, text: str, block: int) -> None:
    tokenizer = TOKENIZERS[name]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    with small_pieces(150):
        pieces = list(cut.cut_into_pieces((text[i : i + block] for i in range(0, len(text), block)), encode))
    assert all(pieces)
    assert [i for piece in pieces for i in encode(piece)] == encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_prose_is_cut(name: str) -> None:
    with small_pieces(150):
        pieces = list(cut.cut_into_pieces([PROSE * 50], lambda text: TOKENIZERS[name].encode(text).ids))
    assert max(map(len, pieces)) < 400


def test_text_without_a_place_to_cut_is_cut_by_force(caplog: pytest.LogCaptureFixture) -> None:
    text = "a" * 5000
    with small_pieces(150), mock.patch.object(cut, "LONGEST_PIECE", 600), caplog.at_level(logging.WARNING):
        pieces = list(cut.cut_into_pieces([text], lambda text: TOKENIZERS["llama3"].encode(text).ids))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 600
    assert "without a safe place to cut" in caplog.text


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.one_of(long_texts, st.text(characters, max_size=8)), max_size=12),
    length=st.integers(2, 40),
    threads=st.integers(1, 4),
    size=st.integers(40, 300),
)
def test_tokens_are_conserved(texts: list[str], length: int, threads: int, size: int) -> None:
    backend = TOKENIZERS["llama3"]
    documents = [[0, *backend.encode(t, add_special_tokens=False).ids, 1] for t in texts if t]
    expected = [i for document in documents for i in document]
    starts = np.cumsum([0, *(len(document) for document in documents)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    with tempfile.TemporaryDirectory() as directory, small_pieces(size):
        rows, out = Path(directory, "rows.jsonl"), Path(directory, "out")
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if len(expected) < length:
            with pytest.raises(ValueError, match="empty" if not any(texts) else "less than one sequence"):
                packing.pack(Corpus([rows]), tokenizer, out, length, threads, {})
            assert [path.name for path in Path(directory).iterdir()] == ["rows.jsonl"]
            return
        counts = packing.pack(Corpus([rows]), tokenizer, out, length, threads, {})
        dataset = datasets.load_from_disk(str(out))
        sequences = np.array(dataset["input_ids"])
        found = [row * length + place for row, places in enumerate(dataset["document_starts"]) for place in places]
    assert sequences.shape == (len(expected) // length, length)
    assert sequences.ravel().tolist() == expected[: sequences.size]
    assert found == [start for start in starts[:-1] if start < sequences.size]
    assert counts.continued == sum(row * length not in starts for row in range(len(sequences)))
    assert (counts.tokens, counts.tail) == (len(expected), len(expected) - sequences.size)
    assert (counts.documents, counts.empty_documents) == (sum(map(bool, texts)), texts.count(""))


def test_a_document_in_pieces_begins_once_and_ends_once() -> None:
    backend, texts = TOKENIZERS["llama3"], ["ab ", "cd ", "e"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    pieces = [packing._Piece(text, text == texts[0], text == texts[-1]) for text in texts]
    inner = [i for text in texts for i in backend.encode(text, add_special_tokens=False).ids]
    tokens = packing._MarkedTokenizer(tokenizer).encode_pieces(pieces)
    assert (tokens.ids.tolist(), tokens.starts.tolist()) == ([0, *inner, 1], [0])


def test_a_place_to_cut_is_looked_for_without_marks() -> None:
    """Whatever the tokenizer would put around a text by itself, or cut it to."""
    backend = Tokenizer.from_str(TOKENIZERS["llama3"].to_str())
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    text = "voices said <s>"
    assert packing._MarkedTokenizer(tokenizer).encode(text) == [
        i for part in ("voices said <", "s>") for i in TOKENIZERS["llama3"].encode(part).ids
    ]


def test_a_tokenizer_in_python_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the tokenizer a/b has no fast version \(a tokenizer.json\)$"):
        packing.backend_of(SimpleNamespace(name_or_path="a/b"))


def test_ids_may_be_as_large_as_vocabularies_are() -> None:
    backend = Tokenizer(models.WordLevel({"small": 7, "large": 250_000}, unk_token="small"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    marked = packing._MarkedTokenizer(tokenizer)
    tokens = marked.encode_pieces([packing._Piece("large small", True, True), packing._Piece("large", True, True)])
    assert tokens.ids.tolist() == [marked.bos, 250_000, 7, marked.eos, marked.bos, 250_000, marked.eos]
    before, after = packing._joined([tokens, tokens]).cut(9)
    assert (before.starts.tolist(), after.starts.tolist()) == ([0, 4, 7], [2])
    assert after.ids.tolist() == tokens.ids[2:].tolist()
    assert {each.dtype for each in (*before, *after)} == {np.dtype(np.int32)}, "as they are written"
