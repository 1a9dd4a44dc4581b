"""Packed rows as they are written; and the writer of one file, which `datasets.load_from_disk` loads."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa

from nnscaler.data.files import COLUMN, DATA_FILE, DOCUMENT_STARTS, LABELS, PROVENANCE
from nnscaler.data.sources import Corpus

Ids = np.ndarray[Any, np.dtype[np.int32]]
Writer = TypeVar("Writer", bound="RowWriter")


class RowWriter(ABC):
    """Writes rows of `length` tokens; `describe` completes the dataset.

    rows                     how many are written
    continued                of these, how many begin within a document
    smallest_id, largest_id  in them; None: there are no rows
    kept                     what an earlier run, which this one continues, had kept; empty: there is none
    """

    def __init__(self, length: int, labels: bool) -> None:
        ids, places = datasets.List(datasets.Value("int32"), length=length), datasets.List(datasets.Value("int32"))
        self._features = datasets.Features({COLUMN: ids, **({LABELS: ids} if labels else {}), DOCUMENT_STARTS: places})
        self._length, self._schema = length, self._features.arrow_schema
        self.rows = 0
        self.continued = 0
        self.smallest_id: int | None = None
        self.largest_id: int | None = None
        self.kept: dict[str, Any] = {}

    def __enter__(self: Writer) -> Writer:
        return self

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes what is open."""

    def parts(self, corpus: Corpus) -> Iterable[Corpus]:
        """What is still to be read of a corpus, in parts; `keep` is to be called after each."""
        return [corpus]

    def keep(self, kept: dict[str, Any]) -> None:
        """After a part: what a later run is to know, were this one interrupted."""
        self.kept = kept

    def write(self, ids: Ids, starts: Ids, labels: Ids | None = None) -> None:
        """Writes rows that are laid end to end: ids and labels [rows * length], and the places, rising, at which
        documents begin."""
        begins = np.arange(0, len(ids) + 1, self._length)
        offsets = np.searchsorted(starts, begins).astype(np.int32)  # of each row's first document in `starts`
        columns = [
            *(
                pa.FixedSizeListArray.from_arrays(pa.array(each), self._length)
                for each in (ids, labels)
                if each is not None
            ),
            pa.ListArray.from_arrays(offsets, pa.array(starts % np.int32(self._length))),
        ]
        self._put(pa.record_batch(columns, schema=self._schema))
        self.rows += len(begins) - 1
        self.continued += len(begins) - 1 - int(np.count_nonzero(starts % self._length == 0))
        smallest, largest = int(ids.min()), int(ids.max())
        self.smallest_id = min(smallest, smallest if self.smallest_id is None else self.smallest_id)
        self.largest_id = max(largest, largest if self.largest_id is None else self.largest_id)

    @abstractmethod
    def _put(self, batch: pa.RecordBatch) -> None:
        """Writes some rows."""

    @abstractmethod
    def describe(self, provenance: dict[str, Any]) -> None:
        """Writes `packing.json` and whatever else makes the dataset complete."""


class ArrowWriter(RowWriter):
    """Writes one file of Arrow into a directory."""

    def __init__(self, directory: Path, length: int, labels: bool = False) -> None:
        super().__init__(length, labels)
        self._directory = directory
        self._digest = hashlib.sha256(str(self._schema).encode())

    def __enter__(self) -> ArrowWriter:
        self._file = pa.OSFile(str(self._directory / DATA_FILE), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
        self._file.close()

    def write(self, ids: Ids, starts: Ids, labels: Ids | None = None) -> None:
        super().write(ids, starts, labels)
        for each in (ids, labels, starts):
            if each is not None:
                self._digest.update(each.tobytes())

    def _put(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def describe(self, provenance: dict[str, Any]) -> None:
        """Writes the files that make the directory a Hugging Face dataset, and `packing.json`."""
        datasets.DatasetInfo(features=self._features).write_to_directory(str(self._directory))
        state: dict[str, Any] = {
            "_data_files": [{"filename": DATA_FILE}],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_split": "train",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
        }
        for name, content in (("state.json", state), (PROVENANCE, provenance)):
            (self._directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
