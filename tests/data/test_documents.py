"""Where documents begin in rows, by whatever column says so, and what a batch is made of them."""

from __future__ import annotations

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnscaler.data.documents import DocumentLengths, document_inputs, document_starts
from nnscaler.data.mixture import Mixture
from nnscaler.data.packed import PackedDataset
from nnscaler.data.training import Batch, Batches, Share, Shuffled
from nnscaler.errors import UserError

LENGTH = 6
lengths_of_rows = st.lists(
    st.lists(st.integers(1, LENGTH), min_size=1, max_size=LENGTH).filter(lambda row: sum(row) >= LENGTH), min_size=1
)


def columns_of(rows: list[list[int]]) -> dict[str, list[list[int]]]:
    """What each kind of column says of rows whose documents have these lengths; the last of a row is cut."""
    starts = [np.cumsum([0, *row[:-1]]) for row in rows]
    starts = [row[row < LENGTH] for row in starts]
    numbers = [np.searchsorted(row, np.arange(LENGTH), side="right") - 1 for row in starts]
    positions = [np.arange(LENGTH) - row[number] for row, number in zip(starts, numbers)]
    lengths = [np.diff([*row, LENGTH]) for row in starts]
    named = {"document_starts": starts, "position_ids": positions, "seq_idx": numbers, "seq_lengths": lengths}
    return {name: [row.tolist() for row in values] for name, values in named.items()}


@given(lengths_of_rows)
def test_every_column_says_the_same(rows: list[list[int]]) -> None:
    columns = columns_of(rows)
    expected = [row * LENGTH + place for row, places in enumerate(columns["document_starts"]) for place in places]
    for name, values in columns.items():
        flat = np.concatenate([np.array(row, int) for row in values])
        found = document_starts(name, flat, [len(row) for row in values], LENGTH)
        assert found.tolist() == expected, name
    inputs = document_inputs([np.array(row) for row in columns["document_starts"]], LENGTH)
    assert inputs["position_ids"].tolist() == columns["position_ids"]
    assert inputs["documents"].tolist() == columns["seq_idx"]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}


def test_a_row_that_goes_on_with_a_document_begins_one_of_its_own() -> None:
    for starts in ([], [3]):
        inputs = document_inputs([np.array(starts, int)], LENGTH)
        (positions,), (documents,) = inputs["position_ids"].tolist(), inputs["documents"].tolist()
        assert positions == ([0, 1, 2, 0, 1, 2] if starts else list(range(LENGTH)))
        assert documents == ([0, 0, 0, 1, 1, 1] if starts else [0] * LENGTH)
    assert document_starts("position_ids", [4, 5, 6, 0, 1, 2], [6], 6).tolist() == [3]
    assert document_starts("position_ids", [0, 1, 2, 3, 4, 5], [3, 3], 3).tolist() == [0]
    assert document_starts("document_starts", [], [0, 0], 3).tolist() == []


@pytest.mark.parametrize(
    ("column", "values", "counts", "said"),
    [
        ("document_starts", [0, 6], [2], "places from 0 to 5, which rise, not 6"),
        ("document_starts", [-1], [1], "places from 0 to 5, which rise, not -1"),
        ("document_starts", [2, 2], [2], "which rise, not 2"),
        ("document_starts", [4, 1], [2], "which rise, not 1"),
        ("position_ids", [0, 1, 2, 2, 3, 4], [6], "rise by one or start anew at 0, not 2"),
        ("position_ids", [0, 1, 2, 5, 6, 7], [6], "rise by one or start anew at 0, not 5"),
        ("position_ids", [0, 1, 2], [3], "one number for each of 6 tokens, not 3"),
        ("seq_idx", [0], [1], "one number for each of 6 tokens, not 1"),
        ("seq_lengths", [2, 3], [2], "lengths that add up to 6 in each row, not 5"),
        ("seq_lengths", [6, 0], [2], "lengths of 1 or more, not 0"),
        ("seq_lens", [2, 4, 6], [3, 0], "lengths that add up to 6 in each row, not 12"),
    ],
)
def test_columns_that_say_something_else(column: str, values: list[int], counts: list[int], said: str) -> None:
    with pytest.raises(UserError, match=f"column '{column}' of the dataset must hold .*{said}$"):
        document_starts(column, values, counts, LENGTH)


def saved(folder, **columns) -> PackedDataset:
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return PackedDataset.open(folder)


def batches(dataset: PackedDataset, rows: int, documents: bool) -> Batches:
    samples, share = Shuffled(dataset, 0), Share(0, 1, rows, 1)
    return Batches(samples, dataset.sequence_length, share, -1, torch.device("cpu"), documents)


def batch_of(dataset: PackedDataset, rows: int) -> Batch:
    return next(
        Batches(
            Shuffled(dataset, 0), dataset.sequence_length, Share(0, 1, rows, 1), -1, torch.device("cpu"), documents=True
        ).after(0)
    )


@pytest.mark.parametrize("column", ["document_starts", "position_ids", "seq_idx", "segment_ids", "seq_lengths"])
def test_a_batch_keeps_documents_apart(tmp_path, column) -> None:
    values = columns_of([[2, 1, 3]])["seq_idx" if column == "segment_ids" else column]
    dataset = saved(tmp_path, input_ids=[[5, 6, 7, 8, 9, 10]], **{column: values})
    inputs, count, _ = batch_of(dataset, 1)
    assert inputs["labels"].tolist() == [[6, -1, -1, 9, 10, -1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert inputs["documents"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert count == 3


def test_a_dataset_s_own_labels_do_not_cross_a_boundary(tmp_path) -> None:
    dataset = saved(tmp_path, input_ids=[[5, 6, 7, 8]], labels=[[5, -100, 7, 8]], document_starts=[[0, 2]])
    assert batch_of(dataset, 1)[0]["labels"].tolist() == [[-1, -1, 8, -1]]


def test_without_being_asked_a_batch_is_what_it_was(tmp_path) -> None:
    dataset = saved(tmp_path, input_ids=[[5, 6, 7, 8]], document_starts=[[0, 2]])
    inputs, count, _ = next(
        Batches(Shuffled(dataset, 0), dataset.sequence_length, Share(0, 1, 1, 1), -1, torch.device("cpu")).after(0)
    )
    assert {name: x.tolist() for name, x in inputs.items()} == {
        "input_ids": [[5, 6, 7, 8]],
        "labels": [[6, 7, 8, -1]],
    }
    assert count == 3


def test_lengths_of_documents(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("nnscaler.data.packed.SCANNED", 8)  # two rows at a time
    # Of 2 tokens; of 7, cut into 2, 4 and 1; of 3.
    dataset = saved(tmp_path, input_ids=[[1] * 4] * 3, document_starts=[[0, 2], [], [1]])
    found = dataset.document_lengths
    of_token = (4 + 4 + 16 + 1 + 9) / 12
    assert found == DocumentLengths(
        documents=5, mean=12 / 5, longest=4, of_token=of_token, cut=1, padded=0, positions=4
    )
    assert dataset.document_lengths is found
    full = saved(tmp_path / "full", input_ids=[[1] * 4] * 2, document_starts=[[0], [0]]).document_lengths
    assert (full.documents, full.cut) == (2, 0), "as long as a row is not cut"
    last = saved(tmp_path / "last", input_ids=[[1] * 4] * 3, document_starts=[[0], [0], []]).document_lengths
    assert (last.documents, last.cut) == (3, 1), "which ends with the dataset"


def test_padding_is_no_document(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("nnscaler.data.packed.SCANNED", 16)  # two rows at a time
    no = -100
    rows = [
        ([5, 6, 5, 6, 7, 0, 0, 0], [no, 6, no, 6, 7, no, no, no], [0, 2, 5]),  # of 2 and 3, and padding
        ([5, 6, 7, 5, 6, 7, 8, 0], [no, 6, 7, no, 6, 7, 8, no], [0, 3, 7]),  # one token of padding
        ([5, 6, 5, 6, 7, 8, 9, 9], [no, 6, no, no, no, no, no, no], [0, 2]),  # nothing is learned of a document
        ([5, 6, 7, 8, 9, 9, 9, 9], [no, 6, 7, 8, 9, 9, 9, 9], [0, 4]),  # all alike, and learned
        ([5, 6, 0, 0, 0, 0, 0, 0], [no, 6, no, no, no, no, no, no], [0, 2]),
    ]
    ids, labels, starts = ([row[index] for row in rows] for index in range(3))
    dataset = saved(tmp_path / "labelled", input_ids=ids, labels=labels, document_starts=starts)
    lengths = [2, 3, 3, 4, 2, 6, 4, 4, 2]
    squares = sum(length**2 for length in [*lengths, 3, 1, 6])  # attention works on padding too
    found = dataset.document_lengths
    assert found == DocumentLengths(
        documents=9, mean=sum(lengths) / 9, longest=6, of_token=squares / 40, cut=0, padded=3, positions=6
    )
    assert str(found) == (
        "9 documents of 3 tokens on average, 6 at most; 3 of the rows end in padding; attention has as much to do as "
        "if each had 4"
    )
    assert Mixture.of([dataset, dataset], [1, 3], "x").document_lengths == dataclasses.replace(
        found, documents=18, padded=6
    )
    # Without labels, nothing tells padding from a document.
    plain = saved(tmp_path / "plain", input_ids=ids, document_starts=starts)
    assert plain.document_lengths.documents == 12
    # A column of positions says so still, where each row has but one document, and padding.
    positions = [[0, 1, 0, 1, 2, 3, 4, 5]]
    anew = saved(tmp_path / "anew", input_ids=ids[4:], labels=labels[4:], position_ids=positions)
    found = anew.document_lengths
    assert (found.documents, found.longest, found.positions, found.mean) == (1, 2, 6, 2.0)
    assert anew.asks_for_documents


@pytest.mark.parametrize("column", [[[0.5]], [[None]]])
def test_columns_that_are_no_lists_of_numbers(tmp_path, column) -> None:
    with pytest.raises(UserError, match=r"column 'seq_idx' (holds .*, not lists of whole numbers|has empty places)"):
        saved(tmp_path, input_ids=[[1]], seq_idx=column)


def test_a_number_of_a_row_says_nothing_of_its_tokens(tmp_path) -> None:
    assert saved(tmp_path, input_ids=[[1], [2]], document_ids=[5, 6]).documents is None


def test_of_several_columns_the_one_that_says_most_counts(tmp_path) -> None:
    """Places may say that a row goes on with a document; positions do, too."""
    columns = {"seq_idx": [[1, 1, 2]], "position_ids": [[0, 0, 1]], "document_starts": [[2]]}
    assert saved(tmp_path / "all", input_ids=[[1, 2, 3]], **columns).documents == "document_starts"
    del columns["document_starts"]
    assert saved(tmp_path / "two", input_ids=[[1, 2, 3]], **columns).documents == "position_ids"


def test_a_dataset_without_starts_of_documents(tmp_path) -> None:
    dataset = saved(tmp_path, input_ids=[[1, 2]])
    with pytest.raises(UserError, match=r"does not say where documents begin; make it anew with bookcorpus\.py"):
        _ = dataset.document_lengths


def test_who_asks_for_documents(tmp_path) -> None:
    starts = {"document_starts": [[0], [1]]}
    for name, columns, asks in [
        ("ours", starts, False),
        ("positions", {"position_ids": [[0, 1], [0, 0]]}, True),
        ("plain", {"position_ids": [[0, 1], [0, 1]]}, False),
        ("numbers", {"seq_idx": [[3, 3], [3, 3]]}, False),
    ]:
        assert saved(tmp_path / name, input_ids=[[1, 2], [3, 4]], **columns).asks_for_documents is asks, name
