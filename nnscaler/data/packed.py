"""A dataset of token sequences, and checks before training: what its columns are, and which ids it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from nnscaler.data.documents import COLUMNS as DOCUMENT_COLUMNS
from nnscaler.data.documents import DocumentLengths, Places, document_starts, not_said, padding_starts
from nnscaler.data.files import COLUMN, DOCUMENT_STARTS, LABELS, PROVENANCE, TOKEN_IDS
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that counts for nothing, in a dataset of Hugging Face's conventions
SCANNED = 1 << 22  # ids looked at in one go
# Columns by which others learn something else from the same tokens, and which training does not read.
UNREAD = ("attention_mask", "loss_mask", "assistant_masks", "completion_mask")

Row: TypeAlias = Mapping[str, Any]


class TokenIds(NamedTuple):
    """The smallest and the largest id of a dataset."""

    smallest: int
    largest: int


@dataclass(frozen=True)
class PackedDataset:
    """Token sequences of equal length, as `bookcorpus.py` writes them.

    rows        a `datasets.Dataset` with the column `input_ids`, and `labels` where there are such
    has_labels  whether rows say themselves what is learned: `labels`, as `input_ids` long, are the tokens at their own
                places (a model is to give each at the place before), and -100 where nothing is learned
    documents   column that says where documents begin, see `nnscaler.data.documents`; None: there is none
    """

    rows: Any
    sequence_length: int
    path: Path
    has_labels: bool = False
    documents: str | None = None

    @staticmethod
    def open(path: Path, flag: str = "dataset_path") -> PackedDataset:
        """Raises UserError, which calls the path `flag`, where there is no such dataset, or none of token sequences of
        one length."""
        import datasets  # takes a second, which planning without a dataset need not wait for

        if not path.exists():
            raise _wrong(flag, path, "which does not exist")
        try:
            rows = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged files make the library raise whatever they may
            known = (path / "state.json").exists()
            what = "which is empty or damaged" if known else "which is not a dataset that bookcorpus.py wrote"
            raise _wrong(flag, path, what) from error
        if isinstance(rows, datasets.DatasetDict):
            splits = ", ".join(rows)
            raise UserError(f"{flag} is '{path}', which holds the splits {splits}; give one: {path}/<split>")
        if COLUMN not in rows.column_names or len(rows) == 0:
            raise _wrong(flag, path, f"whose rows have no column '{COLUMN}'" if len(rows) else "which is empty")
        has_labels = LABELS in rows.column_names
        columns = [COLUMN, *([LABELS] if has_labels else [])]
        lengths = {name: _length(rows, name, flag, path) for name in columns}
        if len(set(lengths.values())) > 1:
            raise _wrong(flag, path, f"whose {COLUMN} have {lengths[COLUMN]} tokens and {LABELS} {lengths[LABELS]}")
        for name in UNREAD:
            if name in rows.column_names and not _says_nothing(rows, name, lengths[COLUMN]):
                raise not_read(name, flag, path)
        documents = next(
            (name for name in DOCUMENT_COLUMNS if name in rows.column_names and is_list(rows.data.column(name).type)),
            None,
        )
        if documents is not None:
            _check_lists(rows, documents, flag, path)
        others = sorted({*rows.column_names} - {*columns, documents})
        if others:
            logger.info("%s: columns that training does not read: %s", path, ", ".join(others))
        rows = rows.with_format("numpy", columns=columns)
        return PackedDataset(rows, lengths[COLUMN], path, has_labels, documents)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> tuple[PackedDataset, ...]:
        """The datasets that it is made of, as those of a mixture."""
        return (self,)

    @property
    def asks_for_documents(self) -> bool:
        """Whether a column that bookcorpus.py did not write says that rows hold several documents."""
        if self.documents in (None, DOCUMENT_STARTS):
            return False
        return self.document_lengths.documents + self.document_lengths.padded > len(self)

    def row(self, number: int) -> Row:
        """The columns of a row that training reads, as arrays; `document_starts` is there where a column gives them."""
        row = self.rows[number]
        return row if self.documents is None else {**row, DOCUMENT_STARTS: self.document_starts(number)}

    def document_starts(self, row: int) -> Places:
        """Places in a row at which documents begin, as a column says that there is."""
        assert self.documents is not None
        values = self.rows.data.column(self.documents)[row].values.to_numpy(zero_copy_only=False)
        return document_starts(self.documents, values, [len(values)], self.sequence_length, f"'{self.path}'")

    @cached_property
    def document_lengths(self) -> DocumentLengths:
        """How long documents are; their column is read once, and where rows have labels, these and the ids, which tell
        padding. Raises UserError where there is no such column, or it is something else."""
        if self.documents is None:
            raise not_said(self.path)
        length, before = self.sequence_length, 0
        starts, padding = [], [np.empty(0, np.int64)]
        columns = [self.documents, *([COLUMN, LABELS] if self.has_labels else [])]
        for part, *tokens in zip(*map(self._parts, columns), strict=True):
            counts, values = part.value_lengths().to_numpy(), part.flatten().to_numpy(zero_copy_only=False)
            found = document_starts(self.documents, values, counts, length, f"'{self.path}'")
            starts.append(found + before)
            if tokens:
                ids, labels = (each.flatten().to_numpy().reshape(-1, length) for each in tokens)
                padding.append(padding_starts(found, ids, labels, IGNORED) + before)
            before += len(part) * length
        return DocumentLengths.between(np.concatenate(starts), np.concatenate(padding), len(self), length)

    def token_ids(self) -> TokenIds:
        """The smallest and the largest id, in labels too.

        They are what bookcorpus.py has noted; or the whole dataset is read once, and they are noted beside it, if that
        can be written. Raises UserError where all labels are IGNORED.
        """
        fingerprint = self._fingerprint()
        for name in (PROVENANCE, TOKEN_IDS):
            with suppress(OSError, ValueError, KeyError, TypeError):
                noted = json.loads((self.path / name).read_text())
                if name == PROVENANCE or noted["fingerprint"] == fingerprint:
                    return TokenIds(int(noted["smallest_id"]), int(noted["largest_id"]))
        found = self._scan()
        note = {"fingerprint": fingerprint, "smallest_id": found.smallest, "largest_id": found.largest}
        with suppress(OSError):
            (self.path / TOKEN_IDS).write_text(json.dumps(note) + "\n")
        return found

    def marks(self) -> dict[str, int]:
        """The ids of "bos" and "eos" around each document, as far as bookcorpus.py has noted them."""
        with suppress(OSError):
            return marks_in((self.path / PROVENANCE).read_bytes())
        return {}

    def _fingerprint(self) -> str:
        """The name that `datasets` gives to the content."""
        return str(json.loads((self.path / "state.json").read_text())["_fingerprint"])

    def place_outside(self, vocabulary: int) -> str:
        """Where the first id below 0, or of `vocabulary` or more, is: there is one."""
        import pyarrow.compute as pc

        row = 0
        for part in self._parts(COLUMN):
            ids = part.flatten()
            outside = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, vocabulary))
            at = pc.index(outside, True).as_py()
            if at >= 0:
                return f"the first other one is in row {row + int(at) // self.sequence_length}"
            row += len(part)
        return "the first other one is among its labels"

    def _scan(self) -> TokenIds:
        import pyarrow.compute as pc
        from tqdm import tqdm

        smallest, largest = [], []
        with tqdm(total=len(self), desc="looking at token ids", unit="row", delay=2, dynamic_ncols=True) as bar:
            for part in self._parts(COLUMN):
                found = pc.min_max(part.flatten()).as_py()
                smallest.append(found["min"])
                largest.append(found["max"])
                bar.update(len(part))
        tokens = len(largest)
        for part in self._parts(LABELS) if self.has_labels else ():
            labels = part.flatten()
            found = pc.min_max(labels.filter(pc.not_equal(labels, IGNORED))).as_py()
            if found["min"] is not None:
                smallest.append(found["min"])
                largest.append(found["max"])
        if self.has_labels and len(largest) == tokens:
            raise nothing_learned(self.path)
        return TokenIds(min(smallest), max(largest))

    def _parts(self, column: str) -> Any:
        return _parts(self.rows, column, max(1, SCANNED // self.sequence_length))


def marks_in(noted: bytes) -> dict[str, int]:
    """The ids of "bos" and "eos" around each document, as far as `packing.json` tells."""
    with suppress(ValueError, AttributeError):
        found = json.loads(noted)
        ids = {name: found.get(f"{name}_token_id") for name in ("bos", "eos")}
        return {name: id_ for name, id_ in ids.items() if isinstance(id_, int)}
    return {}


def not_read(column: str, flag: str, path: Path | str) -> UserError:
    """What is wrong with a column that says something else than `labels` of what is learned."""
    return UserError(
        f"{flag} is '{path}', whose column '{column}' training does not read; remove it (remove_columns), and say in "
        f"'{LABELS}' with {IGNORED} which tokens are not learned"
    )


def nothing_learned(path: Path | str) -> UserError:
    """What is wrong with a dataset whose labels are all IGNORED."""
    return UserError(f"dataset '{path}' has {LABELS}, and all of them are {IGNORED}: nothing would be learned")


def _wrong(flag: str, path: Path, what: str) -> UserError:
    return UserError(f"{flag} is '{path}', {what}; make one with bookcorpus.py")


def _parts(rows: Any, column: str, most: int) -> Any:
    """A column's Arrow arrays, of at most so many rows each. What is saved to disk has no other order than this."""
    for chunk in rows.data.column(column).chunks:
        for start in range(0, len(chunk), most):
            yield chunk.slice(start, most)


def _check_lists(rows: Any, column: str, flag: str, path: Path) -> None:
    """Raises UserError where rows are not lists of whole numbers."""
    kind = rows.data.column(column).type
    if not are_numbers(kind):
        raise _wrong(flag, path, f"whose column '{column}' holds {kind}, not lists of whole numbers")
    if any(part.null_count or part.flatten().null_count for part in _parts(rows, column, SCANNED)):
        raise _wrong(flag, path, f"whose column '{column}' has empty places")


def is_list(kind: Any) -> bool:
    """Whether a type of Arrow's is a list."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def are_numbers(kind: Any) -> bool:
    """Whether a type of Arrow's is a list of whole numbers."""
    import pyarrow as pa

    return is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def _length(rows: Any, column: str, flag: str, path: Path) -> int:
    """The number of tokens of every row. Raises UserError where rows are not lists of whole numbers, or not of one
    length."""
    import pyarrow.compute as pc

    _check_lists(rows, column, flag, path)
    lengths = set()
    for part in _parts(rows, column, SCANNED):
        found = pc.min_max(pc.list_value_length(part)).as_py()
        lengths |= {found["min"], found["max"]}
    if len(lengths) > 1:
        raise _wrong(
            flag, path, f"whose rows have from {min(lengths)} to {max(lengths)} tokens, and must have one length"
        )
    length = int(lengths.pop())
    if not length:
        raise _wrong(flag, path, f"whose rows have no tokens in '{column}'")
    return length


def _says_nothing(rows: Any, column: str, length: int) -> bool:
    """Whether a column has the same value for every token."""
    import pyarrow as pa

    seen = set()
    for part in _parts(rows, column, max(1, SCANNED // length)):
        values = (part.flatten() if pa.types.is_nested(part.type) else part).to_numpy(zero_copy_only=False)
        seen |= set(np.unique(values)[:2].tolist())
    return len(seen) == 1
