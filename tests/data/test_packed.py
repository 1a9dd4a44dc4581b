"""Packed datasets as they are opened: all of their parts are looked at, whatever types their columns have."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tqdm

from nnscaler.data import packed
from nnscaler.data.mixture import Mixture, open_dataset
from nnscaler.data.packed import PackedDataset, marks_in
from nnscaler.errors import UserError


def saved(folder: Path, **columns: Any) -> PackedDataset:
    """In parts of two rows, of which each is looked at by itself."""
    parts = [
        datasets.Dataset(pa.table({name: values[at : at + 2] for name, values in columns.items()}))
        for at in _twos(columns)
    ]
    datasets.concatenate_datasets(parts).save_to_disk(str(folder))
    return PackedDataset.open(folder)


def _twos(columns: dict[str, Any]) -> range:
    return range(0, len(next(iter(columns.values()))), 2)


IDS = [[1, 2, 3]] * 5


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [*IDS[:4], [1, 2]]}, "whose rows have from 2 to 3 tokens, and must have one length"),
        ({"input_ids": pa.array([[]] * 5, pa.list_(pa.int32()))}, "whose rows have no tokens in 'input_ids'; make one"),
        ({"input_ids": [*IDS[:4], [1, None, 3]]}, "whose column 'input_ids' has empty places"),
        ({"input_ids": [*IDS[:4], None]}, "whose column 'input_ids' has empty places"),
        ({"input_ids": IDS, "labels": [*IDS[:4], [1, 2]]}, "whose rows have from 2 to 3 tokens"),
        ({"input_ids": IDS, "labels": [[0.5]] * 5}, "whose column 'labels' holds list<.*double>, not lists of whole"),
        ({"input_ids": IDS, "position_ids": [*IDS[:4], [None, 1, 2]]}, "whose column 'position_ids' has empty places"),
        ({"input_ids": IDS, "attention_mask": [*[[1, 1, 1]] * 4, [0, 0, 0]]}, "whose column 'attention_mask' training"),
        ({"input_ids": IDS, "loss_mask": [1, 1, 1, 1, 0]}, "whose column 'loss_mask' training does not read"),
        (
            {"input_ids": IDS, "completion_mask": [[0, 1, 1]] * 5},
            "whose column 'completion_mask' training does",
        ),
    ],
)
def test_what_is_wrong_in_the_last_part_is_seen(tmp_path, monkeypatch, columns, said):
    monkeypatch.setattr(packed, "SCANNED", 6)
    with pytest.raises(UserError, match=f"^dataset_path is '{tmp_path}', {said}"):
        saved(tmp_path, **columns)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int16()), pa.list_(pa.uint32(), 3)])
@pytest.mark.parametrize("scanned", [6, 2])  # two rows at a time; and one, where it is less than a row
def test_lists_of_every_kind_are_rows(tmp_path, monkeypatch, kind, scanned):
    monkeypatch.setattr(packed, "SCANNED", scanned)
    ids = [[7, 1, 2], [3, 4, 5], [0, 9, 1], [1, 1, 1], [6, 2, 2]]
    positions = [[0, 1, 2], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 2]]
    columns = {"input_ids": pa.array(ids, kind), "position_ids": pa.array(positions, kind)}
    dataset = saved(tmp_path, **columns, attention_mask=[[1, 1, 1]] * 5)
    assert (len(dataset), dataset.sequence_length, dataset.documents) == (5, 3, "position_ids")
    assert dataset.token_ids() == (0, 9)
    assert [dataset.row(number)["input_ids"].tolist() for number in range(5)] == ids
    assert [dataset.row(number)["document_starts"].tolist() for number in range(5)] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 2],
        [0],
    ]
    lengths = dataset.document_lengths
    assert (lengths.documents, lengths.longest, lengths.cut, lengths.of_token) == (9, 3, 0, (9 + 5 + 5 + 3 + 9) / 15)


def test_where_ids_are_that_the_model_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SCANNED", 6)
    ids = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 9], [30, 1, 1]]
    dataset = saved(tmp_path, input_ids=ids, labels=[[-100, 2, 3], *[[-100, 2, 40]] * 4])
    assert dataset.token_ids() == (1, 40)
    assert [dataset.place_outside(vocabulary) for vocabulary in (9, 10, 30, 31)] == [
        "the first other one is in row 2", "the first other one is in row 4", "the first other one is in row 4",
        "the first other one is among its labels",
    ]  # fmt: skip


def test_how_far_ids_are_looked_at_is_shown_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SCANNED", 6)
    shown = []

    class Bar(nullcontext):
        def __init__(self, total, unit, **_):
            super().__init__(self)
            shown.append((total, unit))

        def update(self, rows):
            shown.append(rows)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert saved(tmp_path, input_ids=IDS).token_ids() == (1, 3)
    assert shown == [(5, "row"), 2, 2, 1]


def test_a_dataset_without_rows(tmp_path):
    rows = datasets.Dataset(pa.table({"input_ids": pa.array([[1]], pa.list_(pa.int32()))}))
    rows.filter(lambda row: False).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="which is empty"):
        PackedDataset.open(tmp_path)


def test_labels_alone_may_have_the_smallest_id(tmp_path):
    assert saved(tmp_path, input_ids=[[5, 6], [7, 8]], labels=[[-100, 6], [-100, 2]]).token_ids() == (2, 8)


@pytest.mark.parametrize("name", ["packing.json", "token_ids.json"])
@pytest.mark.parametrize("note", ["", "[]", "{}", '{"smallest_id": null, "largest_id": 7}', '{"fingerprint": "x"}'])
def test_notes_that_do_not_tell_are_passed_over(tmp_path, name, note):
    dataset = saved(tmp_path, input_ids=[[5, 6], [7, 8]])
    (tmp_path / name).write_text(note)
    assert dataset.token_ids() == (5, 8)
    assert json.loads((tmp_path / "token_ids.json").read_text())["largest_id"] == 8, "it is noted anew"
    assert dataset.marks() == {}


@pytest.mark.parametrize(
    ("noted", "marks"),
    [
        (b'{"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 9}', {"bos": 0, "eos": 3}),
        (b'{"bos_token_id": null, "eos_token_id": 3}', {"eos": 3}),
        (b'{"eos_token_id": "3"}', {}),
        (b"[]", {}),
        (b'{"bos_', {}),
        (b"\xff", {}),
    ],
)
def test_marks_are_what_is_noted(tmp_path, noted, marks):
    assert marks_in(noted) == marks
    dataset = saved(tmp_path, input_ids=[[5, 6], [7, 8]])
    (tmp_path / "packing.json").write_bytes(noted)
    assert dataset.marks() == marks


def test_each_kind_of_dataset_is_opened_under_the_flag_s_name(tmp_path):
    saved(tmp_path / "saved", input_ids=IDS)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), tmp_path / "deep" / "er" / "a.parquet")
    for path, length in {"saved": 3, "deep": 2, "deep/er/a.parquet": 2}.items():
        assert open_dataset(str(tmp_path / path)).sequence_length == length
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "deep" / "er" / "a.parquet")
    (tmp_path / "saved" / "state.json").write_text("{")
    (tmp_path / "empty").mkdir()
    said = {"saved": ", which is empty or damaged", "empty": ", which is not a dataset", "no": ", which does not exist"}
    for path, words in said.items():
        with pytest.raises(UserError, match=f"^eval_dataset_path is '{tmp_path}/{path}'{words}"):
            open_dataset(str(tmp_path / path), "eval_dataset_path")
    with pytest.raises(UserError, match=r"^eval_dataset_path is 'nowhere://x', which cannot be read"):
        open_dataset("nowhere://x", "eval_dataset_path")
    parts = [PackedDataset([[0]] * rows, 3 - rows, tmp_path / str(rows)) for rows in (1, 2)]
    with pytest.raises(
        UserError, match=f"^x is '{tmp_path}/2', whose sequences have 1 token, .* '{tmp_path}/1' have 2"
    ):
        Mixture.of(parts, [1, 1], "x")


def test_what_a_mixture_says_of_its_parts(tmp_path):
    parts = [PackedDataset([[0]] * rows, 2, tmp_path / name) for name, rows in {"a": 3, "b": 5, "c": 2}.items()]
    mixture = Mixture.of(parts, [0.5, 0.125, 0.375], "dataset_path")
    assert (len(mixture), mixture.sequence_length) == (10, 2)
    assert mixture.path == f"{tmp_path}/a, {tmp_path}/b, {tmp_path}/c"
    assert mixture.described() == {"a": [3, 32768], "b": [5, 8192], "c": [2, 24576]}
    assert mixture.seen(7, 0) == [0, 0, 0]
    half = mixture.seen(7, 32768)
    assert sum(half) == 32768
    assert mixture.seen(7, 2 * 65536 + 32768) != [2 * share + count for share, count in zip(mixture.shares, half)], (
        "each block has an order of its own"
    )
    assert sum(mixture.seen(7, 2 * 65536 + 32768)) == 2 * 65536 + 32768
