"""From conversations to packed rows: whole conversations, as many as fit, with labels only where something is
learned."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from nnscaler.data.chat import ChatTemplate, Rendered
from nnscaler.data.fit import best_fit
from nnscaler.data.flow import groups, in_order, one_thread_a_call, with_progress
from nnscaler.data.pack import BATCH, WRITTEN, backend_of
from nnscaler.data.packed import IGNORED
from nnscaler.data.readers import HALF_PAIR, Row
from nnscaler.data.sources import Corpus
from nnscaler.data.writing import writing
from nnscaler.data.written import Ids
from nnscaler.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Where a row has its conversation: in one column of messages, or in two, with a prompt and its completion."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def of(self, row: Any, place: str) -> list[Any]:
        """The values of these columns. Raises UserError where there are none."""
        names = [name for name in (self.messages, self.prompt, self.completion) if name is not None]
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must have columns by name, not be {type(row).__name__}")
        for name in names:
            if name not in row:
                raise UserError(f"{place}: there is no {name!r}; the row has {', '.join(row) or 'nothing'}")
            if row[name] is None:
                raise UserError(f"{place}: {name!r} is empty")
        return [row[name] for name in names]


@dataclass(frozen=True)
class Conversation:
    """The tokens of a conversation, and their labels at the same places: the token, or IGNORED where it is not
    learned."""

    ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Fitting:
    """What became of the conversations of a corpus.

    documents   how many are in the rows
    dropped     how many are longer than a row, and were left out
    cut         how many are longer than a row, and were cut
    unlearned   how many were left out because nothing in them would be learned
    tokens      how many are in the rows, without padding
    learned     how many of these have a label
    padding     how many tokens fill up rows
    """

    sequence_length: int
    documents: int = 0
    dropped: int = 0
    cut: int = 0
    unlearned: int = 0
    tokens: int = 0
    learned: int = 0
    padding: int = 0
    sequences: int = 0
    smallest_id: int | None = None
    largest_id: int | None = None
    seconds: float = 0.0

    def counts(self) -> dict[str, Any]:
        """What `packing.json` says of it."""
        return {name: value for name, value in vars(self).items() if name != "seconds"}


class Speech:
    """Turns rows into conversations of tokens.

    all_learned  whether everything is learned; else only what the assistant says, or what completes a prompt

    Text that spells a special token becomes this token, as usual for templates and prompts. A prompt and a completion
    that are texts become one text, between bos (where the tokenizer has it) and eos.
    """

    def __init__(self, tokenizer: Any, columns: Columns, template: str | None, all_learned: bool) -> None:
        self._backend = backend_of(tokenizer)
        self._backend.encode_special_tokens = False
        self._tokenizer, self._columns, self._all, self._given = tokenizer, columns, all_learned, template

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._given)

    def render(self, row: Row) -> Rendered:
        """A row as text. Raises UserError, with the place of the row, where it has no conversation."""
        found = self._rendered(self._columns.of(*row), row[1])
        text = HALF_PAIR.sub("\ufffd", found.text)  # which JSON may spell, and no tokenizer takes
        return Rendered(text, [(0, len(text))] if self._all else found.spans)

    def _rendered(self, values: list[Any], place: str) -> Rendered:
        if len(values) == 1:
            return (self._template.whole if self._all else self._template.assistants)(values[0], place)
        prompt, completion = values
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._pair(prompt, completion)
        return self._template.completion(prompt, completion, place)

    def _pair(self, prompt: str, completion: str) -> Rendered:
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
        if prompt.startswith(bos):
            bos = ""
        if completion.endswith(eos):
            eos = ""
        text = f"{bos}{prompt}{completion}{eos}"
        return Rendered(text, [(len(bos) + len(prompt), len(text))])

    def encode(self, batch: list[Rendered]) -> list[Conversation]:
        """The tokens of some rows.

        A token is learned if a character of it is. The first token of a row never is, since nothing comes before it.
        """
        encodings = self._backend.encode_batch([one.text for one in batch], add_special_tokens=False)
        found = []
        for one, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            labels = np.full(len(ids), IGNORED, dtype=np.int32)
            for begin, end in one.spans:
                part = slice(_token(encoding, begin, len(one.text)), _token(encoding, end, len(one.text)))
                labels[part] = ids[part]
            labels[:1] = IGNORED
            found.append(Conversation(ids, labels))
        return found


def _token(encoding: Encoding, place: int, length: int) -> int:
    """The first token at a character, or after it: a tokenizer may leave out characters."""
    while place < length:
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
        place += 1
    return len(encoding)


def pack_conversations(
    corpus: Corpus, speech: Speech, tokenizer: Any, save_path: Path | str, length: int, threads: int, cut: bool,
    provenance: dict[str, Any],
) -> Fitting:  # fmt: skip
    """Writes the conversations of a corpus as a dataset, as `nnscaler.data.pack.pack` does. Behind a URL, those of
    different files share no row.

    Its columns are `input_ids` and `labels`, int32 [length], and `document_starts`: where conversations begin, and
    padding behind them. Labels are tokens at their own places, -100 where nothing is learned. A conversation that fits
    a row is never cut. The result does not depend on `threads`.

    cut         whether what is longer than a row is cut behind it; else it is dropped
    provenance  what else to note in `packing.json`, next to the counts

    Raises UserError for a row without a conversation, and where none is left.
    """
    start = time.perf_counter()
    filler = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    with writing(save_path, corpus, length, True, provenance) as writer, one_thread_a_call():
        fitting = Fitting(**(writer.kept or {"sequence_length": length}))
        for part in writer.parts(corpus):
            rendered = (speech.render(row) for row in part.rows())
            encoded = in_order(speech.encode, groups(rendered, Rendered.weight, BATCH), threads)
            rows = best_fit(_fitting(with_progress(encoded, part), cut, fitting), length)
            for some in groups(rows, lambda row: length, WRITTEN):
                writer.write(*_laid_out(some, length, filler, fitting))
            corpus.note(part)
            writer.keep(fitting.counts())
        fitting.sequences = writer.rows
        if not fitting.sequences:
            raise UserError(
                f"no conversation is left: {fitting.dropped:,} longer than {length:,} tokens, and "
                f"{fitting.unlearned:,} in which nothing would be learned"
            )
        fitting.smallest_id, fitting.largest_id = writer.smallest_id, writer.largest_id
        fitting.seconds = time.perf_counter() - start
        writer.describe({**provenance, "vocab_size": len(tokenizer), **fitting.counts()})
    return fitting


def _fitting(batches: Iterable[list[Conversation]], cut: bool, fitting: Fitting) -> Iterator[Conversation]:
    """The conversations that a row can hold, or the parts of them that it can. All are counted."""
    for conversation in (one for batch in batches for one in batch):
        is_long = len(conversation) > fitting.sequence_length
        if is_long and not cut:
            fitting.dropped += 1
            continue
        part = slice(fitting.sequence_length)
        kept = Conversation(conversation.ids[part], conversation.labels[part]) if is_long else conversation
        learned = int((kept.labels != IGNORED).sum())
        if not learned:
            fitting.unlearned += 1
            continue
        fitting.cut += is_long
        fitting.documents += 1
        fitting.tokens += len(kept)
        fitting.learned += learned
        yield kept


def _laid_out(rows: list[list[Conversation]], length: int, filler: int, fitting: Fitting) -> tuple[Ids, Ids, Ids]:
    """Rows that are laid end to end: their ids, the places at which conversations and padding begin, and labels."""
    ids = np.full(len(rows) * length, filler, dtype=np.int32)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    starts = []
    for number, row in enumerate(rows):
        at = number * length
        for one in row:
            part = slice(at, at + len(one))
            ids[part], labels[part] = one.ids, one.labels
            starts.append(at)
            at = part.stop
        if at < (number + 1) * length:
            starts.append(at)
            fitting.padding += (number + 1) * length - at
    return ids, np.array(starts, dtype=np.int32), labels
