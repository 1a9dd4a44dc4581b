"""Documents to packed sequences: bos + tokens + eos of each document, one after the other, cut to equal length."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tqdm import tqdm

from nnscaler.data.cut import PIECE, TokenIds, cut_into_pieces
from nnscaler.data.files import COLUMN, DATA_FILE, DOCUMENT_STARTS, PROVENANCE
from nnscaler.data.readers import Document
from nnscaler.data.sources import Corpus
from nnscaler.directory import new_directory
from nnscaler.errors import UserError

BATCH = PIECE  # characters tokenised by one call, about
PIECE_COST = 64  # characters that the tokenizer's bookkeeping for a piece weighs in a batch
WRITTEN = 1 << 20  # tokens written at once, at least

Ids = np.ndarray[Any, np.dtype[np.int32]]
Item = TypeVar("Item")


@dataclass
class Packing:
    """What became of a corpus. `tokens` counts bos and eos, and is `sequences * sequence_length + tail`; `continued`
    sequences begin within a document. Characters that could not be read stand as U+FFFD; the ids are those in the
    sequences."""

    sequence_length: int
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    sequences: int = 0
    continued: int = 0
    tail: int = 0
    replaced_characters: int = 0
    smallest_id: int | None = None
    largest_id: int | None = None
    seconds: float = 0.0


def pack(
    corpus: Corpus, tokenizer: Any, save_path: Path, sequence_length: int, threads: int, provenance: dict[str, Any]
) -> Packing:
    """Tokenises a corpus and writes it as a dataset that `datasets.load_from_disk` loads.

    The dataset has the columns `input_ids`: int32, `[sequence_length]`, and `document_starts`: int32, the places in the
    sequence where a document begins; 0 is not among them where a sequence goes on with the document of the one before.
    Tokens beyond the last whole sequence are left out. Documents without a character are skipped and counted. Text that
    spells a special token is tokenised as the ordinary text it is, so that bos and eos stand only where a document
    begins and ends.

    Args:
        corpus: where the documents come from.
        tokenizer: a `transformers` tokenizer with a bos and an eos token, backed by the `tokenizers` library.
        save_path: the directory to make; it does not exist, or is empty.
        sequence_length: tokens in a sequence, 2 or more.
        threads: documents tokenised at the same time. The result does not depend on it.
        provenance: what else to note in `packing.json`, next to the counts.

    Raises:
        UserError: the tokenizer does not fit, the corpus is damaged or makes no sequence, or `save_path` is in use.
    """
    marked = _MarkedTokenizer(tokenizer)
    packing = Packing(sequence_length)
    start = time.perf_counter()
    with new_directory(save_path) as directory, _one_thread_a_call():
        batches = _groups(_pieces_of_all(corpus.documents(), marked.encode, packing), _Piece.weight, BATCH)
        parts = _in_order(marked.encode_pieces, batches, threads)
        fingerprint = _write(_with_progress(parts, corpus), directory / DATA_FILE, packing)
        if packing.documents == 0:
            raise UserError(f"the corpus is empty: no text in {len(corpus.files)} files")
        if packing.sequences == 0:
            raise UserError(f"the corpus has {packing.tokens:,} tokens, less than one sequence of {sequence_length:,}")
        packing.replaced_characters = sum(corpus.replaced.values())
        packing.seconds = time.perf_counter() - start
        marks = {"vocab_size": len(tokenizer), "bos_token_id": marked.bos, "eos_token_id": marked.eos}
        _describe(directory, fingerprint, packing, {**provenance, **marks})
    return packing


class _Piece(NamedTuple):
    """A part of a document, or all of it."""

    text: str
    opens: bool  # the document begins here
    closes: bool  # the document ends here

    def weight(self) -> int:
        return len(self.text) + PIECE_COST


class _Tokens(NamedTuple):
    """A part of the stream of all documents' tokens."""

    ids: Ids
    starts: Ids  # places in it where a document begins

    def length(self) -> int:
        return len(self.ids)

    def cut(self, place: int) -> tuple[_Tokens, _Tokens]:
        """What lies before a place, and from it on."""
        first = int(np.searchsorted(self.starts, place))
        before = _Tokens(self.ids[:place], self.starts[:first])
        return before, _Tokens(self.ids[place:], self.starts[first:] - np.int32(place))


def _joined(parts: list[_Tokens]) -> _Tokens:
    shifts = np.cumsum([0, *(part.length() for part in parts)])
    starts = [part.starts + np.int32(shift) for part, shift in zip(parts, shifts)]
    return _Tokens(np.concatenate([part.ids for part in parts]), np.concatenate(starts))


class _MarkedTokenizer:
    """The Rust tokenizer inside a `transformers` one, and the ids to put around documents instead of what it would."""

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has no fast version (a tokenizer.json)")
        for name in ("bos", "eos"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {name} token to mark documents with")
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        # What a call of the tokenizer may have left behind: `transformers` sets these anew on every call too.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as the text they are

    def encode(self, text: str) -> TokenIds:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: list[_Piece]) -> _Tokens:
        ids: TokenIds = []
        starts: list[int] = []
        encodings = self.backend.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            if piece.opens:
                starts.append(len(ids))
                ids.append(self.bos)
            ids += encoding.ids
            if piece.closes:
                ids.append(self.eos)
        return _Tokens(np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int32))


def _pieces_of_all(
    documents: Iterable[Document], encode: Callable[[str], TokenIds], packing: Packing
) -> Iterator[_Piece]:
    """Cuts all documents into pieces, and counts the documents."""
    for document in documents:
        if isinstance(document, str) and len(document) < PIECE:
            pieces: Iterable[str] = [document]  # most are, and there may be millions of them
        else:
            pieces = cut_into_pieces([document] if isinstance(document, str) else document, encode)
        held, opens = "", True  # a piece is held back until it is known whether another one follows
        for text in pieces:
            if held:
                yield _Piece(held, opens, closes=False)
                opens = False
            held = text
        if held:
            packing.documents += 1
            yield _Piece(held, opens, closes=True)
        else:
            packing.empty_documents += 1


def _groups(items: Iterable[Item], weight: Callable[[Item], int], least: int) -> Iterator[list[Item]]:
    """Groups neighbours until they weigh `least` or more together; the last group may weigh less."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += weight(item)
        if total >= least:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keeps a call of the tokenizer to the thread that makes it, so that as many work as were asked for."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _in_order(
    encode_pieces: Callable[[list[_Piece]], _Tokens], batches: Iterable[list[_Piece]], threads: int
) -> Iterator[_Tokens]:
    """Maps batches on threads (the tokenizer lets go of Python's lock), few enough at a time to bound the memory."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[_Tokens]] = deque()
        for batch in batches:
            running.append(pool.submit(encode_pieces, batch))
            if len(running) > threads + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _with_progress(parts: Iterable[_Tokens], corpus: Corpus) -> Iterator[_Tokens]:
    with tqdm(total=corpus.size, desc="tokenising", unit="B", unit_scale=True, delay=2, mininterval=0.5) as bar:
        for part in parts:
            yield part
            bar.update(corpus.position - bar.n)


def _write(parts: Iterable[_Tokens], path: Path, packing: Packing) -> str:
    """Writes the sequences of a stream of tokens as the Arrow file of a dataset, and returns their fingerprint."""
    length = packing.sequence_length
    schema = _features(length).arrow_schema
    digest = hashlib.sha256(str(schema).encode())
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for ids, starts in _whole_sequences(parts, packing):
            begins = np.arange(0, len(ids) + 1, length)
            offsets = np.searchsorted(starts, begins).astype(np.int32)  # of each sequence's first document in `starts`
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(ids), length),
                pa.ListArray.from_arrays(offsets, pa.array(starts % np.int32(length))),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            digest.update(ids.tobytes())
            digest.update(starts.tobytes())
            packing.continued += len(begins) - 1 - int(np.count_nonzero(starts % length == 0))
            smallest, largest = int(ids.min()), int(ids.max())
            packing.smallest_id = min(smallest, smallest if packing.smallest_id is None else packing.smallest_id)
            packing.largest_id = max(largest, largest if packing.largest_id is None else packing.largest_id)
    return digest.hexdigest()[:16]


def _whole_sequences(parts: Iterable[_Tokens], packing: Packing) -> Iterator[_Tokens]:
    """Yields a stream of tokens in multiples of the sequence length, all but its tail, and counts it."""
    length = packing.sequence_length
    rest = _Tokens(np.empty(0, np.int32), np.empty(0, np.int32))
    for group in _groups(parts, _Tokens.length, max(WRITTEN, length)):
        stream = _joined([rest, *group])
        packing.tokens += stream.length() - rest.length()
        whole, rest = stream.cut(stream.length() // length * length)
        packing.sequences += whole.length() // length
        if whole.length():
            yield whole
    packing.tail = rest.length()


def _features(length: int) -> datasets.Features:
    ids, places = datasets.List(datasets.Value("int32"), length=length), datasets.List(datasets.Value("int32"))
    return datasets.Features({COLUMN: ids, DOCUMENT_STARTS: places})


def _describe(directory: Path, fingerprint: str, packing: Packing, provenance: dict[str, Any]) -> None:
    """Writes the files that make a directory a Hugging Face dataset, and `packing.json`."""
    datasets.DatasetInfo(features=_features(packing.sequence_length)).write_to_directory(str(directory))
    state: dict[str, Any] = {
        "_data_files": [{"filename": DATA_FILE}],
        "_fingerprint": fingerprint,
        "_split": "train",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
    }
    counts = {name: value for name, value in vars(packing).items() if name != "seconds"}
    for name, content in (("state.json", state), (PROVENANCE, {**provenance, **counts})):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
