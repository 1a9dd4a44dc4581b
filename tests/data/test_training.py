"""Which samples a replica trains on: the order depends on the seed alone, wherever a run begins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler.data import packed, training
from nnscaler.data.packed import PackedDataset
from nnscaler.data.training import Batch, Batches, Counts, InOrder, SampleOrder, Samples, Share, Shuffled, _Coming
from nnscaler.errors import UserError

ROWS, LENGTH, SEED = 22, 4, 5


@pytest.fixture
def dataset(tmp_path):
    tokens = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], LENGTH, 1)
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(tmp_path))
    return PackedDataset.open(tmp_path)


def batches_of(samples: Samples, length: int, share: Share, ignored: int = -100) -> Batches:
    return Batches(samples, length, share, ignored, torch.device("cpu"))


def rows_of(dataset: PackedDataset, share: Share, consumed: int, count: int) -> list[list[int]]:
    batches = batches_of(Shuffled(dataset, SEED), LENGTH, share)
    return [inputs["input_ids"][:, 0].tolist() for inputs, _, _ in islice(batches.after(consumed), count)]


def test_replicas_share_each_step_and_epochs_follow_one_another(dataset):
    order = SampleOrder(ROWS, SEED)
    expected = [order.row(sample) for sample in range(48)]  # into the third epoch
    assert sorted(expected[:ROWS]) == list(range(ROWS))
    found: list[int] = []
    micro_batches = [rows_of(dataset, Share(replica, 2, 2, 3), 0, 12) for replica in range(2)]  # four steps
    for first, second in zip(*micro_batches):
        found += first + second
    assert found == expected


def test_a_run_goes_on_where_another_stopped(dataset):
    share = Share(1, 2, 2, 3)
    whole = rows_of(dataset, share, 0, 12)
    assert rows_of(dataset, share, 2 * share.step_samples, 6) == whole[6:]


def test_labels_are_the_next_tokens_but_for_the_last(dataset):
    inputs, count, _ = next(batches_of(Shuffled(dataset, SEED), LENGTH, Share(0, 1, 1, 1)).after(0))
    assert inputs["labels"].tolist() == [[*inputs["input_ids"][0, 1:].tolist(), -100]]
    assert count == LENGTH - 1


@dataclass
class Rows:
    """A dataset in memory: row r holds r + 1 at every place."""

    rows: list[dict[str, np.ndarray]]

    @staticmethod
    def numbered(count: int) -> Rows:
        return Rows([{"input_ids": np.full(LENGTH, number + 1)} for number in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> dict[str, np.ndarray]:
        return self.rows[number]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_each_sample_is_evaluated_once_whatever_the_devices(rows, replicas, micro_batch, micro_batches):
    """The rest of the last batch has no labels."""
    seen: list[int] = []
    for replica in range(replicas):
        share = Share(replica, replicas, micro_batch, micro_batches)
        steps = -(-rows // share.step_samples)
        for inputs, count, _ in islice(
            batches_of(InOrder(Rows.numbered(rows)), LENGTH, share).after(0), steps * micro_batches
        ):
            learned = (inputs["labels"] != -100).sum(1)
            assert set(learned.tolist()) <= {0, LENGTH - 1}
            assert count == learned.sum()
            seen += inputs["labels"][learned > 0, 0].tolist()
    assert sorted(seen) == [number + 1 for number in range(rows)]


def saved(folder, **columns) -> PackedDataset:
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return PackedDataset.open(folder)


def test_labels_of_the_dataset_s_own_are_what_is_learned(tmp_path):
    dataset = saved(tmp_path, input_ids=[[5, 6, 7, 8]], labels=[[-100, -100, 7, 9]])
    inputs, count, _ = next(batches_of(InOrder(dataset), 4, Share(0, 1, 1, 1), ignored=-1).after(0))
    assert inputs["labels"].tolist() == [[-1, 7, 9, -1]]  # each at the place that has to say it
    assert count == 2
    assert dataset.token_ids() == (5, 9)


def test_padding_is_what_fills_rows_up_and_is_not_learned():
    rows = [
        {"input_ids": np.array([5, 6, 9, 9, 9]), "labels": np.array([-100, 6, -100, -100, -100])},
        {"input_ids": np.array([5, 6, 9, 9, 9]), "labels": np.array([-100, 6, 9, 9, 9])},
        {"input_ids": np.array([5, 6, 7, 8, 9]), "labels": np.array([-100, 6, -100, -100, -100])},
        {"input_ids": np.array([9, 9, 9, 9, 9])},  # learns the next token, as any text
    ]
    batch = next(batches_of(InOrder(Rows(rows)), 5, Share(0, 1, 6, 1)).after(0))
    assert batch.padding == 3 + 0 + 0 + 0 + 2 * 5  # and the two rows that are not there
    assert batch.labels == 1 + 4 + 1 + 4


def test_labels_and_padding_of_micro_batches_are_added_up():
    counts = Counts()
    assert (counts.labels, counts.padding) == (0, 0)
    batches = [Batch({"input_ids": torch.tensor([number])}, 10 + number, 5 * number) for number in range(3)]
    taken = counts.of(batches)
    assert next(taken) is batches[0].inputs
    assert (counts.labels, counts.padding) == (10, 0), "as they are taken"
    assert [inputs["input_ids"].item() for inputs in taken] == [1, 2]
    assert (counts.labels, counts.padding) == (33, 15)


def test_ids_of_a_dataset_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SCANNED", 8)  # two rows
    dataset = saved(tmp_path, input_ids=[[0, 4, 5, 6]] * 5 + [[3, 99, -7, 4]] + [[3, 4, 5, 6]] * 4)
    assert dataset.token_ids() == (-7, 99)
    places = [dataset.place_outside(vocabulary) for vocabulary in (100, 50, 3)]
    assert places == [f"the first other one is in row {row}" for row in (5, 5, 0)]
    monkeypatch.setattr(PackedDataset, "_scan", None)
    assert PackedDataset.open(tmp_path).token_ids() == (-7, 99)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "_fingerprint": "another content"}))
    with pytest.raises(TypeError):
        PackedDataset.open(tmp_path).token_ids()  # it is read again


def test_ids_that_bookcorpus_noted_are_taken(tmp_path):
    dataset = saved(tmp_path, input_ids=[[3, 4]])
    (tmp_path / "packing.json").write_text('{"vocab_size": 1000, "smallest_id": 0, "largest_id": 7}')
    assert dataset.token_ids() == (0, 7)


def test_labels_of_which_none_is_learned_are_refused(tmp_path):
    dataset = saved(tmp_path, input_ids=[[3, 4]] * 2, labels=[[-100, -100]] * 2)
    with pytest.raises(UserError, match="all of them are -100: nothing would be learned"):
        dataset.token_ids()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [[1, 2], [1, 2, 3]]}, "have from 2 to 3 tokens, and must have one length"),
        ({"input_ids": [[1.0, 2.0]]}, "holds list<.*double>, not lists of whole numbers"),
        ({"input_ids": ["text"]}, "holds string, not lists of whole numbers"),
        ({"input_ids": [[[1], [2]]]}, "not lists of whole numbers"),
        ({"input_ids": [[1, None]]}, "has empty places"),
        ({"input_ids": []}, "which is empty or damaged"),
        ({"text": ["x"]}, "have no column 'input_ids'"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "whose input_ids have 2 tokens and labels 1"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "column 'attention_mask' training does not read"),
        ({"input_ids": [[1, 2]], "assistant_masks": [[0, 1]]}, "column 'assistant_masks' training does not read"),
    ],
)
def test_datasets_that_are_not_trained_on(tmp_path, columns, said):
    with pytest.raises(UserError, match=said):
        saved(tmp_path, **columns)


def test_columns_that_say_nothing_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    others = {"attention_mask": [[1, 1]] * 2, "url": ["", "x"]}
    dataset = saved(tmp_path, input_ids=[[1, 2], [3, 4]], **others)
    assert [list(dataset.row(number)) for number in range(len(dataset))] == [["input_ids"]] * 2
    assert "columns that training does not read: attention_mask, url" in caplog.text


def test_splits_are_named(tmp_path):
    one = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="holds the splits train, test; give one"):
        PackedDataset.open(tmp_path)


def test_every_epoch_has_an_order_of_its_own():
    order = SampleOrder(20, seed=5)
    epochs = [[order.row(20 * epoch + place) for place in range(20)] for epoch in range(2)]
    assert [sorted(rows) for rows in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]


def test_a_batch_is_on_its_way_while_the_one_before_it_is_trained_on(monkeypatch):
    """A copy that is asked for after an update waits on a GPU for what the update brings from the host."""
    sent = []

    class Coming(_Coming):
        def __init__(self, on_host, *where):
            super().__init__(on_host, *where)
            sent.append(on_host)

    monkeypatch.setattr(training, "_Coming", Coming)
    batches = batches_of(Shuffled(Rows.numbered(ROWS), SEED), LENGTH, Share(0, 1, 1, 2)).after(0)
    for taken in range(3):
        given = next(batches)
        assert len(sent) == taken + 2
        assert given.inputs["input_ids"].tolist() == sent[taken].inputs["input_ids"].tolist()
