"""Documents in packed rows: where they begin, how long they are, and what keeps them apart in a batch.

A row consists of documents, and perhaps of padding behind them, which begins where another document would. Where a row
begins with the rest of a document of the row before, that rest counts as a document of its own: it does not see what
came before, and its positions begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnscaler.counting import counted
from nnscaler.data.files import DOCUMENT_STARTS
from nnscaler.errors import UserError

POSITIONS, DOCUMENTS = "position_ids", "documents"  # inputs of a model
# By what rows may say where documents begin, the first that is there: the places themselves, as bookcorpus.py writes
# them; positions, which start anew; numbers of documents, which change; or documents' lengths.
LENGTHS = ("seq_lengths", "seq_lens")
COLUMNS = (DOCUMENT_STARTS, POSITIONS, "seq_idx", "document_ids", "segment_ids", *LENGTHS)

Places = np.ndarray[Any, np.dtype[np.int64]]


def document_starts(column: str, values: Any, counts: Any, length: int, dataset: object = "the dataset") -> Places:
    """The places at which documents begin, rising, in rows of `length` tokens that are laid end to end.

    values   of the column, row after row
    counts   how many of them each row has
    column   what the values are; it may say that a row begins with the rest of a document
    dataset  what errors call it

    The first place of such a row is not among the results. Raises UserError for values that are no places, positions,
    numbers or lengths.
    """
    values, counts = np.asarray(values, np.int64), np.asarray(counts, np.int64)
    rows = np.arange(len(counts)) * length

    def check(right: Any, found: Any, what: str) -> None:
        """`right`: for each of what was found, whether it is."""
        if not right.all():
            raise UserError(f"column '{column}' of {dataset} must hold {what}, not {found[~right][0]}")

    if column == DOCUMENT_STARTS:
        found = np.repeat(rows, counts) + values
        rises = np.diff(found, prepend=-1) > 0
        check((values >= 0) & (values < length) & rises, values, f"places from 0 to {length - 1}, which rise")
        return found
    if column in LENGTHS:
        ends, last = (np.concatenate([[0], np.cumsum(each)]) for each in (values, counts))
        sums = np.diff(ends[last])
        check(values > 0, values, "lengths of 1 or more")
        check(sums == length, sums, f"lengths that add up to {length} in each row")
        return ends[:-1]
    check(counts == length, counts, f"one number for each of {length} tokens")
    if column == POSITIONS:
        follows = np.diff(values, prepend=-1) == 1
        follows[rows] = True
        check(follows | (values == 0), values, "positions that rise by one or start anew at 0")
        return np.flatnonzero(values == 0)
    return np.union1d(rows, np.flatnonzero(np.diff(values)) + 1)


def document_inputs(starts: Sequence[Places], length: int) -> dict[str, Tensor]:
    """What a model is given of rows, in which documents begin at `starts`: [b, l] int64 each.

    These are positions, which are counted from 0 in each document; and the number of each token's document in its row.
    """
    begins = torch.zeros(len(starts), length, dtype=torch.bool)
    begins[:, 0] = True
    for row, places in zip(begins, starts):
        row[torch.from_numpy(places)] = True
    tokens = torch.arange(length)
    return {POSITIONS: tokens - (begins * tokens).cummax(1).values, DOCUMENTS: begins.cumsum(1) - 1}


def not_said(dataset: object) -> UserError:
    """What is wrong with a dataset whose documents are to be kept apart, and that does not say where they begin."""
    return UserError(
        f"dataset '{dataset}' does not say where documents begin; make it anew with bookcorpus.py, or give it a column "
        f"{DOCUMENT_STARTS} or {POSITIONS}"
    )


@dataclass(frozen=True)
class DocumentLengths:
    """How long the documents of a dataset are, in tokens, as they are in its rows.

    Attention works on padding too, apart from documents: `of_token` and `positions` count each row's as one more.

    documents  how many there are
    mean       of all documents
    longest    of all documents
    of_token   length of a token's own document, on average over all tokens; the work of attention is in proportion to
               it
    cut        how many documents were longer than a row, and so were cut
    padded     how many rows end in padding
    positions  how many positions a model is to know
    estimated  whether all this is estimated from a part of the dataset
    """

    documents: int
    mean: float
    longest: int
    of_token: float
    cut: int
    padded: int
    positions: int
    estimated: bool = False

    @staticmethod
    def between(starts: Places, padding: Places, rows: int, length: int) -> DocumentLengths:
        """The lengths of documents that begin at `starts`, in rows that are laid end to end. At those of the places
        that are in `padding` too, padding begins."""
        end = [rows * length]
        begins = np.union1d(starts, np.arange(rows) * length)
        every = np.diff(np.concatenate([begins, end]))
        lengths = every[~np.isin(begins, padding)]
        before = np.diff(np.concatenate([starts, end]))
        squares = float(np.square(every.astype(np.float64)).sum())
        return DocumentLengths(
            documents=len(lengths), mean=float(lengths.sum()) / max(1, len(lengths)),
            longest=int(lengths.max(initial=0)), of_token=squares / end[0], cut=int((before > length).sum()),
            padded=len(padding), positions=int(every.max()),
        )  # fmt: skip

    def __str__(self) -> str:
        documents = ("about " if self.estimated else "") + counted(self.documents, "document")
        padded = f"; {self.padded:,} of the rows end in padding" if self.padded else ""
        return (
            f"{documents} of {self.mean:,.0f} tokens on average, {self.longest:,} at most"
            f"{padded}; attention has as much to do as if each had {self.of_token:,.0f}"
        )


def padding_starts(starts: Places, ids: Places, labels: Places, ignored: int) -> Places:
    """Where padding begins in rows that are laid end to end: at the last of a row's documents, if nothing in it is
    learned and all of its tokens are one and the same.

    starts       of documents
    ids, labels  [rows, length], the labels at their tokens' own places; `ignored`: nothing is learned
    """
    rows, length = ids.shape
    ends = np.arange(1, rows + 1) * length
    begins = np.union1d(starts, ends - length)
    alike = np.logical_and.reduceat(((labels == ignored) & (ids == ids[:, -1:])).reshape(-1), begins)
    last = np.searchsorted(begins, ends) - 1
    return begins[last[alike[last]]]
