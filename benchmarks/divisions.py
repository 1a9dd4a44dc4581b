"""Whether the fastest division of a step is the one predicted to be: ten of them, on two GPUs, predicted and measured.

    python benchmarks/divisions.py --gpus 0,1,2,3

32 sequences of 8,192 tokens a step, eight layers of Llama-3 8B in bf16, in so little memory that some divisions have to
recompute: one copy of the model on both GPUs or one on each, in micro-batches of 1 to 16 sequences. See
`benchmarks/runs.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import RESULTS, print_rows
from benchmarks.runs import Setting, measured, parse
from benchmarks.tables import compared, paragraph, read_if_there, rst_table, title
from nnscaler.command import run

FILE = RESULTS / "divisions.json"
DEVICES, SEQUENCES, TOKENS, LAYERS, GIB = 2, 32, 8192, 8, 50
SETTINGS = [
    Setting(
        f"{devices}-devices-a-copy-{size}-a-micro-batch", DEVICES,
        f"--layers {LAYERS} --sequence_length {TOKENS} --gpu_mem_constraint {GIB} --search_seconds 20 "
        f"--plan_ngpus {devices} --micro_batch_size {size} "
        f"--grad_accumulation_steps {SEQUENCES * devices // DEVICES // size}",
        f"{'one copy' if devices == DEVICES else 'two copies'}, micro-batches of {size}", copies=True,
    )
    for devices in (1, 2)
    for size in (1, 2, 4, 8, 16)
]  # fmt: skip


def row(setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "devices": result["device"],
        "predicted_seconds": result["predicted_seconds_per_step"],
        "measured_seconds": result["seconds_per_step"],
        "predicted_gib": result["predicted_memory_gib"],
        "measured_gib": result["peak_memory_gib"],
        "host_gib": result["predicted_host_gib"],
        "recompute": result["recompute"],
        "flags": setting.flags,
        "steps": result["steps"],
    }


def behind(rows: list[dict[str, Any]]) -> float:
    """By which part of its time the division that is predicted to be the fastest is slower than the fastest."""
    chosen = min(rows, key=lambda row: float(row["predicted_seconds"]))
    return float(chosen["measured_seconds"] / min(row["measured_seconds"] for row in rows)) - 1


def in_short() -> list[str]:
    """What the front page says of it; nothing where it was not measured yet."""
    found = read_if_there(FILE.name)
    if found is None:
        return []
    late = behind(found["rows"])
    which = f"is {late:.1%} slower than the fastest" if late else "is the fastest"
    return [
        f"Of {len(found['rows'])} ways to divide a step on two GPUs, the one that is predicted to be fastest {which}."
    ]


def section() -> list[str]:
    """The table of all divisions; nothing where they were not measured yet."""
    found = read_if_there(FILE.name)
    if found is None:
        return []
    rows = [
        [
            row["what"],
            compared(row["predicted_seconds"], row["measured_seconds"], "s", 3),
            compared(row["predicted_gib"], row["measured_gib"], "GiB", 1),
        ]
        for row in sorted(found["rows"], key=lambda row: float(row["predicted_seconds"]))
    ]
    text = (
        f"Ways to divide {SEQUENCES} sequences of {TOKENS:,} tokens among two GPUs of which {GIB} GiB are used, for "
        f"{LAYERS} layers of Llama-3 8B in bf16; those that are predicted to be fastest come first "
        f"(``benchmarks/divisions.py``). The first one is {behind(found['rows']):.1%} slower than the fastest."
    )
    head = ["division", "step, predicted / measured", "memory, predicted / measured"]
    return [title("Divisions"), paragraph(text), rst_table(head, rows)]


def main() -> None:
    rows = measured(SETTINGS, parse(__doc__, FILE), row)
    rows = sorted(rows, key=lambda row: float(row["measured_seconds"]))
    predicted = sorted(row["predicted_seconds"] for row in rows)
    print_rows(
        [
            {
                "division, the fastest first": row["what"],
                "measured": row["measured_seconds"],
                "predicted": row["predicted_seconds"],
                "place by prediction": predicted.index(row["predicted_seconds"]) + 1,
            }
            for row in rows
        ]
    )
    print(f"{len(rows)} of {len(SETTINGS)}: the predicted best is {behind(rows):.1%} slower than the measured best")


if __name__ == "__main__":
    run(main)
