"""Mixtures: drawn by weight in an order that the seed alone decides, nothing lost or twice, wherever a run begins."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler.checkpoint.folder import TrainerState, latest_checkpoint
from nnscaler.cli.config import CheckpointConfig, DatasetConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.data.documents import DocumentLengths
from nnscaler.data.mixture import Mixed, Mixture, open_sources, samples_of
from nnscaler.data.packed import PackedDataset
from nnscaler.data.training import Batches, SampleOrder, Share
from nnscaler.data.weighted import BLOCK, WeightedDataset, shares_of
from nnscaler.errors import UserError
from tests import tiny
from tests.launch import run
from tests.parity import SEED, TOLERANCE, Case, arguments, plain_loop

LENGTH = 3


@dataclass
class Numbered:
    """Samples of a part that say their own number."""

    part: int

    def sample(self, number: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.array([0, self.part, number])}


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2**63 - 1), st.integers(0, 50),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_part_s_samples_come_one_after_the_other(shares, seed, start, replicas, micro_batch, micro_batches):
    """Across blocks, on any number of devices, from wherever a run begins."""
    mixed = Mixed([Numbered(part) for part in range(len(shares))], shares, seed)
    drawn = [tuple(mixed.sample(number)["input_ids"][1:].tolist()) for number in range(120)]
    for part in range(len(shares)):
        assert [number for found, number in drawn if found == part] == list(range(Counter(p for p, _ in drawn)[part]))
    for begin in range(0, 120 - sum(shares), sum(shares)):  # a block has each as often as it should
        assert Counter(part for part, _ in drawn[begin : begin + sum(shares)]) == Counter(dict(enumerate(shares)))
    share = Share(0, replicas, micro_batch, micro_batches)
    found: list[list[tuple[int, int]]] = []
    for replica in range(replicas):
        again = Mixed([Numbered(part) for part in range(len(shares))], shares, seed)
        own = Batches(again, LENGTH, dataclasses.replace(share, replica=replica), -100, torch.device("cpu"))
        taken = islice(own.after(start), micro_batches)
        found.append([[tuple(row[1:].tolist()) for row in inputs["input_ids"]] for inputs, _, _ in taken])
    step = [sample for micro in zip(*found) for one in micro for sample in one]
    assert step == [
        tuple(mixed.sample(number)["input_ids"][1:].tolist()) for number in range(start, start + share.step_samples)
    ]


def test_weights_are_shares_of_a_block():
    assert shares_of([0.7, 0.3], ["a", "b"], "x") == [45875, 19661]
    assert shares_of([1 / 3] * 3, ["a"] * 3, "x") == [21846, 21845, 21845]
    assert shares_of([1.2, 65534.8, 65536], ["a", "b", "c"], "x") == [1, 32767, 32768], "what lost most gets the rest"
    assert shares_of([2, 6], ["a", "b"], "x") == [BLOCK // 4, 3 * BLOCK // 4]
    with pytest.raises(UserError, match="x gives 'b' less than 1/65,536 of all weights"):
        shares_of([1, 1e-9], ["a", "b"], "x")


def write(folder: Path, rows: int, first: int) -> np.ndarray:
    tokens = (first + np.arange(rows * tiny.LENGTH).reshape(rows, tiny.LENGTH) * 5) % tiny.VOCABULARY
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(folder))
    return tokens


def test_every_dataset_has_epochs_and_an_order_of_its_own(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 11, ord(name))
    mixture = Mixture.of([PackedDataset.open(tmp_path / name) for name in ("a", "b")], [1, 1], "dataset_path")
    samples = samples_of(mixture, 3)
    orders = [SampleOrder(11, 3, part) for part in range(2)]
    assert mixture.seen(3, 3 * BLOCK) == [3 * BLOCK // 2] * 2
    count = 44
    found = Counter(tuple(samples.sample(number)["input_ids"].tolist()) for number in range(count))
    wanted: Counter[tuple[int, ...]] = Counter()
    for part, order, seen in zip(mixture.parts, orders, mixture.seen(3, count), strict=True):
        wanted.update(tuple(part.row(order.row(number))["input_ids"].tolist()) for number in range(seen))
    assert found == wanted
    first = [[order.row(number) for number in range(11)] for order in orders]
    assert [sorted(rows) for rows in first] == [list(range(11))] * 2
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a=0.5", "b"], "is 'b', which has no weight; where there are several datasets, each needs one: PATH=WEIGHT"),
        (["a=0.5", "b=0"], "gives 'b' the weight 0; it must be more than 0"),
        (["a=0.5", "b=nan"], "gives 'b' the weight nan; it must be more than 0"),
        (["b=-1"], "gives 'b' the weight -1; it must be more than 0 and at most 1e9"),
        (["a=1e9", "b=1.1e9"], "gives 'b' the weight 1.1e9; it must be more than 0 and at most 1e9"),
        (["a=1", "a=2"], "has 'a' twice"),
        (["a=1", "./a/=2"], "has 'a' twice"),
        (["s3://b/a/=1", "s3://b/a=2"], "has 's3://b/a' twice"),
        (["a=1", "b=1e-7"], "less than 1/65,536 of all weights"),
    ],
)
def test_weights_that_are_none(texts, said):
    with pytest.raises(UserError, match=f"^dataset_path .*{said}"):
        WeightedDataset.read_all(texts, "dataset_path")


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a"], [("a", None)]),
        (["a=0.3"], [("a", 0.3)]),
        (["a=1e9", "b=1e9"], [("a", 1e9), ("b", 1e9)]),
        (["~/x/../y/"], [("/home/me/y", None)]),
        (["~/d=1"], [("/home/me/d=1", None)]),  # which is there
        (["~/e=2"], [("/home/me/e", 2.0)]),  # which is not
        (["data/lang=en"], [("data/lang=en", None)]),
        (["./data//lang=en=0.5", "s3://b/./c=d//=2"], [("data/lang=en", 0.5), ("s3://b/./c=d", 2.0)]),
    ],
)
def test_how_paths_and_weights_are_read(monkeypatch, texts, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.path.exists", lambda path: path == "/home/me/d=1")
    assert [(one.path, one.weight) for one in WeightedDataset.read_all(texts, "x")] == wanted


def test_a_path_may_have_an_equals_sign(tmp_path):
    (tmp_path / "a=1").mkdir()
    assert WeightedDataset.read_all([f"{tmp_path}/a=1"], "x") == [WeightedDataset(f"{tmp_path}/a=1")]
    assert WeightedDataset.read_all([f"{tmp_path}/a=1=0.5", "b=0.5"], "x")[0] == WeightedDataset(f"{tmp_path}/a=1", 0.5)


def test_rows_of_different_lengths_are_refused(tmp_path):
    write(tmp_path / "a", 3, 0)
    datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(str(tmp_path / "b"))
    sources = [WeightedDataset(str(tmp_path / "a"), 0.5), WeightedDataset(str(tmp_path / "b"), 0.5)]
    with pytest.raises(UserError, match=r"b', whose sequences have 2 tokens, but those of '.*a' have 32"):
        open_sources(sources)


def test_lengths_of_a_mixture_s_documents(tmp_path):
    for name, starts in {"a": [[0], [0, 2]], "b": [[0, 1]]}.items():
        rows = {"input_ids": [[1, 2, 3, 4]] * len(starts), "document_starts": starts}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / name))
    mixture = open_sources([WeightedDataset(str(tmp_path / "a"), 3), WeightedDataset(str(tmp_path / "b"), 1)])
    lengths = mixture.document_lengths
    assert (lengths.documents, lengths.longest, lengths.mean, lengths.cut) == (5, 4, 12 / 5, 0)
    assert lengths.of_token == pytest.approx(0.75 * (16 + 4 + 4) / 8 + 0.25 * (1 + 9) / 4)
    first = DocumentLengths(documents=2, mean=3.0, longest=3, of_token=1.0, cut=1, padded=4, positions=5)
    second = DocumentLengths(2, 2.0, 2, 1.0, cut=2, padded=5, positions=6, estimated=True)
    parts = [SimpleNamespace(document_lengths=one) for one in (first, second)]
    both = [Mixture(order, (1, 1)).document_lengths for order in (tuple(parts), tuple(parts[::-1]))]
    assert both == [DocumentLengths(4, 2.5, 3, 1.0, cut=3, padded=9, positions=6, estimated=True)] * 2
    assert not Mixture((parts[0],), (1,)).document_lengths.estimated


def test_datasets_of_one_name_are_told_by_their_paths():
    parts = [SimpleNamespace(path=path) for path in ("/a/x", "/b/x", "/b/y")]
    assert Mixture(tuple(parts), (1, 1, 1)).names == ["/a/x", "/b/x", "y"]


SOURCES = {"a": 0.75, "b": 0.25}


def train(case: Case, folder: Path, steps: int, resume: Path | None = None) -> None:
    args = arguments(case, folder)
    mixture = open_sources([WeightedDataset(str(folder / name), weight) for name, weight in SOURCES.items()])
    checkpoint = CheckpointConfig(folder / "checkpoints", interval=0, resume=resume)
    args = dataclasses.replace(
        args, dataset=DatasetConfig(mixture), max_train_steps=steps, checkpoint=checkpoint
    )  # fmt: skip
    Trainer(args).run()


def test_a_mixture_trains_as_the_plain_loop_on_its_order_and_goes_on_elsewhere(tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    for index, name in enumerate(SOURCES):
        write(tmp_path / name, 9 + index, 3 * index)
    mixture = open_sources([WeightedDataset(str(tmp_path / name), weight) for name, weight in SOURCES.items()])
    samples = samples_of(mixture, SEED)
    order = np.random.default_rng((SEED, 0)).permutation(20)
    rows = np.empty((20, tiny.LENGTH), dtype=np.int64)
    rows[order] = [samples.sample(number)["input_ids"] for number in range(20)]
    losses, *_ = plain_loop(rows, [4, 4, 4, 2, 2, 2])
    run(2, train, Case(1, 2, accumulation=2), tmp_path, 3, init=False)
    saved = latest_checkpoint(tmp_path / "checkpoints")
    state = TrainerState.read(saved)
    assert state.mixture == {"a": [9, 3 * BLOCK // 4], "b": [10, BLOCK // 4]}
    run(1, train, Case(1, 1, accumulation=2), tmp_path, 6, saved, init=False)
    found = [
        json.loads(line)
        for path in sorted((tmp_path / "runs").iterdir(), reverse=True)
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["loss"] for entry in found] == pytest.approx(losses, rel=TOLERANCE)
    assert [found[-1][f"samples/{name}"] for name in SOURCES] == mixture.seen(SEED, 18)
