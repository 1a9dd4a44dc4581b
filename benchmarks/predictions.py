"""What plans of Llama-3 8B for more GPUs should reach: compiled as `train.py` does, on a machine without a GPU.

    python benchmarks/predictions.py

The document's command on eight devices, the same without `--recompute_modules`, 32,768 tokens a device on two to eight,
and short sequences on copies of the model. Figures are predictions out of plan.json, from bundled figures;
results/train holds what was measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import RESULTS, ROOT, print_rows, write
from nnscaler.command import ArgumentParser, run

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
EVERYTHING_AGAIN = "--recompute_modules LlamaDecoderLayer"
# (what, hardware, devices, tokens, flags)
PLANS = [
    ("the document's command", "h100", 8, 131072, EVERYTHING_AGAIN),
    ("the document's command", "h200", 8, 131072, EVERYTHING_AGAIN),
    ("the planner's choice", "h100", 8, 131072, ""),
    ("the planner's choice", "h200", 8, 131072, ""),
    ("the planner's choice", "h200", 4, 131072, ""),
    ("32,768 tokens a device", "h200", 2, 65536, ""),
    ("32,768 tokens a device", "h200", 8, 262144, ""),
    ("131,072 tokens in all", "h200", 2, 131072, ""),
    ("4 copies, 2 sequences a micro-batch", "h200", 4, 8192, "--plan_ngpus 1 --micro_batch_size 2"),
]


def predicted(what: str, hardware: str, devices: int, tokens: int, flags: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shared = f"--run_mode compile --name plan --model_id {MODEL} --sequence_length {tokens} --enable-chunk-loss"
        places = f"--plan_ngpus {devices} --runtime_ngpus {devices} --hardware {hardware} --gen_savedir {folder}"
        command = [sys.executable, str(ROOT / "train.py"), *shared.split(), *places.split(), *flags.split()]
        subprocess.run([*command, "--grad_accumulation_steps", "4"], check=True, capture_output=True)
        plan = json.loads((Path(folder) / "plan" / "plan.json").read_text())
    figures = plan["predicted"]
    return {
        "plan": what,
        "devices": f"{devices} x {hardware.upper()}",
        "tokens": tokens,
        "tokens_per_second_per_gpu": figures["tokens_per_second_per_gpu"],
        "mfu": figures["mfu"],
        "mfu_causal": figures["mfu_causal"],
        "step_seconds": figures["step_seconds"],
        "memory_gib": figures["memory_bytes"] / 2**30,
    }


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    rows = [predicted(*plan) for plan in PLANS]
    print_rows(rows)
    write(RESULTS / "predictions.json", {"predicted": True, "rows": rows})


if __name__ == "__main__":
    run(main)
