"""bookcorpus.py from text to a packed dataset: every format, every token, and bad input."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import bookcorpus
from nnscaler import hub
from nnscaler.command import run
from nnscaler.data import pack as packing_module
from nnscaler.data import readers
from nnscaler.data.sources import find_corpus
from nnscaler.errors import UserError

TEXTS = ["The first document.\n", 'A "quoted", second one,\nof two lines', "Third: äöü 漢字 😀 \r\n\t end"]
LONG_ENOUGH = "words to fill a sequence or two. " * 20


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


def tiny_tokenizer(**marks: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 281 ids that by itself adds bos and eos, cuts texts short and pads them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([LONG_ENOUGH], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def reference(tokenizer_path: Path) -> Any:
    """The token stream of documents, by the tokenizers library alone."""
    backend = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()

    def stream(texts: list[str]) -> list[int]:
        return [i for text in texts for i in [0, *backend.encode(text, add_special_tokens=False).ids, 1]]

    return stream


@pytest.fixture
def command(tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs bookcorpus.py in this process, with flags in place of or in addition to the usual ones."""

    def call(data: Path | str, **flags: Any) -> Path:
        usual = {"tokenizer_path_or_name": tokenizer_path, "save_path": tmp_path / "out", "sequence_length": 8}
        flags = {"data_path_or_name": data, **usual, **flags}
        monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *(f"--{name}={value}" for name, value in flags.items())])
        run(bookcorpus.main)
        return Path(flags["save_path"])

    return call


def ids(dataset_path: Path) -> list[int]:
    return np.array(datasets.load_from_disk(str(dataset_path))["input_ids"]).ravel().tolist()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of rows in the format that its suffix names."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif plain.suffix == ".csv":
        with open(plain, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain, row_group_size=2)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_rows_are_documents(suffix: str, compression: str, tmp_path: Path, command: Any, reference: Any) -> None:
    data = write_rows(tmp_path / f"rows{suffix}{compression}", [{"id": str(i), "text": t} for i, t in enumerate(TEXTS)])
    expected = reference(TEXTS)
    assert ids(command(data)) == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_text_files_of_a_folder_are_documents_in_sorted_order(
    compression: str, tmp_path: Path, command: Any, reference: Any
) -> None:
    folder = tmp_path / "folder"
    for name, text in zip(["b/deep/x.md", "a.txt", "b/y.txt"], TEXTS, strict=True):
        path = folder / (name + compression)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if compression else text.encode())
    (folder / ".hidden.txt").write_text("not this")
    (folder / "image.png").write_text("nor this")
    expected = reference([TEXTS[1], TEXTS[0], TEXTS[2]])
    assert ids(command(folder)) == expected[: len(expected) // 8 * 8]


def test_dataset_and_provenance(
    tmp_path: Path, command: Any, reference: Any, capsys: pytest.CaptureFixture[str], tokenizer_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in ["", *TEXTS, None]])
    out = command(data, sequence_length=6)
    dataset = datasets.load_from_disk(str(out))
    ids_of_a_row, places = (datasets.List(datasets.Value("int32"), length=length) for length in (6, -1))
    assert dataset.features == datasets.Features({"input_ids": ids_of_a_row, "document_starts": places})
    tokens = len(reference(TEXTS))
    continued = [row for row, starts in enumerate(dataset["document_starts"]) if 0 not in starts]
    assert json.loads((out / "packing.json").read_text()) == {
        "data": str(data), "text_column": None, "split": None, "tokenizer": str(tokenizer_path),
        "vocab_size": 281, "bos_token_id": 0, "eos_token_id": 1, "sequence_length": 6,
        "documents": 3, "empty_documents": 2, "tokens": tokens, "sequences": tokens // 6, "tail": tokens % 6,
        "continued": len(continued),
        "replaced_characters": 0, "smallest_id": min(ids(out)), "largest_id": max(ids(out)),
    }  # fmt: skip
    assert len(dataset) == tokens // 6
    assert sorted(path.name for path in out.iterdir()) == [
        "data-00000-of-00001.arrow", "dataset_info.json", "packing.json", "state.json",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "documents  3; skipped because they are empty: 2" in printed
    assert re.search(rf"tokens     {tokens:,} with bos and eos, [\d,]+ tokens/s", printed)
    assert f"sequences  {tokens // 6} of 6 tokens" in printed
    assert f"continued  {len(continued)} sequences beginning within a document" in printed
    assert f"tail       {tokens % 6} tokens" in printed
    assert "tokens/s" in printed


def test_every_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "BATCH", 500)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} " * (i % 50)} for i in range(600)])
    files = []
    for threads in (1, 2, 7):
        out = command(data, num_proc=threads, save_path=tmp_path / f"out{threads}")
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] == files[2]


def test_text_that_spells_special_tokens_stays_text(tmp_path: Path, command: Any) -> None:
    (tmp_path / "a.txt").write_text("<s> and </s>" * 30)
    stream = ids(command(tmp_path / "a.txt", sequence_length=2))
    assert stream[0] == 0
    assert stream.count(0) == 1
    assert 1 not in stream[:-1]


@pytest.mark.parametrize("name", ["odd.jsonl", "odd.json"])
def test_any_text_is_text(name: str, tmp_path: Path, command: Any, reference: Any) -> None:
    odd = '"\\u0000 nul, \\ud800 half a pair, \\ud83d\\ude00 a pair, \\udbff\\udfff the last one, \\udc00"'
    (tmp_path / name).write_text(f'{{"text": {odd}}}')
    expected = reference(["\0 nul, \ufffd half a pair, 😀 a pair, \U0010ffff the last one, \ufffd"])
    assert ids(command(tmp_path / name)) == expected[: len(expected) // 8 * 8]


def test_bytes_that_are_not_utf8_are_replaced_and_counted(
    tmp_path: Path, command: Any, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    expected = reference(["caf\ufffd " * 10])
    out = command(tmp_path / "latin.txt")
    assert ids(out) == expected[: len(expected) // 8 * 8]
    assert "replaced   10 characters that could not be read, in " in capsys.readouterr().out
    assert json.loads((out / "packing.json").read_text())["replaced_characters"] == 10
    expected = reference(["café " * 10])
    assert (
        ids(command(tmp_path / "latin.txt", encoding="latin-1", save_path=tmp_path / "told"))
        == (expected[: len(expected) // 8 * 8])
    )


ENCODED = [
    ("a.txt", "utf-16"), ("a.txt", "utf-16-le"), ("a.txt", "utf-16-be"), ("a.txt", "utf-8-sig"), ("a.txt", "utf-32"),
    ("a.jsonl", "utf-16"), ("a.json", "utf-16"), ("a.csv", "utf-16"), ("a.jsonl", "utf-8-sig"), ("a.txt.gz", "utf-16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "encoding"), ENCODED)
def test_first_bytes_say_the_encoding(name: str, encoding: str, tmp_path: Path, command: Any, reference: Any) -> None:
    text = "The text, with äöü, " * 5
    row = json.dumps({"text": text}, ensure_ascii=False)
    content = {".jsonl": row + "\n", ".json": f"[{row}]", ".csv": f'text\n"{text}"\n'}.get(Path(name).suffix, text)
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    expected = reference([text])
    assert ids(command(tmp_path / name)) == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id;text\n1;"{}"\n2;"{}"\n'),
        ("a.csv", "id\ttext\n1\t{}\n2\t{}\n"),
        ("a.tsv", "id\ttext\n1\t{}\n2\t{}\n"),
        ("a.tsv.gz", "id, or number\ttext\n1\t{}\n2\t{}\n"),
        ("a.csv", 'id,text\n1,"{}"\n2,"{}"\n'),
        ("a.csv", 'text\n"{}"\n"{}"\n'),
        # The fiftieth line ends within a row, and commas divide the header into more fields.
        ("a.csv", 'id, or number, or so;text\n1;"{}"\n' + "\n" * 47 + '"2\n";"{}"\n'),
        ("a.jsonl", '{{"data": {{"text": "{}"}}}}\n{{"data": {{"text": "{}"}}}}\n'),
    ],
)
def test_fields_of_rows(name: str, content: str, tmp_path: Path, command: Any, reference: Any) -> None:
    texts = ["hello; one, two and three", "a | b; c, d"]
    data = content.format(*texts).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    flags = {"text_column": "data.text"} if name == "a.jsonl" else {}
    expected = reference(texts)
    assert ids(command(tmp_path / name, **flags)) == expected[: len(expected) // 8 * 8]


def test_what_is_read_of_a_folder_with_links_and_a_card(
    tmp_path: Path, command: Any, reference: Any, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level("INFO")
    data, other = tmp_path / "data", tmp_path / "other"
    for path, text in ((data / "a" / "x.txt", "first " * 9), (other / "deep" / "y.txt", "second " * 9)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (data / "linked").symlink_to(other)  # another folder: read
    (data / "again").symlink_to(data / "a")  # one that is there already: not twice
    (other / "deep" / "round").symlink_to(data)  # a loop
    (data / "z.txt").symlink_to(data / "a" / "x.txt")
    (tmp_path / "third.txt").write_text("third " * 9)
    (data / "one.txt").symlink_to(tmp_path / "third.txt")
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", ".gitattributes", "picture.png", "empty.jsonl"):
        (data / name).write_text("")
    expected = reference(["first " * 9, "second " * 9, "third " * 9])
    assert ids(command(data)) == expected[: len(expected) // 8 * 8]
    assert "left out 3 files about the data (" in caplog.text
    assert "README.md" in caplog.text
    assert "left out 1 file of other types (.png)" in caplog.text
    assert "left out 1 file that links lead to a second time (z.txt)" in caplog.text
    assert f"no text    in {data}/empty.jsonl" in capsys.readouterr().out


def test_the_only_column_of_strings_is_the_text(tmp_path: Path, command: Any, reference: Any) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "body": LONG_ENOUGH}, {"body": "more", "title": "not this"}])
    expected = reference([LONG_ENOUGH, "more"])  # the first row says which
    assert ids(command(data)) == expected[: len(expected) // 8 * 8]


def test_text_column_chooses(tmp_path: Path, command: Any, reference: Any) -> None:
    data = write_rows(tmp_path / "rows.parquet", [{"text": "not this", "body": LONG_ENOUGH}])
    expected = reference([LONG_ENOUGH])
    assert ids(command(data, text_column="body")) == expected[: len(expected) // 8 * 8]


def test_split_chooses_files_of_a_folder(tmp_path: Path, command: Any, reference: Any) -> None:
    for name in ("train/a.txt", "test-00000.txt", "testing.txt", "deep/test/b.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 10)
    expected = reference(["deep/test/b.txt" * 10, "test-00000.txt" * 10])
    assert ids(command(tmp_path / "data", split="test")) == expected[: len(expected) // 8 * 8]


def test_a_short_file_s_last_row_tells_its_delimiter() -> None:
    lines = ["id, or number;text\n", '1;"a, b, c"\n']
    assert readers._delimiter(Path("a.csv"), lines) == ";"
    assert readers._delimiter(Path("a.csv"), lines[:1]) == ",", "the likelier"


def test_a_damaged_json_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 1000)
    (tmp_path / "a.json").write_text('[{"text": y}, ' + '{"text": "x"}, ' * 20_000 + "]")
    with open(tmp_path / "a.json", "rb") as file:
        same_place = os.dup(file.fileno())
        with pytest.raises(UserError, match=r"line 1: not JSON"):
            list(readers.read_documents(tmp_path / "a.json", file, None, None))
    assert os.lseek(same_place, 0, os.SEEK_CUR) < 50_000
    os.close(same_place)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_row_longer_than_what_is_read_at_once(suffix: str, tmp_path: Path) -> None:
    texts = ["a short one", "a long one, " * 25_000, "the last"]
    csv.field_size_limit(131072)  # the default, which is less
    data = write_rows(tmp_path / f"rows{suffix}", [{"text": text} for text in texts])
    assert list(find_corpus(str(data)).documents()) == texts


# What is wrong, the file (name and content) or None for a good one, other flags, and what the one line must say.
BAD_INPUT: list[tuple[str, tuple[str, bytes] | None, dict[str, Any], list[str]]] = [
    ("no text column", ("a.jsonl", b'{"title": "x", "body": "y"}'), {}, ["line 1", "title, body", "--text_column"]),
    ("one of two", ("a.jsonl", b'{"id": 1, "a": "x", "b": "y"}'), {}, ["choose one of a, b with --text_column"]),
    (
        "forgotten flag",
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}'),
        {},
        ["line 1", "no column holds text; the row has messages; --messages_column names one of conversations"],
    ),
    (
        "conversations as text",
        ("a.jsonl", b'{"messages": [{"role": "user"}]}'),
        {"text_column": "messages"},
        ["line 1", "'messages' holds list, not text; --messages_column"],
    ),
    ("wrong text column", ("a.csv", b"id,text\n1,x"), {"text_column": "txt"}, ["'txt'", "id, text"]),
    ("column of numbers", ("a.jsonl", b'{"text": "x"}\n{"text": 5}'), {}, ["line 2", "'text' holds int"]),
    ("rows that are no objects", ("a.jsonl", b"[1]"), {}, ["line 1", "list"]),
    ("damaged jsonl", ("a.jsonl", b'{"text": "x"}\n\n{"text": y}'), {}, ["a.jsonl, line 3", "not JSON"]),
    ("damaged json", ("a.json", b'[{"text": "x"},\n{"text": y}]' + b" " * 99), {}, ["a.json, line 2", "not JSON"]),
    ("truncated json", ("a.json", b'[{"text": "x"},\n{"text": "'), {}, ["a.json, line 2", "not JSON"]),
    ("unclosed json", ("a.json", b'[{"text": "x"},\n'), {}, ["a.json, line 2", "inside a list"]),
    ("deep json", ("a.json", b'{"a":' * 100_000), {}, ["a.json, line 1", "not JSON"]),
    ("short csv row", ("a.csv", b"id,text\n1,x\n2"), {}, ["a.csv, line 3", "shorter"]),
    ("open csv quote", ("a.csv", b'text\n"x\n'), {}, ["a.csv, line 2", "not CSV"]),
    ("damaged gzip", ("a.txt.gz", b"not gzip"), {}, ["a.txt.gz, near line 1", "gzip"]),
    ("truncated gzip", ("a.txt.gz", gzip.compress(b"line\n" * 90_000)[:-20]), {}, ["a.txt.gz, near line", "gzip"]),
    ("truncated gzip rows", ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-9]), {}, ["a.jsonl.gz, near", "gzip"]),
    ("damaged parquet", ("a.parquet", b"PAR1 and nothing"), {}, ["a.parquet"]),
    ("unknown type", ("a.docx", b"x"), {}, ["a.docx", ".jsonl"]),
    ("long csv row", ("a.csv", b"text\nhello, world"), {}, ["a.csv, line 2", "2 fields, the header 1"]),
    ("binary", ("a.txt", bytes(range(256)) * 4), {}, ["a.txt", "is not text"]),
    ("pointer", ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), {}, ["git lfs pull"]),
    ("encoding", None, {"encoding": "utf-9"}, ["encoding is 'utf-9'"]),
    ("nested text", ("a.jsonl", b'{"text": {"en": "x"}}'), {}, ["line 1", "'text' holds dict"]),
    ("no text", ("a.txt", b""), {}, ["empty"]),
    ("too little text", ("a.txt", b"x"), {}, ["3 tokens", "one sequence of 8"]),
    ("split of a file", None, {"split": "train"}, ["split 'train'"]),
    ("short sequence", None, {"sequence_length": 1}, ["--sequence_length", "2"]),
    ("no sequence length", None, {"sequence_length": "x"}, ["--sequence_length", "'x'"]),
    ("no threads", None, {"num_proc": 0}, ["--num_proc", "1"]),
    ("no tokenizer", None, {"tokenizer_path_or_name": "no/such"}, ["tokenizer", "no/such", "hub cannot be reached"]),
]


@pytest.mark.parametrize(("file", "flags", "said"), [case[1:] for case in BAD_INPUT], ids=[c[0] for c in BAD_INPUT])
def test_bad_input_is_one_line(
    file: tuple[str, bytes] | None, flags: dict[str, Any], said: list[str], tmp_path: Path, command: Any, capfd: Any
) -> None:
    name, content = file or ("good.txt", LONG_ENOUGH.encode())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    refused(lambda: command(tmp_path / "data" / name, **flags), said, capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing half-written


def refused(call: Any, said: list[str], capfd: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        call()
    assert exit_.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    for words in said:
        assert words in lines[0]


@pytest.mark.parametrize("data", ["./no/such/folder", "missing.jsonl", "owner/name/more", "owner/name"])
def test_missing_data(data: str, command: Any, capfd: Any) -> None:
    refused(lambda: command(data), ["no such file", data], capfd)


def test_folder_without_readable_files_or_split(tmp_path: Path, command: Any, capfd: Any) -> None:
    refused(lambda: command(tmp_path), ["no file that can be read", ".parquet"], capfd)
    (tmp_path / "train.txt").write_text(LONG_ENOUGH)
    refused(lambda: command(tmp_path, split="validation"), ["no split 'validation'"], capfd)
    (tmp_path / "z.txt").symlink_to("nowhere")
    refused(lambda: command(tmp_path), ["z.txt"], capfd)


def test_a_tokenizer_without_eos(tmp_path: Path, command: Any, capfd: Any) -> None:
    tiny_tokenizer(bos_token="<s>").save_pretrained(tmp_path / "unmarked")
    (tmp_path / "a.txt").write_text(LONG_ENOUGH)
    call = lambda: command(tmp_path / "a.txt", tokenizer_path_or_name=tmp_path / "unmarked")  # noqa: E731
    refused(call, ["no eos token"], capfd)


def test_a_tokenizer_without_bos_marks_ends_alone(tmp_path: Path, command: Any, reference: Any) -> None:
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "unmarked")
    rows = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    out = command(rows, tokenizer_path_or_name=tmp_path / "unmarked")
    wanted = [one for one in reference(TEXTS) if one != 0]
    assert ids(out) == wanted[: len(wanted) // 8 * 8]
    assert json.loads((out / "packing.json").read_text())["bos_token_id"] is None


def test_an_existing_save_path_is_left_alone_unless_empty(tmp_path: Path, command: Any, capfd: Any) -> None:
    (tmp_path / "a.txt").write_text(LONG_ENOUGH)
    (tmp_path / "out").mkdir()
    command(tmp_path / "a.txt")
    before = (tmp_path / "out" / "state.json").read_bytes()
    capfd.readouterr()
    refused(lambda: command(tmp_path / "a.txt"), [str(tmp_path / "out"), "already exists"], capfd)
    assert (tmp_path / "out" / "state.json").read_bytes() == before


NEVER_NAMED = """
import threading
from pathlib import Path
import bookcorpus
Path.rename = lambda path, target: print(f"{path} is to be {target}", flush=True) or threading.Event().wait()
bookcorpus.main()
"""


def test_killed_before_the_end_leaves_nothing_that_looks_finished(tmp_path: Path, tokenizer_path: Path) -> None:
    """Even at the last moment: when all is written, and gets its name."""
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} {LONG_ENOUGH}"} for i in range(30)])
    flags = ["--data_path_or_name", tmp_path / "rows.jsonl", "--tokenizer_path_or_name", tokenizer_path]
    flags += ["--save_path", tmp_path / "out", "--sequence_length", "64"]
    command = [sys.executable, "-c", NEVER_NAMED, *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(bookcorpus.__file__).parent)
    said = process.stdout.readline().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    (written,) = tmp_path.glob("out.partial-*")
    assert said == f"{written} is to be {tmp_path / 'out'}\n"
    assert list(written.glob("*.arrow"))
    assert not (tmp_path / "out").exists()
