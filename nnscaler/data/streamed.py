"""Rows of tokens in Parquet files, here or behind a URL, read a little at a time: a dataset may exceed the disk.

An epoch lays all files end to end, in an order of its own, and divides their rows into LANES runs. Samples come from
the lanes in turn, and within a lane from one block of rows after the other, each in an order of its own. Which row is
which sample follows from the seed, and from how many rows the files' footers tell of. So a run goes on at any sample at
once, on any number of devices, and replicas whose number divides LANES read different rows. (The shuffled streams of
`datasets` leave out on resume what their buffers held.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nnscaler import hub
from nnscaler.data.documents import COLUMNS as DOCUMENT_COLUMNS
from nnscaler.data.documents import DocumentLengths, document_starts, not_said, padding_starts
from nnscaler.data.files import COLUMN, DOCUMENT_STARTS, LABELS, PROVENANCE, UNFINISHED
from nnscaler.data.packed import (
    IGNORED,
    UNREAD,
    Row,
    TokenIds,
    are_numbers,
    is_list,
    marks_in,
    not_read,
    nothing_learned,
)
from nnscaler.data.readers import reading
from nnscaler.data.remote import located, opened
from nnscaler.errors import UserError

LANES = 32
BUFFER = 1 << 24  # bytes of a block of rows, about
MOST_ROWS = 1024  # of a block
READ = 64  # rows decoded at a time
LOOKED_FILES, LOOKED_ROWS = 8, 32  # of so many files, so many rows tell how long documents are
_FILES, _BLOCK = (1 << 32) - 2, (1 << 32) - 3  # tell the seeds of files' orders and of blocks' from others


@dataclass(frozen=True)
class StreamedDataset:
    """Parquet files whose rows have `input_ids` of one length, and perhaps `labels`, and where documents begin.

    path       as the user gave it
    system     the file system (of fsspec) that opens the files
    files      their names, with how many rows each has
    columns    the columns that training reads
    ids        the smallest and the largest token id, in labels too, if the footers tell
    documents  column that says where documents begin, see `nnscaler.data.documents`; None: there is none
    """

    path: str
    system: Any
    files: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    sequence_length: int
    ids: TokenIds
    documents: str | None = None

    @staticmethod
    def open(path: str, flag: str = "dataset_path") -> StreamedDataset:
        """`path`: a local file or folder, or a URL that fsspec reads, such as hf://datasets/OWNER/NAME.

        Reads the footers of all files. Raises UserError where there are no such rows.
        """
        try:
            system, root = located(path)
            if system.glob(f"{root}/{UNFINISHED}*"):
                raise UserError(
                    f"{flag} is '{path}', which bookcorpus.py has not finished; run it again as before, and it goes on"
                )
            names = [root] if system.isfile(root) else sorted(system.glob(f"{root}/**/*.parquet"))
            with ThreadPoolExecutor(16) as pool:
                footers = list(pool.map(lambda name: _footer(system, name), names))
            found = [(name, footer) for name, footer in zip(names, footers, strict=True) if footer.num_rows]
            if not found:
                raise UserError(f"{flag} is '{path}', where no Parquet file has a row")
            columns = _columns(*found[0])
            for name, footer in found:
                if _columns(name, footer) != columns:
                    raise UserError(
                        f"{flag} is '{path}', where files differ in their columns: '{name}' has "
                        f"{', '.join(_columns(name, footer))}, and '{found[0][0]}' {', '.join(columns)}"
                    )
            ids = _ids([footer for _, footer in found], path, flag)
            with reading(Path(found[0][0])), opened(system, found[0][0]) as file:
                first = next(pq.ParquetFile(file).iter_batches(1, columns=[COLUMN])).column(0)
            length = int(pc.list_value_length(first)[0].as_py() or 0)
            if not length:
                raise UserError(f"{flag} is '{path}', where the first row of '{found[0][0]}' has no tokens")
        except UserError:
            raise
        except Exception as error:  # libraries of networks raise whatever they may
            raise UserError(f"{flag} is '{path}', which cannot be read: {hub.first_line(error)}") from error
        documents = next((name for name in DOCUMENT_COLUMNS if name in columns), None)
        files = tuple((name, footer.num_rows) for name, footer in found)
        return StreamedDataset(path, system, files, columns, length, ids, documents)

    def __len__(self) -> int:
        return sum(rows for _, rows in self.files)

    @property
    def parts(self) -> tuple[StreamedDataset, ...]:
        return (self,)

    @property
    def block(self) -> int:
        """How many rows are read at a time."""
        row_bytes = 4 * self.sequence_length * len(self.columns)
        return max(1, min(MOST_ROWS, BUFFER // row_bytes))

    def as_stored(self, epoch: int) -> Sequence[int]:
        """The order of the files in which they are stored, which is the same in every epoch."""
        return range(len(self.files))

    @property
    def asks_for_documents(self) -> bool:
        """As `PackedDataset.asks_for_documents`, by the rows that are looked at."""
        if self.documents in (None, DOCUMENT_STARTS):
            return False
        return self.document_lengths.documents + self.document_lengths.padded > len(self)

    @cached_property
    def document_lengths(self) -> DocumentLengths:
        """How long documents are, estimated from the first rows of some files. A model is to know as many positions as
        a row has.

        Raises UserError where there is no column of documents, it is something else, or rows cannot be read.
        """
        if self.documents is None:
            raise not_said(self.path)
        rows = list(_Lane(self, self.as_stored).first_rows())
        length = self.sequence_length
        shifts = np.arange(len(rows)) * length
        starts = np.concatenate([row[DOCUMENT_STARTS] + shift for row, shift in zip(rows, shifts)])
        padding = np.empty(0, np.int64)
        if LABELS in self.columns:
            ids, labels = (np.stack([row[name] for row in rows]) for name in (COLUMN, LABELS))
            padding = padding_starts(starts, ids, labels, IGNORED)
        found = DocumentLengths.between(starts, padding, len(rows), length)
        share = len(self) / len(rows)
        return replace(
            found, documents=round(found.documents * share), cut=0, padded=round(found.padded * share),
            positions=length, estimated=True,
        )  # fmt: skip

    def token_ids(self) -> TokenIds:
        """The smallest and the largest id, in labels too, as the footers tell."""
        return self.ids

    def marks(self) -> dict[str, int]:
        """As `PackedDataset.marks`."""
        with suppress(Exception):  # libraries of networks raise whatever they may
            return marks_in(self.system.cat_file(f"{located(self.path)[1]}/{PROVENANCE}"))
        return {}

    def place_outside(self, vocabulary: int) -> str:
        """As `PackedDataset.place_outside`; which row it is, footers do not tell."""
        return "as its files' footers say"


def _footer(system: Any, name: str) -> pq.FileMetaData:
    with reading(Path(name)), opened(system, name) as file:
        return pq.ParquetFile(file).metadata


def _columns(name: str, footer: pq.FileMetaData) -> tuple[str, ...]:
    """The columns of a file that training reads. Raises UserError where they are no lists of whole numbers, or
    there are no tokens."""
    lists = {field.name: field.type for field in footer.schema.to_arrow_schema() if is_list(field.type)}
    documents = next((column for column in DOCUMENT_COLUMNS if column in lists), None)
    columns = tuple(column for column in (COLUMN, LABELS, documents) if column is not None and column in lists)
    if COLUMN not in columns:
        raise UserError(f"'{name}' has no column '{COLUMN}' of lists")
    for column in columns:
        if not are_numbers(lists[column]):
            raise UserError(f"'{name}' has a column '{column}' of {lists[column]}, not of lists of whole numbers")
    return columns


def _ids(footers: list[pq.FileMetaData], path: str, flag: str) -> TokenIds:
    """The smallest and the largest id, in labels too, as far as footers tell; 0 where they do not. Raises UserError
    where nothing is learned, and where a column that training does not read may differ between tokens."""
    statistics = _statistics(footers, (COLUMN, LABELS, *UNREAD))
    for column in UNREAD:
        parts = statistics[column]
        if any(one is None for one in parts) or len({value for one in parts if one for value in one}) > 1:
            raise not_read(column, flag, path)
    ids, labels = ([one for one in statistics[column] if one] for column in (COLUMN, LABELS))
    learned = {value for one in labels for value in one} - {IGNORED}
    if labels and not learned and None not in statistics[LABELS]:
        raise nothing_learned(path)
    known = learned.union(*ids)
    return TokenIds(min(known, default=0), max(known, default=0))


def _statistics(footers: list[pq.FileMetaData], columns: Sequence[str]) -> dict[str, list[tuple[int, int] | None]]:
    """Column -> its smallest and its largest value in each row group that has it; None: the footer does not tell."""
    found: dict[str, list[tuple[int, int] | None]] = {column: [] for column in columns}
    for footer in footers:
        for group in map(footer.row_group, range(footer.num_row_groups)):
            for part in map(group.column, range(group.num_columns)):
                column = part.path_in_schema.split(".")[0]
                if column in found:
                    one = part.statistics
                    found[column].append((one.min, one.max) if one is not None and one.has_min_max else None)
    return found


class Streaming:
    """The samples of a streamed dataset in the order of a seed, epoch after epoch, without end.

    part        the place of the dataset in a mixture
    vocabulary  how many ids the model knows; None: whatever they are
    """

    def __init__(self, dataset: StreamedDataset, seed: int, part: int = 0, vocabulary: int | None = None) -> None:
        self._dataset, self._seed, self._part, self._rows = dataset, seed, part, len(dataset)
        self._block, self._vocabulary = dataset.block, vocabulary
        self._lanes: dict[int, _Lane] = {}

    def sample(self, number: int) -> Row:
        epoch, place = divmod(number, self._rows)
        lane, at = place % LANES, place // LANES
        short, longer = divmod(self._rows, LANES)  # rows of a lane, and how many lanes have one more
        begin = lane * short + min(lane, longer)
        block, within = divmod(at, self._block)
        first = begin + block * self._block
        last = min(first + self._block, begin + short + (lane < longer))
        seeds = (self._seed, epoch, self._part, lane, block, _BLOCK)
        order = np.random.default_rng(seeds).permutation(last - first)
        reader = self._lanes.setdefault(lane, _Lane(self._dataset, self._files, self._vocabulary))
        return reader.rows(epoch, first, last)[int(order[within])]

    def _files(self, epoch: int) -> Sequence[int]:
        """An epoch's order of the files."""
        seeds = (self._seed, epoch, self._part, _FILES)
        order: list[int] = np.random.default_rng(seeds).permutation(len(self._dataset.files)).tolist()
        return order


class StreamedInOrder:
    """Each row of a streamed dataset once, in the order in which they are stored. Every copy of the model reads all.

    vocabulary  as in `Streaming`
    """

    def __init__(self, dataset: StreamedDataset, vocabulary: int | None = None) -> None:
        self._block, self._rows = dataset.block, len(dataset)
        self._reader = _Lane(dataset, dataset.as_stored, vocabulary)

    def sample(self, number: int) -> Row | None:
        if number >= self._rows:
            return None
        block, within = divmod(number, self._block)
        first = block * self._block
        return self._reader.rows(0, first, min(first + self._block, self._rows))[within]


class _Lane:
    """Reads one block of rows after the other, and keeps the last one.

    order       epoch -> in which order its files come
    vocabulary  as in `Streaming`
    """

    def __init__(
        self, dataset: StreamedDataset, order: Callable[[int], Sequence[int]], vocabulary: int | None = None
    ) -> None:
        self._dataset, self._order, self._vocabulary = dataset, order, vocabulary
        self._held: tuple[tuple[int, int], list[Row]] = ((-1, -1), [])  # which block, and its rows
        self._ahead: Iterator[Row] = iter(())
        self._next = (-1, -1)  # the epoch and the row that come next from there

    def rows(self, epoch: int, first: int, last: int) -> list[Row]:
        """The rows of an epoch from `first` to before `last`. Raises UserError where they cannot be read."""
        if self._held[0] != (epoch, first):
            self._held = (epoch, first), self._read(epoch, first, last)
        return self._held[1]

    def _read(self, epoch: int, first: int, last: int) -> list[Row]:
        if self._next != (epoch, first):
            self._ahead = self._from(epoch, first)
        self._next = epoch, last
        return [next(self._ahead) for _ in range(last - first)]

    def first_rows(self) -> Iterator[Row]:
        """Rows from the beginnings of some files, which lie as far apart as they can."""
        files = self._dataset.files
        some = [files[index][0] for index in np.linspace(0, len(files) - 1, min(len(files), LOOKED_FILES), dtype=int)]
        for name in some:
            yield from islice(self._of_file(name, 0), LOOKED_ROWS)

    def _from(self, epoch: int, first: int) -> Iterator[Row]:
        """The rows of an epoch from number `first` on."""
        files, order = self._dataset.files, self._order(epoch)
        ends = list(accumulate(files[index][1] for index in order))
        at = bisect_right(ends, first)
        skipped = first - (ends[at - 1] if at else 0)
        for index in order[at:]:
            yield from self._of_file(files[index][0], skipped)
            skipped = 0

    def _of_file(self, name: str, skipped: int) -> Iterator[Row]:
        with reading(Path(name)), opened(self._dataset.system, name) as content:
            file = pq.ParquetFile(content, pre_buffer=False)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skipped >= rows:
                    skipped -= rows
                    continue
                for batch in file.iter_batches(READ, row_groups=[group], columns=list(self._dataset.columns)):
                    for row in range(skipped, len(batch)):
                        yield self._row(batch, row, name)
                    skipped = max(0, skipped - len(batch))

    def _row(self, batch: pa.RecordBatch, row: int, name: str) -> Row:
        held = {column: batch.column(column)[row].values for column in self._dataset.columns}
        for column, each in held.items():
            if each is None or each.null_count:
                raise UserError(f"'{name}' has a row with empty places in '{column}'")
        found = {column: np.array(each) for column, each in held.items()}
        for column in (COLUMN, LABELS):
            if column in found and len(found[column]) != self._dataset.sequence_length:
                raise UserError(
                    f"'{name}' has a row with {len(found[column])} {column}; those of the first row are "
                    f"{self._dataset.sequence_length}"
                )
            if column in found and self._vocabulary is not None:
                _check_ids(found[column], column, self._vocabulary, name)
        documents = self._dataset.documents
        if documents is not None:
            values = found.pop(documents)
            length = self._dataset.sequence_length
            found[DOCUMENT_STARTS] = document_starts(documents, values, [len(values)], length, f"'{name}'")
        return found


def _check_ids(ids: Any, column: str, vocabulary: int, name: str) -> None:
    """Raises UserError where a row of a file has an id that the model does not know. Footers may not tell of it."""
    unknown = (ids < 0) | (ids >= vocabulary)
    if column == LABELS:
        unknown &= ids != IGNORED
    if unknown.any():
        other = f", and {IGNORED} where nothing is learned" if column == LABELS else ""
        raise UserError(
            f"'{name}' has a row with the id {ids[unknown][0]} in '{column}', and the model knows those from 0 to "
            f"{vocabulary - 1}{other}; prepare it with the model's own tokenizer"
        )
