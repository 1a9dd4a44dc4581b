"""From documents to packed sequences: bos + tokens + eos of each document, one after the other, cut to equal length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nnscaler.counting import counted
from nnscaler.data.cut import PIECE, TokenIds, cut_into_pieces
from nnscaler.data.flow import groups, in_order, one_thread_a_call, with_progress
from nnscaler.data.readers import Document
from nnscaler.data.sources import Corpus
from nnscaler.data.writing import writing
from nnscaler.data.written import Ids
from nnscaler.errors import UserError

BATCH = PIECE  # characters tokenised by one call, about
PIECE_COST = 64  # characters that the tokenizer's bookkeeping for a piece weighs in a batch
WRITTEN = 1 << 20  # tokens written at once, at least


@dataclass
class Packing:
    """What became of a corpus.

    `tokens` counts bos and eos, and is `sequences * sequence_length + tail`. `continued` is the number of sequences
    that begin within a document. Characters that could not be read became U+FFFD. The ids are those that occur in the
    sequences.
    """

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

    def counts(self) -> dict[str, Any]:
        """What is noted of it in `packing.json`."""
        return {name: value for name, value in vars(self).items() if name != "seconds"}


def pack(
    corpus: Corpus,
    tokenizer: Any,
    save_path: Path | str,
    sequence_length: int,
    threads: int,
    provenance: dict[str, Any],
) -> Packing:
    """Tokenises a corpus and writes it as a dataset that training reads; in a directory, `datasets.load_from_disk`
    loads it.

    The dataset has the columns `input_ids`: int32, `[sequence_length]`, and `document_starts`: int32, the places in the
    sequence where a document begins; 0 is not among them where a sequence goes on with the document of the one before.
    Tokens beyond the last whole sequence are left out. Documents without a character are skipped and counted. Text that
    spells a special token is tokenised as the ordinary text it is, so that bos and eos stand only where a document
    begins and ends.

    Args:
        corpus: where the documents come from.
        tokenizer: a `transformers` tokenizer with an eos token, and perhaps a bos token, backed by the `tokenizers`
            library.
        save_path: the directory to make, which does not exist, or is empty; or a URL, see `nnscaler.data.shards`.
        sequence_length: tokens in a sequence, 2 or more.
        threads: documents tokenised at the same time. The result does not depend on it.
        provenance: what else to note in `packing.json`, next to the counts.

    Raises:
        UserError: the tokenizer does not fit, the corpus is damaged or makes no sequence, or `save_path` is in use.
    """
    marked = _MarkedTokenizer(tokenizer)
    start = time.perf_counter()
    with writing(save_path, corpus, sequence_length, False, provenance) as writer, one_thread_a_call():
        stream = _Stream.of(writer.kept, sequence_length)
        packing = stream.packing
        for part in writer.parts(corpus):
            batches = groups(_pieces_of_all(part.documents(), marked.encode, packing), _Piece.weight, BATCH)
            tokens_of_all = in_order(marked.encode_pieces, batches, threads)
            for tokens in stream.whole_sequences(with_progress(tokens_of_all, part)):
                writer.write(tokens.ids, tokens.starts)
            packing.replaced_characters += sum(part.replaced.values())
            corpus.note(part)
            writer.keep(stream.kept())
        packing.sequences, packing.continued = writer.rows, writer.continued
        packing.smallest_id, packing.largest_id = writer.smallest_id, writer.largest_id
        if packing.documents == 0:
            raise UserError(f"the corpus is empty: no text in {counted(len(corpus.files), 'file')}")
        if packing.sequences == 0:
            raise UserError(f"the corpus has {packing.tokens:,} tokens, less than one sequence of {sequence_length:,}")
        packing.seconds = time.perf_counter() - start
        marks = {"vocab_size": len(tokenizer), "bos_token_id": marked.bos, "eos_token_id": marked.eos}
        writer.describe({**provenance, **marks, **packing.counts()})
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
        """What lies before a place, and what lies from it on."""
        first = int(np.searchsorted(self.starts, place))
        before = _Tokens(self.ids[:place], self.starts[:first])
        return before, _Tokens(self.ids[place:], self.starts[first:] - np.int32(place))


def _joined(parts: list[_Tokens]) -> _Tokens:
    shifts = np.cumsum([0, *(part.length() for part in parts)])
    starts = [part.starts + np.int32(shift) for part, shift in zip(parts, shifts)]
    return _Tokens(np.concatenate([part.ids for part in parts]), np.concatenate(starts))


def backend_of(tokenizer: Any) -> Tokenizer:
    """The Rust tokenizer inside a `transformers` one. Raises UserError where there is none."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no fast version (a tokenizer.json)")
    # What a call of the tokenizer may have left behind: `transformers` sets these anew on every call too.
    backend.no_truncation()
    backend.no_padding()
    return backend


class _MarkedTokenizer:
    """The Rust tokenizer inside a `transformers` one; and the ids to put around documents, instead of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = backend_of(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has no eos token to mark documents with")
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
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
                ids += [] if self.bos is None else [self.bos]
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


@dataclass
class _Stream:
    """The tokens of all documents, one after the other.

    rest  the last of them, which do not fill a sequence yet
    """

    packing: Packing
    rest: _Tokens

    @staticmethod
    def of(kept: dict[str, Any], length: int) -> _Stream:
        """One that goes on where another one was (`kept`)."""
        ids, starts = (np.array(kept.get(name, []), np.int32) for name in ("ids", "starts"))
        return _Stream(Packing(**kept.get("counts", {"sequence_length": length})), _Tokens(ids, starts))

    def kept(self) -> dict[str, Any]:
        return {"counts": self.packing.counts(), "ids": self.rest.ids.tolist(), "starts": self.rest.starts.tolist()}

    def whole_sequences(self, parts: Iterable[_Tokens]) -> Iterator[_Tokens]:
        """What more there is now, in multiples of the sequence length, all but its tail; counts it."""
        length = self.packing.sequence_length
        for group in groups(parts, _Tokens.length, max(WRITTEN, length)):
            tokens = _joined([self.rest, *group])
            self.packing.tokens += tokens.length() - self.rest.length()
            whole, self.rest = tokens.cut(tokens.length() // length * length)
            if whole.length():
                yield whole
        self.packing.tail = self.rest.length()
