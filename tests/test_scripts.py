"""What the scripts do with their flags and print, where all that they call only writes down what it is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bookcorpus
import ckpt_merger
import train
from nnscaler.checkpoint.checksums import CorruptCheckpoint
from nnscaler.errors import UserError

STATE = SimpleNamespace(step=7, consumed=28)
CHECKPOINT = SimpleNamespace(state=STATE)
MERGING = "merging newest of c: step 7, 28 samples\n"


@pytest.fixture
def merged(monkeypatch, tmp_path):
    """Called with flags: what is asked for. A merged file has 1.5 MiB."""
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[object, ...]] = []
    damages: list[str] = []

    def merge(*given: object) -> None:
        asked.append(("merge", *given))
        Path(str(given[1])).write_bytes(b"x" * (3 * 2**19))

    def damaged(shards: bool) -> list[str]:
        asked.append(("judged", shards))
        return damages

    def read(folder: str) -> SimpleNamespace:
        assert folder == "newest of c"
        return SimpleNamespace(damages=damaged)

    monkeypatch.setattr("nnscaler.checkpoint.folder.latest_checkpoint", lambda folder: f"newest of {folder}")
    monkeypatch.setattr("nnscaler.checkpoint.merge.merge_to_file", merge)
    monkeypatch.setattr("nnscaler.checkpoint.export.export_model", lambda *given: asked.append(("export", *given)))
    opened = SimpleNamespace(open=lambda folder: {"newest of c": CHECKPOINT}[folder])
    monkeypatch.setattr("nnscaler.checkpoint.stored.Checkpoint", opened)
    monkeypatch.setattr("nnscaler.checkpoint.stored.describe", lambda found: ["tensors of", str(found.state.step)])
    monkeypatch.setattr("nnscaler.checkpoint.stored.describe_all", lambda folder: [f"all in {folder}", "newest"])
    monkeypatch.setattr("nnscaler.checkpoint.checksums.Checksums", SimpleNamespace(read=read))

    def call(*flags: str, damaged: tuple[str, ...] = ()) -> list[tuple[object, ...]]:
        asked.clear()
        damages[:] = damaged
        monkeypatch.setattr(sys, "argv", ["ckpt_merger.py", "--ckpt_dir", "c", *flags])
        ckpt_merger.main()
        return list(asked)

    return call


@pytest.mark.parametrize(("flags", "asked", "printed"), [
    ("--list", [], "all in c\nnewest\n"),
    ("--list --tensors", [], "all in c\nnewest\n\ntensors of\n7\n"),
    ("--verify", [("judged", True)], "newest of c: every file is as it was written\n"),
    ("--list --verify", [("judged", True)], "all in c\nnewest\nnewest of c: every file is as it was written\n"),
    ("--output_fname f", [("merge", CHECKPOINT, Path("f"), False)], f"{MERGING}wrote f (1.5 MiB)\n"),
    ("--output_dir d", [("export", CHECKPOINT, Path("d"), False)], f"{MERGING}wrote d\n"),
    (
        "--list --output_fname f --output_dir d --verify",
        [("merge", CHECKPOINT, Path("f"), True), ("export", CHECKPOINT, Path("d"), True)],
        f"all in c\nnewest\n{MERGING}wrote f (1.5 MiB) and read it again\nwrote d and read it again\n",
    ),
])  # fmt: skip
def test_what_is_made_of_a_checkpoint(merged, capsys, flags, asked, printed):
    assert merged(*flags.split()) == asked
    assert capsys.readouterr().out == printed


def test_all_that_is_damaged_is_listed(merged, capsys):
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint 'newest of c' has 2 damaged pieces$"):
        merged("--verify", damaged=("a is short", "b is gone"))
    assert capsys.readouterr().out == "a is short\nb is gone\n"


def test_where_nothing_can_be_written_is_said_before(merged):
    for flag, named in (("--output_fname", "output_fname's folder"), ("--output_dir", "output_dir")):
        with pytest.raises(UserError, match=rf"^{named} is '/dev/null.*', which cannot be written"):
            merged(flag, "/dev/null/x/y")


@pytest.mark.parametrize("kind", ["dataset_path", "eval_dataset_path"])
def test_datasets_are_there_or_behind_a_url(kind, tmp_path):
    def given(path: str) -> dict[str, object]:
        return {kind: (path,) if kind == "dataset_path" else path}

    for there in (str(tmp_path), "hf://datasets/owner/name"):
        inputs = train.Inputs("m", **given(there))
        assert ([one.path for one in inputs.sources], inputs.validation) == (
            ([there], None) if kind == "dataset_path" else ([], there)
        )
    with pytest.raises(UserError, match=rf"^{kind} is 'nowhere', which does not exist; make one with bookcorpus.py$"):
        train.Inputs("m", **given("nowhere"))


@pytest.mark.parametrize("threads", [None, 3])
def test_what_became_of_a_corpus_is_printed(monkeypatch, capsys, tmp_path, threads):
    monkeypatch.chdir(tmp_path)
    files = {Path("a"): 2, Path("b"): 1}
    corpora = iter([SimpleNamespace(replaced=files, silent=[Path("c")]), SimpleNamespace(replaced={}, silent=[])])
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr("nnscaler.data.sources.find_corpus", lambda *given: found.append(given) or next(corpora))
    monkeypatch.setattr("nnscaler.hub.load_tokenizer", lambda name: f"tokenizer {name}")

    def pack(options: bookcorpus.Options, *given: object):
        found.append(given[1:])
        yield "documents", "3"

    monkeypatch.setattr(bookcorpus, "pack_text", pack)
    flags = {"data_path_or_name": "d", "tokenizer_path_or_name": "t", "save_path": "out", "sequence_length": 8,
             "text_column": "body", "split": "test", "encoding": "latin-1"}  # fmt: skip
    flags |= {"num_proc": threads} if threads else {}
    monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *(f"--{name}={value}" for name, value in flags.items())])
    bookcorpus.main()
    assert found == [("d", "body", "test", "latin-1"), ("tokenizer t", threads or len(os.sched_getaffinity(0)))]
    assert capsys.readouterr().out == (
        "documents  3\nreplaced   3 characters that could not be read, in a, b\n"
        "           --encoding says how files of text are to be read\nno text    in c\nsaved to   out\n"
    )
    bookcorpus.main()
    assert capsys.readouterr().out == "documents  3\nsaved to   out\n"


@pytest.mark.parametrize(("change", "said"), [
    ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2 and at most 1,073,741,824"),
    ({"sequence_length": 2**30 + 1}, "sequence_length is 1073741825; it must be at least 2 and at most"),
    ({"num_proc": 4097}, "num_proc is 4097; it must be at least 1 and at most 4,096"),
    ({"too_long": "keep"}, "too_long is 'keep'; allowed are drop, cut"),
    ({"train_on": "user"}, "train_on is 'user'; allowed are assistant, all"),
])  # fmt: skip
def test_what_may_be_packed_is_judged_wherever_it_comes_from(change, said, tmp_path):
    given = {"data_path_or_name": "d", "tokenizer_path_or_name": "t", "save_path": str(tmp_path / "o")}
    assert bookcorpus.Options(**given, sequence_length=2**30, num_proc=4096).too_long == "drop"
    with pytest.raises(UserError, match=f"^{said}"):
        bookcorpus.Options(**{**given, "sequence_length": 8, **change})
