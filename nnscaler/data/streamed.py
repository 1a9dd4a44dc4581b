"""Rows of tokens in Parquet files, here or behind a URL, read a little at a time: a dataset may exceed the disk.

An epoch lays all files end to end, in an order of its own, and divides their rows into LANES runs. Samples come from
the lanes in turn, and within a lane from one block of rows after the other, each in an order of its own. Which row is
which sample follows from the seed, and from how many rows the files' footers tell of. So a run goes on at any sample at
once, on any number of devices, and replicas whose number divides LANES read different rows. (The shuffled streams of
`datasets` leave out on resume what their buffers held.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nnscaler import hub
from nnscaler.data.documents import COLUMNS as DOCUMENT_COLUMNS
from nnscaler.data.documents import DocumentLengths, document_starts, not_said, padding_starts
from nnscaler.data.files import COLUMN, DOCUMENT_STARTS, LABELS, PROVENANCE, UNFINISHED
from nnscaler.data.packed import IGNORED, Row, TokenIds, marks_in
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
    ids        the smallest and the largest token id, if the footers tell
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
            schema = found[0][1].schema.to_arrow_schema()
            columns = [field.name for field in schema if pa.types.is_nested(field.type)]
            if COLUMN not in columns:
                raise UserError(f"{flag} is '{path}', whose rows have no column '{COLUMN}'")
            with reading(Path(found[0][0])), opened(system, found[0][0]) as file:
                first = next(pq.ParquetFile(file).iter_batches(1, columns=[COLUMN])).column(0)[0]
            length = len(first)
        except UserError:
            raise
        except (OSError, ValueError, ImportError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{flag} is '{path}', which cannot be read: {hub.first_line(error)}") from error
        documents = next((name for name in DOCUMENT_COLUMNS if name in columns), None)
        return StreamedDataset(
            path, system, tuple((name, footer.num_rows) for name, footer in found),
            tuple(name for name in (COLUMN, LABELS, documents) if name is not None and name in columns), length,
            _ids([footer for _, footer in found]), documents,
        )  # fmt: skip

    def __len__(self) -> int:
        return sum(rows for _, rows in self.files)

    @property
    def parts(self) -> tuple[StreamedDataset, ...]:
        return (self,)

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
        rows = list(_Lane(self, 0, 0).first_rows())
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
        """The smallest and the largest id, as the footers tell."""
        return self.ids

    def marks(self) -> dict[str, int]:
        """As `PackedDataset.marks`."""
        with suppress(OSError, ValueError):
            return marks_in(self.system.cat_file(f"{located(self.path)[1]}/{PROVENANCE}"))
        return {}

    def first_row_outside(self, vocabulary: int) -> int | None:
        return None


def _footer(system: Any, name: str) -> pq.FileMetaData:
    with reading(Path(name)), opened(system, name) as file:
        return pq.ParquetFile(file).metadata


def _ids(footers: list[pq.FileMetaData]) -> TokenIds:
    """The smallest and the largest of `input_ids`, by the statistics of all row groups; 0 where there are none."""
    found = [
        column.statistics
        for footer in footers
        for group in map(footer.row_group, range(footer.num_row_groups))
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.split(".")[0] == COLUMN and column.statistics is not None
    ]
    known = [one for one in found if one.has_min_max]
    return TokenIds(min((one.min for one in known), default=0), max((one.max for one in known), default=0))


class Streaming:
    """The samples of a streamed dataset in the order of a seed, epoch after epoch, without end.

    part  the place of the dataset in a mixture
    """

    def __init__(self, dataset: StreamedDataset, seed: int, part: int = 0) -> None:
        self._dataset, self._seed, self._part, self._rows = dataset, seed, part, len(dataset)
        row_bytes = 4 * dataset.sequence_length * len(dataset.columns)
        self._block = max(1, min(MOST_ROWS, BUFFER // row_bytes))
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
        reader = self._lanes.setdefault(lane, _Lane(self._dataset, self._seed, self._part))
        return reader.rows(epoch, first, last)[int(order[within])]


class _Lane:
    """Reads one block of rows after the other, and keeps the last one."""

    def __init__(self, dataset: StreamedDataset, seed: int, part: int) -> None:
        self._dataset, self._seed, self._part = dataset, seed, part
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
        files = self._dataset.files
        order = np.random.default_rng((self._seed, epoch, self._part, _FILES)).permutation(len(files))
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
        found = {column: np.array(batch.column(column)[row].values) for column in self._dataset.columns}
        for column in (COLUMN, LABELS):
            if column in found and len(found[column]) != self._dataset.sequence_length:
                raise UserError(
                    f"'{name}' has a row with {len(found[column])} {column}; those of the first row are "
                    f"{self._dataset.sequence_length}"
                )
        documents = self._dataset.documents
        if documents is not None:
            values = found.pop(documents)
            found[DOCUMENT_STARTS] = document_starts(documents, values, [len(values)], self._dataset.sequence_length)
        return found
