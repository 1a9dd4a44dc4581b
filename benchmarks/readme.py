"""Writes the measured sections of README.rst from the JSON files in benchmarks/results.

python benchmarks/readme.py            # writes them
python benchmarks/readme.py --check    # fails where the file differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, ROOT

README = ROOT / "README.rst"
DOCUMENT = "The document: 8 H100, 8B, 131,072 tokens: 1,594 tokens/s/GPU, 40.96 %"


def rst_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A simple table of reStructuredText."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = "  ".join("=" * width for width in widths)

    def cells(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

    return "\n".join([line, cells(head), line, *map(cells, rows), line])


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def trainings() -> list[dict[str, Any]]:
    return [read(f"train/{path.name}") for path in sorted((RESULTS / "train").glob("*.json"))]


def headline() -> str:
    best = max(trainings(), key=lambda one: float(one["mfu"]))
    loss = {row["loss"]: row for row in read("loss.json")["rows"]}
    ours, liger = loss["this project, chunks of 1024"], loss["Liger"]
    crash = read("crash.json")
    return "\n".join(
        [
            "Measured (the files are in ``benchmarks/results``, the scripts beside them):",
            "",
            f"* {describe(best)}: {best['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU,",
            f"  {best['mfu']:.1%} MFU by the document's formula ({best['mfu_causal']:.1%} causal), optimizer included",
            f"* the chunked loss, 16,384 tokens: {ours['milliseconds']:.1f} ms and {ours['gib']:.2f} GiB;",
            f"  Liger's in the same run {liger['milliseconds']:.1f} ms and {liger['gib']:.2f} GiB",
            f"* {crash['kills']} runs killed at random moments: all resumed, no complete checkpoint lost, no torn one",
            "  loaded",
        ]
    )


def describe(one: dict[str, Any]) -> str:
    layers = re.search(r"(\d+)layers", one["name"])
    layers_text = f"{layers[1]} layers of " if layers else ""
    return f"{layers_text}Llama-3 8B, {one['sequence_length']:,} tokens on {one['device'].replace('NVIDIA ', '')}"


def performance() -> str:
    rows = [
        [
            describe(one),
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu']:.1%} / {one['mfu_causal']:.1%}",
            f"{one['predicted_seconds_per_step']:.2f} / {one['seconds_per_step']:.2f} s",
            f"{one['predicted_memory_gib']:.1f} / {one['peak_memory_gib']:.1f} GiB",
            one.get("note", ""),
        ]
        for one in trainings()
    ]
    head = [
        "work",
        "tokens/s/GPU",
        "MFU full / causal",
        "step, predicted / measured",
        "memory, predicted / measured",
        "note",
    ]
    losses = [
        [row["loss"], f"{row['milliseconds']:.1f}", f"{row['gib']:.2f}"]
        for row in sorted(read("loss.json")["rows"], key=lambda row: float(row["milliseconds"]))
    ]
    return "\n\n".join(
        [
            f"{DOCUMENT} (its own figure, not measured here).",
            "Whole training steps by ``benchmarks/train_llama.py``, the plan found by the planner:",
            rst_table(head, rows),
            "Loss of 16,384 tokens, hidden size 4096, 128,256 words, forward and backward on one H200 "
            "(``benchmarks/loss.py``):",
            rst_table(["loss", "ms", "GiB above inputs"], losses),
        ]
    )


def filled(text: str) -> str:
    for name, content in (("headline", headline()), ("performance", performance())):
        pattern = re.compile(rf"(\.\. begin {name}\n).*?(\.\. end {name}\n)", re.DOTALL)
        text, count = pattern.subn(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)  # type: ignore[misc]
        assert count == 1, name
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args()
    text = README.read_text()
    if options.check:
        sys.exit(0 if filled(text) == text else "README.rst differs from benchmarks/results: run benchmarks/readme.py")
    README.write_text(filled(text))


if __name__ == "__main__":
    main()
