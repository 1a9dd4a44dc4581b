"""Which samples a replica trains on: the order depends on the seed alone, wherever a run begins."""

from __future__ import annotations

from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from nnscaler.data.training import Batches, PackedDataset, SampleOrder, Share

ROWS, LENGTH, SEED = 22, 4, 5


@pytest.fixture
def dataset(tmp_path):
    tokens = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], LENGTH, 1)
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(tmp_path))
    return PackedDataset.open(tmp_path)


def rows_of(dataset: PackedDataset, share: Share, consumed: int, count: int) -> list[list[int]]:
    batches = Batches(dataset, SEED, share, -100, torch.device("cpu"))
    return [inputs["input_ids"][:, 0].tolist() for inputs, _ in islice(batches.after(consumed), count)]


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
    batches = Batches(dataset, SEED, Share(0, 1, 1, 1), -100, torch.device("cpu"))
    inputs, count = next(batches.after(0))
    assert inputs["labels"].tolist() == [[*inputs["input_ids"][0, 1:].tolist(), -100]]
    assert count == LENGTH - 1
