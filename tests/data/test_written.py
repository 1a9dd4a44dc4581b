"""Rows as they are written into one file, and what is counted of them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from nnscaler.data.written import ArrowWriter


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def written(folder: Path, *parts: tuple[list[int], list[int], list[int] | None], length: int = 3) -> ArrowWriter:
    """Each part: ids, where documents begin, and labels or None."""
    folder.mkdir()
    with ArrowWriter(folder, length, parts[0][2] is not None) as writer:
        for ids, starts, labels in parts:
            writer.write(ints(ids), ints(starts), None if labels is None else ints(labels))
    writer.describe({"made": "of this"})
    return writer


def test_what_is_written_in_parts_is_one_dataset(tmp_path):
    """A row that begins within a document has no start at 0; ids of all parts count."""
    first = ([5, 6, 7, 8, 9, 4], [0, 2, 5], [5, -100, 7, 8, -100, 4])
    second = ([2, 99, 5], [], [2, 99, 5])
    writer = written(tmp_path / "out", first, second, ([3, 6, 6], [0], [-100] * 3))
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset.to_dict() == {
        "input_ids": [[5, 6, 7], [8, 9, 4], [2, 99, 5], [3, 6, 6]],
        "labels": [[5, -100, 7], [8, -100, 4], [2, 99, 5], [-100] * 3],
        "document_starts": [[0, 2], [2], [], [0]],
    }
    assert (writer.rows, writer.continued, writer.smallest_id, writer.largest_id) == (4, 2, 2, 99)
    assert dataset.split == "train"
    assert (tmp_path / "out" / "packing.json").read_text() == '{\n  "made": "of this"\n}\n'
    assert str(dataset.features["input_ids"].feature.dtype) == "int32"


def test_of_no_rows_there_is_no_id(tmp_path):
    with ArrowWriter(tmp_path, 3) as writer:
        assert (writer.rows, writer.continued, writer.smallest_id, writer.largest_id) == (0, 0, None, None)
        writer.keep({"a": 1})
        assert writer.kept == {"a": 1}
        assert writer.parts("all of it") == ["all of it"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "starts", "labels", "length"),
    [([1, 2, 3, 9], [0, 2], None, 2), ([1, 2, 3, 4], [0, 3], None, 2), ([1, 2, 3, 4], [0, 2], None, 4),
     ([1, 2, 3, 4], [0, 2], [1, 2, 3, 4], 2), ([1, 2, 3, 4], [0, 2], [1, 2, 3, -100], 2)],
)  # fmt: skip
def test_other_content_has_another_name(tmp_path, ids, starts, labels, length):
    """By which what was found out about it is known again: also where rows are as many, and of the same tokens."""
    names = set()
    for number, (part, size) in enumerate(
        [(([1, 2, 3, 4], [0, 2], None), 2), ((ids, starts, labels), length), (([1, 2, 3, 4], [0, 2], [1] * 4), 2)]
    ):
        for again in range(2):
            folder = tmp_path / f"{number}{again}"
            written(folder, part, length=size)
            names.add(json.loads((folder / "state.json").read_text())["_fingerprint"])
        assert len(names) == number + 1
