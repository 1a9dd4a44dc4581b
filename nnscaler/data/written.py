"""Packed rows on disk: the files of a dataset that `datasets.load_from_disk` loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from nnscaler.data.files import COLUMN, DATA_FILE, DOCUMENT_STARTS, LABELS, PROVENANCE

Ids = np.ndarray[Any, np.dtype[np.int32]]


class RowWriter:
    """Writes rows of `length` tokens into a directory; `describe` makes it a dataset.

    labels  whether rows have a column of labels
    """

    def __init__(self, directory: Path, length: int, labels: bool = False) -> None:
        ids, places = datasets.List(datasets.Value("int32"), length=length), datasets.List(datasets.Value("int32"))
        self._features = datasets.Features({COLUMN: ids, **({LABELS: ids} if labels else {}), DOCUMENT_STARTS: places})
        self._directory, self._length, self._schema = directory, length, self._features.arrow_schema
        self._digest = hashlib.sha256(str(self._schema).encode())
        self.rows = 0
        self.continued = 0  # rows that begin within a document
        self.smallest_id: int | None = None
        self.largest_id: int | None = None

    def __enter__(self) -> RowWriter:
        self._file = pa.OSFile(str(self._directory / DATA_FILE), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
        self._file.close()

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
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        for each in (ids, labels, starts):
            if each is not None:
                self._digest.update(each.tobytes())
        self.rows += len(begins) - 1
        self.continued += len(begins) - 1 - int(np.count_nonzero(starts % self._length == 0))
        smallest, largest = int(ids.min()), int(ids.max())
        self.smallest_id = min(smallest, smallest if self.smallest_id is None else self.smallest_id)
        self.largest_id = max(largest, largest if self.largest_id is None else self.largest_id)

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
