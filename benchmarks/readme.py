"""Writes the measured sections of README.rst from the JSON files in benchmarks/results.

python benchmarks/readme.py            # writes them
python benchmarks/readme.py --check    # fails where the file differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, ROOT

README = ROOT / "README.rst"
OURS = "this project, chunks of"
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
    """What was measured, whole models first, then by length."""
    found = [read(f"train/{path.name}") for path in (RESULTS / "train").glob("*.json")]
    return sorted(found, key=lambda one: (not whole(one), -one["sequence_length"], one["name"]))


def whole(one: dict[str, Any]) -> bool:
    return bool(one["name"].startswith("32layers"))


def peer(one: dict[str, Any]) -> float | None:
    """Tokens a second and GPU of torchtitan at the same work."""
    found = {
        row["sequence_length"]: float(row["tokens_per_second_per_gpu"]) for row in read("peers.json")["torchtitan"]
    }
    return found.get(one["sequence_length"]) if whole(one) else None


def headline() -> str:
    loss = {row["loss"]: row for row in read("loss.json")["rows"]}
    ours, small, liger = (loss[name] for name in (f"{OURS} 1024", f"{OURS} 768", "Liger"))
    crash, rivals = read("crash.json"), read("crash_rivals.json")
    compiles = {row["case"]: row for row in read("compile_time.json")["rows"]}
    ours_8b, large = compiles["8B-128K"], compiles["405B-plan-128"]["seconds"]
    return "\n".join(
        [
            "Measured (the files are in ``benchmarks/results``, the scripts beside them):",
            "",
            *[line for one in trainings() if whole(one) for line in headline_of(one)],
            f"* the chunked loss, 16,384 tokens: {cost(ours)}, or with chunks of 768 {cost(small)};",
            f"  Liger's in the same run {cost(liger)}",
            f"* compiling 8B at 131,072 tokens on two cores: {ours_8b['seconds']} s to plan and code,",
            f"  {ours_8b['time / export']} times one ``torch.export``; 405B's shape for 128 devices: {large} s",
            f"* {crash['kills']} runs killed at random moments: all resumed, no complete checkpoint lost, no torn one",
            f"  loaded; {rivals['kills']} in two jobs of one folder that torchrun restarts: neither ever continued the "
            "other",
        ]
    )


def cost(loss: dict[str, Any]) -> str:
    return f"{loss['milliseconds']:.1f} ms and {loss['gib']:.2f} GiB"


def headline_of(one: dict[str, Any]) -> list[str]:
    speed = f"{one['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU"
    titan = peer(one)
    beside = f"; torchtitan {titan:,.0f}" if titan else ""
    return [
        f"* {describe(one)}: {speed},",
        f"  {one['mfu']:.1%} MFU by the document's formula ({one['mfu_causal']:.1%} causal), whole steps{beside}",
    ]


def describe(one: dict[str, Any]) -> str:
    layers = re.search(r"(\d+)layers", one["name"])
    layers_text = f"{layers[1]} layers of " if layers and not whole(one) else ""
    return f"{layers_text}Llama-3 8B, {one['sequence_length']:,} tokens on {one['device'].replace('NVIDIA ', '')}"


def performance() -> str:
    rows = [
        [
            describe(one),
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu']:.1%} / {one['mfu_causal']:.1%}",
            compared(one["predicted_seconds_per_step"], one["seconds_per_step"], "s", 2),
            compared(one["predicted_memory_gib"], one["peak_memory_gib"], "GiB", 1),
            f"{titan:,.0f}" if (titan := peer(one)) else "",
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
        "torchtitan",
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
            beside_others(),
            "Predicted from bundled figures, not measured: 4 micro-batches (``benchmarks/predictions.py``):",
            predictions(),
            pipelines(),
            "Loss of 16,384 tokens, hidden size 4096, 128,256 words, forward and backward on one H200 "
            "(``benchmarks/loss.py``):",
            rst_table(["loss", "ms", "GiB above inputs"], losses),
            numerics(),
            ".. image:: benchmarks/results/numerics.png\n   :alt: loss by step of plain PyTorch and of four plans",
        ]
    )


def numerics() -> str:
    """How far the losses of plans are from plain PyTorch's, and how far those are from one another."""
    result = read("numerics.json")
    plain = [row["mean_difference"] for row in result["rows"] if row["run"].startswith("plain,")]
    plans = [row["mean_difference"] for row in result["rows"] if not row["run"].startswith("plain")]
    return textwrap.fill(
        f"The loss of {result['steps']} steps of a small Llama in bf16 on real text, by four plans on "
        f"{result['device']} and by plain PyTorch on one GPU (``benchmarks/numerics.py``). Plain PyTorch with other "
        f"micro-batches differs from itself by {plain[0]:.3f} on average over the second half; the plans differ from "
        f"it by {min(plans):.3f} to {max(plans):.3f}.",
        120,
    )


def predictions() -> str:
    rows = [
        [
            f"{row['tokens']:,} tokens on {row['devices']}",
            row["plan"],
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['mfu']:.1%} / {row['mfu_causal']:.1%}",
            f"{row['memory_gib']:.1f} GiB",
        ]
        for row in read("predictions.json")["rows"]
    ]
    return rst_table(["Llama-3 8B", "plan", "tokens/s/GPU", "MFU full / causal", "memory"], rows)


def pipelines() -> str:
    """The document's 70B setting."""
    plans = {plan["search"]: plan for plan in read("plan_70b.json")["plans"]}
    best, without = plans["every schedule"], plans["no pipeline"]
    return textwrap.fill(
        "Predicted for the document's 70B setting, 8,192 tokens on 16 MI300X, 64 micro-batches "
        f"(``benchmarks/plan_70b.py``): {best['plan']}, {best['step_seconds']:.1f} s a step, MFU {best['mfu']:.1%}; "
        f"without a pipeline {without['step_seconds']:.1f} s, {without['mfu']:.1%}. The document measured 100.3 s, "
        "24.2 %.",
        120,
    )


def beside_others() -> str:
    """What other programs did with the same work."""
    peers = read("peers.json")
    settings = "; ".join(row["setting"] for row in peers["torchtitan"])
    hand, ours = peers["by_hand"], read("train/4layers-131072-60GB.json")
    own = ours["seconds_per_step"] / ours["sequences_per_step"]
    return textwrap.fill(
        f"{peers['versions']}. torchtitan as its own step reports say (``benchmarks/results/peers.json``): {settings}; "
        "the first on the same machine in the same hour, the second on another of the kind: two differ by up to 2 %. A "
        f"plan of 4 layers and 131,072 tokens written by hand takes {hand['seconds_per_micro_batch']:.3f} s a "
        "micro-batch without gradient exchange, clipping and optimizer; on the same machine the planner's plan in "
        f"generated code takes {own:.3f} s with them.",
        120,
    )


def compared(predicted: float, measured: float, unit: str, digits: int) -> str:
    return f"{predicted:.{digits}f} / {measured:.{digits}f} {unit} = {predicted / measured:.2f}"


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
