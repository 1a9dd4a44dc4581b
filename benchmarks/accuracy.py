"""How exact predictions are: time and memory of 30 plans of a few layers of Llama-3 8B, predicted and measured.

    python benchmarks/accuracy.py --gpus 0,1,2,3 --seconds 560

Three lengths, bf16 and fp8, one GPU and two; memory is limited so that plans recompute, use the host, or gather weights
(ZeRO-3), and some are pipelines. Flags alone say so: the planner finds each plan. See `benchmarks/runs.py`.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import RESULTS, print_rows
from benchmarks.runs import Setting, measured, parse
from benchmarks.tables import compared, paragraph, read_if_there, rst_table, title
from nnscaler.command import run

FILE = RESULTS / "accuracy.json"
AGAIN, HOST, GATHERED = "recomputing", "host", "ZeRO-3"


def _settings() -> list[Setting]:
    """Those on two GPUs come first, so that no GPU waits for another in the end."""
    found = []
    for name, devices, what, flags in (
        # 8,192 tokens
        ("8k-zero3", 2, GATHERED, "--layers 8 --micro_batch_size 4 --offload off --gpu_mem_constraint 30"),
        ("8k-pipeline", 2, "pipeline", "--layers 8 --micro_batch_size 1 --grad_accumulation_steps 16 "
         "--explore_pipeline --pipeline_schedule 1f1b"),
        # 32,768 tokens
        ("32k-split-host", 2, f"split, {HOST}", "--layers 6 --gpu_mem_constraint 24"),
        ("32k-pipeline", 2, "pipeline", "--layers 4 --grad_accumulation_steps 8 "
         "--explore_pipeline --pipeline_schedule interleaved"),
        # 131,072 tokens
        ("128k-split", 2, "split", "--layers 4 --grad_accumulation_steps 1"),
        # one GPU
        ("8k-kept", 1, "all kept", "--layers 6 --micro_batch_size 1 --grad_accumulation_steps 8"),
        ("8k-large", 1, "all kept, large micro-batches", "--layers 4 --micro_batch_size 4"),
        ("8k-again", 1, AGAIN, "--layers 6 --micro_batch_size 4 --offload off --gpu_mem_constraint 50"),
        ("8k-host", 1, HOST, "--layers 8 --micro_batch_size 4 --gpu_mem_constraint 40"),
        ("32k-kept", 1, "all kept", "--layers 4 --grad_accumulation_steps 2"),
        ("32k-again", 1, AGAIN, "--layers 6 --grad_accumulation_steps 2 --offload off --gpu_mem_constraint 46"),
        ("32k-host", 1, HOST, "--layers 8 --grad_accumulation_steps 2 --gpu_mem_constraint 40"),
        ("128k-kept", 1, "all kept", "--layers 2 --grad_accumulation_steps 1"),
        ("128k-again", 1, AGAIN, "--layers 2 --grad_accumulation_steps 1 --offload off --gpu_mem_constraint 40"),
        ("128k-host", 1, HOST, "--layers 2 --grad_accumulation_steps 1 --gpu_mem_constraint 30"),
    ):  # fmt: skip
        length = {"8k": 8192, "32k": 32768, "128k": 131072}[name.partition("-")[0]]
        for precision in ("bf16", "fp8"):
            every = f"--sequence_length {length} --precision {precision} --search_seconds 20 {flags}"
            found.append(Setting(f"{name}-{precision}", devices, every, what, HOST in what))
    return found


SETTINGS = _settings()


def row(setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": int(setting.flags.partition("--layers ")[2].split()[0]),
        "tokens": result["sequence_length"],
        "devices": result["device"],
        "precision": result["precision"],
        "predicted_seconds": result["predicted_seconds_per_step"],
        "measured_seconds": result["seconds_per_step"],
        "predicted_gib": result["predicted_memory_gib"],
        "measured_gib": result["peak_memory_gib"],
        "host_gib": result["predicted_host_gib"],
        "recompute": result["recompute"],
        "pipeline": result["pipeline"],
        "flags": setting.flags,
        "steps": result["steps"],
    }


def error(row: dict[str, Any]) -> float:
    """By which part of the measured time the predicted one is wrong."""
    return abs(row["predicted_seconds"] / row["measured_seconds"] - 1)


def in_short() -> list[str]:
    """What the front page says of it; nothing where it was not measured yet."""
    found = read_if_there(FILE.name)
    if found is None:
        return []
    errors = [error(row) for row in found["rows"]]
    return [
        f"The time of a step of {len(errors)} plans (three lengths, bf16 and fp8, one and two GPUs, with host memory, "
        f"gathered weights and pipelines) is predicted with an error of {statistics.mean(errors):.1%} on average and "
        f"{max(errors):.1%} at worst."
    ]


def section() -> list[str]:
    """The table of all plans; nothing where they were not measured yet."""
    found = read_if_there(FILE.name)
    if found is None:
        return []
    rows = [
        [
            str(row["layers"]),
            f"{row['tokens']:,}",
            row["devices"].replace("NVIDIA ", ""),
            row["precision"],
            row["what"],
            compared(row["predicted_seconds"], row["measured_seconds"], "s", 3),
            f"{error(row):.1%}",
            compared(row["predicted_gib"], row["measured_gib"], "GiB", 1),
            f"{row['host_gib']:.0f} GiB" if row["host_gib"] else "",
        ]
        for row in found["rows"]
    ]
    errors = [error(row) for row in found["rows"]]
    text = (
        f"{len(rows)} plans of two to eight layers of Llama-3 8B, each found by the planner within the memory that it "
        "was given (``benchmarks/accuracy.py``). The error of a step's time is "
        f"{statistics.mean(errors):.1%} on average and {max(errors):.1%} at worst."
    )
    head = [
        "layers",
        "tokens",
        "devices",
        "in",
        "plan",
        "step, predicted / measured",
        "error",
        "memory, predicted / measured",
        "of the host, a device",
    ]
    return [title("Exactness"), paragraph(text), rst_table(head, rows)]


def main() -> None:
    rows = measured(SETTINGS, parse(__doc__, FILE), row)
    shown = ("name", "devices", "predicted_seconds", "measured_seconds", "predicted_gib", "measured_gib")
    print_rows([{**{key: row[key] for key in shown}, "error, %": 100 * error(row)} for row in rows])
    errors = [error(row) for row in rows]
    worst = max(rows, key=error)["name"]
    print(f"{len(rows)} of {len(SETTINGS)}: mean {statistics.mean(errors):.1%}, worst {max(errors):.1%} ({worst})")


if __name__ == "__main__":
    run(main)
