"""Measures bookcorpus.py: its speed against the tokenizer's own encode_batch, or its memory on a large corpus.

    python examples/shakespeare.py --output quickstart
    python benchmarks/tokenize_text.py --tokenizer quickstart/tokenizer --text quickstart/plays
    python benchmarks/tokenize_text.py --tokenizer quickstart/tokenizer --text quickstart/plays --memory 0.02 0.25

Speed: both tokenise the same documents on all cores, in turns, in one process. encode_batch has all texts in memory and
leaves its result there; ours reads a file, and writes the packed dataset. Conversations are made of the text's lines,
some a turn; encode_batch gets them as the template writes them. Memory: bookcorpus.py, which is one process, runs by
itself on the text, repeated to the size asked for, and the kernel counts the most resident memory that it has. Three
shapes of a GB take as long as three times a GB at the speeds above: a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import CORES, ROOT, print_rows, write
from nnscaler import hub
from nnscaler.command import ArgumentParser, run
from nnscaler.data.conversations import Columns, Speech, pack_conversations
from nnscaler.data.pack import pack
from nnscaler.data.sources import Corpus, find_corpus
from nnscaler.errors import UserError

logger = logging.getLogger("tokenize_text")

BOOKCORPUS = ROOT / "bookcorpus.py"
SEQUENCE_LENGTH = 4096
_TURN = "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
_SAID = "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
PLAIN = f"{{% for message in messages %}}{_TURN}{{% endfor %}}{_PROMPT}"
MARKED = (
    f"{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{_SAID}{{% else %}}{_TURN}{{% endif %}}"
    f"{{% endfor %}}{_PROMPT}"
)


def main() -> None:
    flags = ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--tokenizer", required=True, help="tokenizer: a directory, or a model on the hub. Required")
    flags.add_argument("--text", required=True, help="text: a file or folder that bookcorpus.py reads. Required")
    flags.add_argument("--repeats", type=int, default=5, help="measurements of each speed, a number")
    flags.add_argument(
        "--memory", type=float, nargs="+", metavar="GB", help="measure the memory on so many GB of text instead"
    )
    flags.add_argument("--json", help="file to write the results to (default: none)")
    args = flags.parse_args()
    texts = ["".join(document) for document in find_corpus(args.text).documents()]
    if not any(texts):
        raise UserError(f"{args.text} holds no text")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        if args.memory is None:
            given = texts, args.tokenizer, args.repeats, Path(directory)
            measured = chain(measure_speed(*given), measure_conversations(*given))
        else:
            sizes: list[float] = args.memory
            measured = chain(*(measure_memory(texts, args.tokenizer, size, Path(directory)) for size in sizes))
        for row in measured:
            logger.info("%s", row)
            rows.append(row)
    print_rows(rows)
    if args.json:
        write(Path(args.json), {"cores": CORES, "rows": rows})


def shapes(texts: list[str]) -> dict[str, list[str]]:
    """The same text as documents of different lengths."""
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return {"as it is": texts, "a line a document": lines, "all in one document": ["".join(texts)]}


def measure_speed(texts: list[str], tokenizer_name: str, repeats: int, directory: Path) -> Iterator[dict[str, Any]]:
    tokenizer = hub.load_tokenizer(tokenizer_name)
    for shape, documents in shapes(texts).items():
        file, out = directory / f"{shape}.jsonl", directory / "packed"
        write_rows(file, documents, size=0)

        def encode_batch(documents: list[str] = documents) -> int:
            return sum(len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch(documents))

        def ours(file: Path = file, out: Path = out) -> int:
            packing = pack(Corpus([file]), tokenizer, out, SEQUENCE_LENGTH, CORES, provenance={})
            shutil.rmtree(out)
            return packing.tokens

        theirs_seconds, our_seconds = [], []
        for _ in range(repeats):
            theirs_seconds.append(seconds(encode_batch))
            our_seconds.append(seconds(ours))
        size = sum(len(text.encode()) for text in documents) / 1e6
        theirs, mine = (size / statistics.median(measured) for measured in (theirs_seconds, our_seconds))
        yield {
            "documents": f"{len(documents):,} {shape}",
            "encode_batch MB/s": round(theirs, 2),
            "bookcorpus MB/s": round(mine, 2),
            "ratio": round(mine / theirs, 2),
        }


def conversations(texts: list[str]) -> list[list[dict[str, str]]]:
    """The text's lines as turns of four lines, six turns a conversation."""
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    turns = ["".join(lines[start : start + 4]) for start in range(0, len(lines), 4)]
    roles = ("user", "assistant")
    return [
        [{"role": roles[place % 2], "content": one} for place, one in enumerate(turns[start : start + 6])]
        for start in range(0, len(turns), 6)
    ]


def measure_conversations(
    texts: list[str], tokenizer_name: str, repeats: int, folder: Path
) -> Iterator[dict[str, Any]]:
    tokenizer = hub.load_tokenizer(tokenizer_name)
    talks = conversations(texts)
    file, out = folder / "talk.jsonl", folder / "packed"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    for kind, template in (("marked", MARKED), ("without marks", PLAIN)):
        speech = Speech(tokenizer, Columns("messages"), template, all_learned=False)
        rendered = [speech.render(({"messages": talk}, "")).text for talk in talks]

        def encode_batch(rendered: list[str] = rendered) -> int:
            return sum(len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch(rendered))

        def ours(speech: Speech = speech) -> int:
            tokens = pack_conversations(
                Corpus([file]), speech, tokenizer, out, SEQUENCE_LENGTH, CORES, False, {}
            ).tokens
            shutil.rmtree(out)
            return tokens

        size = sum(len(text.encode()) for text in rendered) / 1e6
        pairs = [(seconds(encode_batch), seconds(ours)) for _ in range(repeats)]
        theirs, mine = (size / statistics.median(measured) for measured in zip(*pairs))
        yield {
            "documents": f"{len(talks):,} conversations, template {kind}",
            "encode_batch MB/s": round(theirs, 2),
            "bookcorpus MB/s": round(mine, 2),
            "ratio": round(mine / theirs, 2),
        }


def seconds(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_memory(texts: list[str], tokenizer: str, gigabytes: float, directory: Path) -> Iterator[dict[str, Any]]:
    for shape, documents in shapes(texts).items():
        whole = shape == "all in one document"
        file, out = directory / ("text.txt" if whole else "text.jsonl"), directory / shape
        size = (write_text if whole else write_rows)(file, documents, size=gigabytes * 1e9)
        command = [
            sys.executable,
            str(BOOKCORPUS),
            "--data_path_or_name",
            str(file),
            "--save_path",
            str(out),
        ]
        command += ["--tokenizer_path_or_name", tokenizer, "--sequence_length", str(SEQUENCE_LENGTH)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, most_resident_bytes(process.pid))
            time.sleep(0.1)
        if process.returncode != 0:
            raise UserError(f"bookcorpus.py failed with status {process.returncode}")
        yield {
            "documents": shape,
            "text GB": round(size / 1e9, 3),
            "peak memory GB": round(peak / 1e9, 3),
        }
        file.unlink()
        shutil.rmtree(out)


def write_rows(file: Path, documents: list[str], size: float) -> int:
    """Writes the documents as JSON lines, again and again until there are `size` bytes of text; returns the bytes."""
    return _write_repeated(file, [json.dumps({"text": text}) + "\n" for text in documents], documents, size)


def write_text(file: Path, documents: list[str], size: float) -> int:
    return _write_repeated(file, documents, documents, size)


def _write_repeated(file: Path, written: list[str], documents: list[str], size: float) -> int:
    once, total = sum(len(text.encode()) for text in documents), 0
    with open(file, "w", encoding="utf-8") as out:
        while total == 0 or total < size:
            out.writelines(written)
            total += once
    return total


def most_resident_bytes(process: int) -> int:
    """The most resident memory that a process has had so far, as the kernel counts it; 0: it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    run(main)
