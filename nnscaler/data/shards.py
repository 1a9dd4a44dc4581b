"""Packed rows behind a URL, in files of Parquet that training reads a little at a time.

A note behind the URL says how far the dataset is written. It is made anew after a file of the corpus, if enough was
written since the last. A run that is interrupted goes on there: it writes once more the shards that were begun later,
and the rows are those of a run that was not interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nnscaler import hub
from nnscaler.data.files import PROVENANCE, UNFINISHED
from nnscaler.data.remote import located
from nnscaler.data.sources import Corpus
from nnscaler.data.written import RowWriter
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

SHARD = 1 << 26  # tokens of a file, about
NOTED = SHARD // 4  # tokens after which a note is made anew
COUNTED = ("rows", "continued", "smallest_id", "largest_id")


class ShardWriter(RowWriter):
    """Writes rows that are made of a corpus. Raises UserError where another dataset is behind the URL."""

    def __init__(self, url: str, corpus: Corpus, length: int, labels: bool, provenance: dict[str, Any]) -> None:
        super().__init__(length, labels)
        self._url = url
        files = [str(path) for path in corpus.files]
        self._about = json.loads(json.dumps({"files": files, "length": length, "labels": labels, **provenance}))
        self._done = 0  # files of the corpus
        self._shards = 0  # begun so far
        self._tokens, self._since = 0, 0  # in the last shard; since the last note
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None
        with self._written():
            self._system, self._root = located(url)
            self._system.makedirs(self._root, exist_ok=True)
            self._begin()

    def _begin(self) -> None:
        """Goes on where an earlier run was interrupted, or begins."""
        names = [name.rpartition("/")[2] for name in self._system.find(self._root)]
        notes = sorted(name for name in names if name.startswith(UNFINISHED))
        if names and not notes:
            raise UserError(f"{self._url} already exists and is not empty: remove it or choose another place")
        note = next(filter(None, map(self._read, reversed(notes))), None)
        if note is not None:
            if note["about"] != self._about:
                raise UserError(f"{self._url} holds what another command began: remove it or choose another place")
            self._done, self._shards, self.kept = note["done"], note["shards"], note["kept"]
            for one in COUNTED:
                setattr(self, one, note[one])
            logger.info("%s: going on after %d of %d files", self._url, self._done, len(self._about["files"]))
        else:
            self._note()

    def _read(self, name: str) -> dict[str, Any] | None:
        """A note; None: it was cut off while it was written."""
        with suppress(ValueError):
            note: dict[str, Any] = json.loads(self._system.cat_file(f"{self._root}/{name}"))
            return note
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(Exception):  # of several errors, the first is the one to tell
            self._close_shard()

    def parts(self, corpus: Corpus) -> Iterable[Corpus]:
        return islice(corpus.each_file(), self._done, None)

    def keep(self, kept: dict[str, Any]) -> None:
        super().keep(kept)
        self._done += 1
        if self._since >= NOTED:
            with self._written():
                self._close_shard()
                self._note()

    def _put(self, batch: pa.RecordBatch) -> None:
        with self._written():
            if self._writer is None:
                self._file = self._system.open(f"{self._root}/{_shard(self._shards)}", "wb")
                self._writer = pq.ParquetWriter(self._file, self._schema)
                self._shards += 1
            self._writer.write_batch(batch)
            self._tokens += batch.num_rows * self._length
            self._since += batch.num_rows * self._length
            if self._tokens >= SHARD:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
        self._writer, self._tokens = None, 0

    def _note(self) -> None:
        """Notes how far the dataset is written. The notes before are removed."""
        note = {"about": self._about, "done": self._done, "shards": self._shards, "kept": self.kept}
        note |= {one: getattr(self, one) for one in COUNTED}
        name = f"{self._root}/{UNFINISHED}{self._shards:05d}.json"
        self._system.pipe_file(name, json.dumps(note).encode())
        self._forget(self._shards)
        self._since = 0

    def _forget(self, shards: int) -> None:
        """Removes the notes of less shards than these."""
        for name in self._system.glob(f"{self._root}/{UNFINISHED}*"):
            if name.rpartition("/")[2] < f"{UNFINISHED}{shards:05d}":
                self._system.rm(name)

    def describe(self, provenance: dict[str, Any]) -> None:
        with self._written():
            self._close_shard()
            self._system.pipe_file(f"{self._root}/{PROVENANCE}", (json.dumps(provenance, indent=2) + "\n").encode())
            self._forget(self._shards + 1)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Inside, whatever goes wrong becomes a UserError that names the URL."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # libraries of networks raise whatever they may
            raise UserError(f"cannot write {self._url}: {hub.first_line(error)}") from error


def _shard(number: int) -> str:
    return f"data-{number:05d}.parquet"
