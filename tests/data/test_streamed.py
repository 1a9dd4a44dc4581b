"""Streamed datasets: each row once an epoch, in an order that the seed alone decides, from wherever a run begins."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.cli.config import CheckpointConfig, DatasetConfig
from nnscaler.cli.trainer import Trainer
from nnscaler.data import mixture, remote, streamed
from nnscaler.data.documents import DocumentLengths
from nnscaler.data.mixture import in_order, open_sources, samples_of
from nnscaler.data.streamed import StreamedDataset, StreamedInOrder, Streaming
from nnscaler.data.training import Share
from nnscaler.data.weighted import WeightedDataset
from nnscaler.errors import UserError
from tests import tiny
from tests.launch import run
from tests.parity import SEED, TOLERANCE, Case, arguments, plain_loop

LENGTH = 3


def write(folder: Path, files: list[list[int]]) -> Path:
    """Files of so many rows in each row group; row r of all holds [r, r, r]."""
    folder.mkdir(parents=True, exist_ok=True)
    row = 0
    for number, groups in enumerate(files):
        schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
        with pq.ParquetWriter(folder / f"{number:03d}.parquet", schema) as writer:
            for rows in groups:
                writer.write_table(pa.table({"input_ids": [[row + i] * LENGTH for i in range(rows)]}, schema=schema))
                row += rows
    return folder


def drawn(dataset: StreamedDataset, numbers: range, seed: int = 5, part: int = 0) -> list[int]:
    streaming = Streaming(dataset, seed, part)
    return [int(streaming.sample(number)["input_ids"][0]) for number in numbers]


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 5, 100]), st.integers(0, 60), st.integers(0, 2**62),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_each_row_is_once_in_each_epoch_and_a_run_goes_on_anywhere(files, lanes, block, start, seed):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(streamed, "LANES", lanes)
        patch.setattr(streamed, "MOST_ROWS", block)
        patch.setattr(streamed, "READ", 2)
        dataset = StreamedDataset.open(str(write(Path(folder), files)))
        rows = sum(map(sum, files))
        assert len(dataset) == rows
        assert dataset.token_ids() == (0, rows - 1)
        found = drawn(dataset, range(3 * rows), seed)
        for epoch in range(3):
            assert sorted(found[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
        assert drawn(dataset, range(min(start, rows), 3 * rows), seed) == found[min(start, rows) :]


def test_what_rows_have_besides_tokens_is_read_with_them(tmp_path, monkeypatch):
    """Also where the first of the files has no rows."""
    monkeypatch.setattr(streamed, "BUFFER", 10 * 3 * LENGTH * 4 + 5)
    kinds = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "document_starts": pa.list_(pa.int32())}
    rows = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], "document_starts": [[0, 2]]}
    for name, content in {"a": {column: [] for column in kinds}, "b": rows}.items():
        pq.write_table(pa.table(content, schema=pa.schema(list(kinds.items()))), tmp_path / f"{name}.parquet")
    dataset = StreamedDataset.open(str(tmp_path))
    assert (len(dataset), dataset.sequence_length, dataset.documents) == (1, LENGTH, "document_starts")
    assert dataset.token_ids() == (5, 7), "of tokens alone"
    assert Streaming(dataset, 5)._block == 10, "rows of three columns of int32"
    found = Streaming(dataset, 5).sample(3)
    assert {name: list(values) for name, values in found.items()} == {name: values[0] for name, values in rows.items()}
    for column in ("labels", "document_starts"):
        del rows[column], kinds[column]
    (tmp_path / "bare").mkdir()
    pq.write_table(pa.table(rows, schema=pa.schema(list(kinds.items()))), tmp_path / "bare" / "a.parquet")
    bare = StreamedDataset.open(str(tmp_path / "bare"))
    assert (bare.documents, bare.columns) == (None, ("input_ids",))
    assert Streaming(bare, 5)._block == 30
    pq.write_table(pa.table(rows), tmp_path / "bare" / "a.parquet", write_statistics=False)
    assert StreamedDataset.open(str(tmp_path / "bare")).token_ids() == (0, 0), "the footers do not tell"


def test_lengths_of_documents_are_estimated_from_some_rows(tmp_path, monkeypatch):
    """Of four files, the first two rows of the first and of the last."""
    monkeypatch.setattr(streamed, "LOOKED_FILES", 2)
    monkeypatch.setattr(streamed, "LOOKED_ROWS", 2)
    ids, no = [[5, 6, 7, 0, 0, 0]], -100
    for number, starts in enumerate([[0, 2], [1], [3], [0, 3]]):
        columns = {"labels": [[no, 6, 7, no, no, no]] * 3, "document_starts": [starts, starts, [0]]}
        rows = {"input_ids": ids * 3, **columns}
        pq.write_table(pa.table(rows), tmp_path / f"{number}.parquet")
    dataset = StreamedDataset.open(str(tmp_path))
    found = dataset.document_lengths
    assert found == DocumentLengths(
        documents=18, mean=18 / 6, longest=4, of_token=(2 * (4 + 16) + 2 * (9 + 9)) / 24, cut=0, padded=6, positions=6,
        estimated=True,
    )  # fmt: skip
    assert str(found).startswith("about 18 documents of 3 tokens on average, 4 at most; 6 of the rows end in padding")
    assert not dataset.asks_for_documents
    assert DatasetConfig(dataset, document_mask=True).mean_document == 3
    with pytest.raises(UserError, match="does not say where documents begin"):
        _ = StreamedDataset.open(str(write(tmp_path / "bare", [[1]]))).document_lengths


def test_other_columns_say_where_documents_begin(tmp_path):
    rows = {"input_ids": [[5, 6, 7]] * 2, "segment_ids": [4, 4], "position_ids": [[0, 0, 1], [0, 1, 2]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    dataset = StreamedDataset.open(str(tmp_path))
    assert dataset.documents == "position_ids", "the other column is of rows"
    assert {tuple(Streaming(dataset, 5).sample(number)["document_starts"]) for number in range(2)} == {(0,), (0, 1)}
    with pytest.raises(UserError, match="column 'position_ids' that keeps documents apart; give --document_mask"):
        DatasetConfig(dataset)
    rows["position_ids"] = [[0, 0, 2]] * 2
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"of '.*a.parquet' must hold positions that rise by one or start anew at 0, not 2"
    ):
        Streaming(StreamedDataset.open(str(tmp_path)), 5).sample(0)


@pytest.mark.parametrize(
    ("positions", "labels", "asks"),
    [
        ([[0, 1, 2], [0, 1, 2]], {}, False),
        ([[0, 1, 2], [0, 1, 0]], {}, True),
        ([[0, 1, 2], [0, 0, 1]], {"labels": [[5, 6, 7], [5, -100, -100]]}, True),  # a document and padding
    ],
)
def test_whose_streams_ask_for_documents(positions, labels, asks, tmp_path):
    rows = {"input_ids": [[5, 6, 7], [5, 0, 0]], "position_ids": positions}
    pq.write_table(pa.table(rows | labels), tmp_path / "a.parquet")
    assert StreamedDataset.open(str(tmp_path)).asks_for_documents is asks


@pytest.mark.parametrize(("files", "most"), [([[60]], 1024), ([[1]] * 60, 1)], ids=["of rows", "of files"])
def test_every_epoch_seed_and_part_of_a_mixture_has_an_order_of_its_own(files, most, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "MOST_ROWS", most)
    dataset = StreamedDataset.open(str(write(tmp_path, files)))
    orders = [drawn(dataset, range(60)), drawn(dataset, range(60, 120)), drawn(dataset, range(60), 6)]
    orders.append(drawn(dataset, range(60), part=1))
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(60)) not in orders


def test_every_block_of_every_lane_has_an_order_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "LANES", 2)
    monkeypatch.setattr(streamed, "MOST_ROWS", 16)
    found = drawn(StreamedDataset.open(str(write(tmp_path, [[64]]))), range(64))
    blocks = [[row % 16 for row in found[lane::2][at : at + 16]] for lane in range(2) for at in (0, 16)]
    assert [sorted(block) for block in blocks] == [list(range(16))] * 4
    assert len(set(map(tuple, blocks))) == 4


def test_streams_of_a_mixture_are_told_their_place(tmp_path):
    sources = [WeightedDataset(str(write(tmp_path / name, [[9]])), 0.5) for name in ("a", "b")]
    parts = samples_of(open_sources(sources), 3)._samples
    assert [(one._seed, one._part) for one in parts] == [(3, 0), (3, 1)]


def test_an_order_is_that_of_every_version(tmp_path, monkeypatch):
    """Or a run would not go on where an earlier version has left it: seeds are of seed, epoch and part; for a block
    also of lane and number, and of another last number than for files, or for draws of a mixture."""
    monkeypatch.setattr(streamed, "LANES", 2)
    monkeypatch.setattr(streamed, "MOST_ROWS", 3)
    dataset = StreamedDataset.open(str(write(tmp_path, [[2], [1], [4]])))  # rows 0 1, 2, 3 4 5 6
    rows = [[0, 1], [2], [3, 4, 5, 6]]
    for epoch in range(2):
        files = np.random.default_rng((5, epoch, 4, 2**32 - 2)).permutation(3)
        laid_out = [row for file in files for row in rows[file]]
        lanes = []
        for lane, (begin, end) in enumerate([(0, 4), (4, 7)]):
            blocks = [laid_out[at : min(at + 3, end)] for at in range(begin, end, 3)]
            orders = [
                np.random.default_rng((5, epoch, 4, lane, number, 2**32 - 3)).permutation(len(block))
                for number, block in enumerate(blocks)
            ]
            lanes.append([block[place] for block, order in zip(blocks, orders) for place in order])
        wanted = [lanes[place % 2][place // 2] for place in range(7)]
        assert drawn(dataset, range(7 * epoch, 7 * epoch + 7), part=4) == wanted
    assert mixture._DRAWS == 2**32 - 1


@pytest.mark.parametrize("block", [1, 4, 100])
def test_in_order_each_row_is_once_and_an_evaluation_begins_anew(tmp_path, monkeypatch, block):
    monkeypatch.setattr(streamed, "MOST_ROWS", block)
    samples = in_order(StreamedDataset.open(str(write(tmp_path, [[3, 2], [1], [4]]))))
    for numbers in (range(13), range(1, 13, 3), range(4), range(13)):
        found = [samples.sample(number) for number in numbers]
        assert [row and int(row["input_ids"][0]) for row in found] == [
            number if number < 10 else None for number in numbers
        ]


def test_replicas_read_lanes_of_their_own(tmp_path, monkeypatch):
    dataset = StreamedDataset.open(str(write(tmp_path, [[64] * 4])))
    read: list[set[int]] = []
    for replica in range(4):
        streaming = Streaming(dataset, 5)
        share = Share(replica, 4, 1, 2)
        for step in range(8):
            for micro_batch in range(2):
                for number in share.samples(step * share.step_samples, micro_batch):
                    streaming.sample(number)
        read.append(set(streaming._lanes))
    assert [len(lanes) for lanes in read] == [streamed.LANES // 4] * 4
    assert set.union(*read) == set(range(streamed.LANES))
    assert (streamed.LANES, streamed.MOST_ROWS, streamed.BUFFER) == (32, 1024, 2**24), "others are another order"


def test_a_url_is_read_like_a_folder_and_again_where_reading_fails(tmp_path, monkeypatch, caplog):
    local = write(tmp_path / "rows", [[9, 9], [7]])
    memory = fsspec.filesystem("memory")
    for path in local.iterdir():
        memory.pipe(f"/rows/deep/{path.name}", path.read_bytes())
    dataset, here = StreamedDataset.open("memory://rows"), StreamedDataset.open(str(local))
    assert drawn(dataset, range(50)) == drawn(here, range(50))
    failures = iter([True, True, False])
    original = type(memory).open

    def sometimes(self, *args, **kwargs):
        if next(failures, False):
            raise ConnectionResetError("reset by peer")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", sometimes)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    assert drawn(dataset, range(50)) == drawn(here, range(50))
    assert "trying again: reset by peer" in caplog.text
    monkeypatch.setattr(remote, "TRIES", 1)
    failures = iter([True])
    with pytest.raises(UserError, match=r"cannot read '/rows/deep/00\d.parquet': reset by peer"):
        drawn(dataset, range(1))


def test_files_come_in_the_order_of_their_names(tmp_path, monkeypatch):
    """Whatever order a file system tells them in."""
    local = type(fsspec.filesystem("file"))
    original = local.glob
    monkeypatch.setattr(local, "glob", lambda *given, **named: original(*given, **named)[::-1])
    found = StreamedDataset.open(str(write(tmp_path, [[1], [2], [3]])))
    assert [rows for _, rows in found.files] == [1, 2, 3]


def test_what_cannot_be_streamed(tmp_path):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"input_ids": [[1, 2], [1, 2, 3]]}), tmp_path / "ragged.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing")
    for name, said in {
        "empty": "where no Parquet file has a row",
        "text.parquet": r"text.parquet' has no column 'input_ids' of lists",
        "damaged.parquet": r"cannot read \S*/damaged.parquet: ",
        ".": r"cannot read \S*/damaged.parquet: ",
    }.items():
        with pytest.raises(UserError, match=said):
            StreamedDataset.open(str(tmp_path / name))
    with pytest.raises(UserError, match="which cannot be read: Protocol not known"):
        StreamedDataset.open("nowhere://rows")
    with pytest.raises(UserError, match="has a row with 3 input_ids; those of the first row are 2"):
        drawn(StreamedDataset.open(str(tmp_path / "ragged.parquet")), range(2))


IDS = pa.array([[1, 2], [3, 4]], pa.list_(pa.int32()))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([{"input_ids": [[0.5, 2.0]]}], "has a column 'input_ids' of list<element: double>, not of lists of whole"),
        ([{"input_ids": [["a", "b"]]}], "not of lists of whole numbers"),
        ([{"input_ids": IDS}, {"input_ids": IDS, "labels": IDS}], "1.parquet' has input_ids, labels, and .*input_ids$"),
        ([{"input_ids": IDS, "labels": [[-100, -100]] * 2}], "all of them are -100: nothing would be learned"),
        ([{"input_ids": IDS, "attention_mask": [[1, 1], [1, 0]]}], "column 'attention_mask' training does not read"),
        ([{"input_ids": pa.array([[1, 2], None], pa.list_(pa.int32()))}], "0.parquet' has a row with empty places"),
        ([{"input_ids": pa.array([None, [1, 2]], pa.list_(pa.int32()))}], "first row of '.*0.parquet' has no tokens"),
        ([{"input_ids": pa.array([[], [1, 2]], pa.list_(pa.int32()))}], "first row of '.*0.parquet' has no tokens"),
        ([{"input_ids": pa.array([[1, 2], [3, None]])}], "a row with empty places in 'input_ids'"),
    ],
)
def test_rows_of_files_that_would_be_read_wrong(tmp_path, files, said):
    for number, columns in enumerate(files):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    with pytest.raises(UserError, match=said):
        drawn(StreamedDataset.open(str(tmp_path)), range(4))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [[1, 96]]}, "the id 96 in 'input_ids', and the model knows those from 0 to 95; prepare it"),
        ({"input_ids": [[-1, 5]]}, "the id -1 in 'input_ids', and the model knows"),
        ({"input_ids": [[-100, 5]]}, "the id -100 in 'input_ids', and the model knows"),
        ({"input_ids": IDS[:1], "labels": [[-100, 99]]}, "the id 99 in 'labels', .* to 95, and -100 where nothing is"),
        ({"input_ids": IDS[:1], "labels": [[-100, -7]]}, "the id -7 in 'labels', and the model knows"),
    ],
)
def test_rows_are_judged_as_they_are_read_where_footers_do_not_tell(tmp_path, columns, said):
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", write_statistics=False)
    dataset = StreamedDataset.open(str(tmp_path))
    for samples in (Streaming(dataset, 5, vocabulary=96), StreamedInOrder(dataset, 96)):
        with pytest.raises(UserError, match=f"0.parquet' has a row with {said}"):
            samples.sample(0)
    columns = {"input_ids": [[0, 95]], "labels": [[-100, 95]]}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", write_statistics=False)
    assert Streaming(StreamedDataset.open(str(tmp_path)), 5, vocabulary=96).sample(0)["labels"].tolist() == [-100, 95]


def test_a_column_of_one_number_a_row_says_nothing_of_documents(tmp_path):
    rows = {"input_ids": IDS, "seq_idx": [4, 4], "segment_ids": [[0, 0], [0, 1]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert StreamedDataset.open(str(tmp_path)).documents == "segment_ids"


def test_labels_of_which_some_footers_do_not_tell_may_be_learned(tmp_path):
    for name, labels in {"a": [[-100, -100]] * 2, "b": [[-100, 2]] * 2}.items():
        table = pa.table({"input_ids": IDS, "labels": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet", write_statistics=name == "a")
    assert StreamedDataset.open(str(tmp_path)).token_ids() == (1, 4)


def test_footers_tell_the_ids_of_labels_too(tmp_path):
    columns = {"input_ids": IDS, "labels": [[-100, 9], [-100, 2]], "attention_mask": [[1, 1]] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert StreamedDataset.open(str(tmp_path)).token_ids() == (1, 9)


def train(case: Case, folder: Path, steps: int, resume: Path | None = None) -> None:
    args = arguments(dataclasses.replace(case, documents=True), folder)
    dataset = open_sources([WeightedDataset(str(folder / "stream"), 0.5), WeightedDataset(str(folder / "data"), 0.5)])
    checkpoint = CheckpointConfig(folder / "checkpoints", interval=0, resume=resume)
    Trainer(
        dataclasses.replace(
            args, dataset=DatasetConfig(dataset, document_mask=True), max_train_steps=steps, checkpoint=checkpoint
        )
    ).run()


def test_a_mixture_with_a_stream_trains_as_the_plain_loop_and_goes_on_elsewhere(tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data", starts=[[0, 1 + row % 31] for row in range(80)])
    (tmp_path / "stream").mkdir()
    tokens = [[(3 * row + 5 * place) % tiny.VOCABULARY for place in range(tiny.LENGTH)] for row in range(17)]
    positions = [[place % (2 + row) for place in range(tiny.LENGTH)] for row in range(17)]
    table = pa.table({"input_ids": tokens, "position_ids": positions})
    pq.write_table(table, tmp_path / "stream" / "a.parquet", row_group_size=5)
    dataset = open_sources(
        [WeightedDataset(str(tmp_path / "stream"), 0.5), WeightedDataset(str(tmp_path / "data"), 0.5)]
    )
    drawn = [samples_of(dataset, SEED).sample(number) for number in range(20)]
    rows = np.empty((20, tiny.LENGTH), dtype=np.int64)
    order = np.random.default_rng((SEED, 0)).permutation(20)
    rows[order] = [row["input_ids"] for row in drawn]
    starts = {place: row["document_starts"] for place, row in zip(order, drawn)}
    losses, *_ = plain_loop(rows, [4, 4, 2, 2, 2], [starts[place] for place in range(20)])
    run(2, train, Case(1, 2, accumulation=2), tmp_path, 2, init=False)
    run(1, train, Case(1, 1, accumulation=2), tmp_path, 5, latest_checkpoint(tmp_path / "checkpoints"), init=False)
    found = [
        json.loads(line)["loss"]
        for path in sorted((tmp_path / "runs").iterdir(), reverse=True)
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert found == pytest.approx(losses, rel=TOLERANCE)


def complaint(folder: Path) -> str:
    """What a run on a stream ends with on this rank."""
    args = dataclasses.replace(arguments(Case(1, 2), folder), dataset=DatasetConfig(StreamedDataset.open(str(folder))))
    with pytest.raises(UserError) as raised:
        Trainer(args).run()
    return str(raised.value)


def test_a_row_that_one_copy_reads_ends_the_run_on_all_ranks_with_what_is_wrong(tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    ids = np.zeros((5, tiny.LENGTH), np.int32)
    ids[3, 5] = tiny.VOCABULARY
    pq.write_table(pa.table({"input_ids": ids.tolist()}), tmp_path / "a.parquet", write_statistics=False)
    mine, other = run(2, complaint, tmp_path, init=False)
    assert mine == other
    assert f"a.parquet' has a row with the id {tiny.VOCABULARY} in 'input_ids'" in mine
