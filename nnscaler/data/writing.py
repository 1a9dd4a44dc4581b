"""Writing packed rows to where a user wants them: a directory, or what is behind a URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnscaler.data.files import is_url
from nnscaler.data.shards import ShardWriter
from nnscaler.data.sources import Corpus
from nnscaler.data.written import ArrowWriter, RowWriter
from nnscaler.directory import new_directory


@contextmanager
def writing(
    target: Path | str, corpus: Corpus, length: int, labels: bool, provenance: dict[str, Any]
) -> Iterator[RowWriter]:
    """A writer of rows of `length` tokens, made of a corpus.

    target      a new directory, which appears only when it is complete; or a URL, behind which it grows
    labels      whether rows have a column of labels
    provenance  of what they are made, and how

    Raises UserError where the target is in use, or cannot be written.
    """
    if is_url(str(target)):
        with ShardWriter(str(target), corpus, length, labels, provenance) as shards:
            yield shards
    else:
        with new_directory(Path(target)) as directory, ArrowWriter(directory, length, labels) as writer:
            yield writer
