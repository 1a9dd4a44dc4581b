"""The longest sequence with which 8B trains on few devices, and its predicted speed: planned, not run.

    python benchmarks/longest.py --json benchmarks/results/longest.json
    python benchmarks/longest.py --json benchmarks/results/longest.json --devices 8 --kinds h100

Of Llama-3 8B, bf16, one sequence a step, for each number of H100 (80 GB) and H200: the greatest multiple of 32,768
tokens for which a plan fits, within 80 % of 128 GiB of host memory a device, or of 1.9 TB a node. Published beside it:
ALST and UPipe, 8B with exact attention on hosts of 1.9 TB. Rows of the file that are not asked for stay as they are;
where there is a row, the search begins at its length.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import environment, print_rows, write
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.command import ArgumentParser, run
from nnscaler.compiler import Source
from nnscaler.config import ComputeConfig
from nnscaler.models import load_config
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.plan import GIB, Plan
from nnscaler.planner import NothingFits
from nnscaler.planning import plan_for
from nnscaler.report.arithmetic import model_flops
from nnscaler.report.values import Work, rounded, speed_of
from nnscaler.trace import trace

MODEL, STEP = "meta-llama/Meta-Llama-3-8B", 32_768
HOSTS = {"128 GiB a device": lambda devices: 128 * GIB, "1.9 TB a node": lambda devices: 1.9e12 / devices}
PUBLISHED = {  # tokens
    ("h100", 1): {"ALST": 500_000},
    ("h200", 1): {"ALST": 1_200_000},
    ("h100", 8): {"ALST": 3_800_000, "UPipe": 5_000_000},
}
SEARCH_SECONDS = 10.0  # of processor time, for one length


def main() -> None:
    flags = ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="how many (default: 1 2 4 8)")
    flags.add_argument("--kinds", nargs="+", choices=("h100", "h200"), default=["h100", "h200"], help="of which kinds")
    flags.add_argument("--json", type=Path, help="file to write the results to (default: none)")
    args = flags.parse_args()
    known = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    rows = {(row["devices"], row["host"]): row for row in known}
    for devices in args.devices:
        for kind in args.kinds:
            for host, size in HOSTS.items():
                name = f"{devices} x {kind.upper()}"
                before = rows.get((name, host), {}).get("tokens")
                row = _row(kind, devices, host, 0.8 * size(devices) / GIB, before)
                rows[name, host] = {"devices": name, **row, "revision": environment()["revision"]}
                if args.json:
                    write(args.json, {"model": MODEL, "predicted": True, "rows": _ordered(rows)})
    names = dict.fromkeys(name for row in rows.values() for name in row)  # where nothing fits, a row has few
    print_rows([{name: row.get(name, "") for name in names} for row in _ordered(rows)])


def _ordered(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], [*HOSTS].index(key[1])))]


def _row(kind: str, devices: int, host: str, host_gib: float, before: int | None) -> dict[str, Any]:
    """`before`: tokens that the row had."""
    started = time.perf_counter()
    published = PUBLISHED.get((kind, devices), {})
    config = ComputeConfig(
        devices, devices, hardware=kind, host_mem_constraint=host_gib, search_seconds=SEARCH_SECONDS
    )  # fmt: skip
    first = (before or max(published.values(), default=500_000 * devices)) // STEP
    found = longest(lambda steps: _plan(config, steps * STEP), first)
    if found is None:
        return {"host": host, "tokens": 0}
    steps, plan = found
    row: dict[str, Any] = {
        "host": host,
        "tokens": steps * STEP,
        **_speed(config, steps * STEP, plan),
        "memory_gib": round(plan.memory_bytes / GIB, 1),
    }
    row["host_gib"] = round(plan.host_bytes / GIB, 1)
    row["published"] = ", ".join(f"{who} {length:,}" for who, length in published.items())
    print(f"{devices} x {kind}: {row}, found in {time.perf_counter() - started:.0f} s", flush=True)
    return row


def longest(plan: Callable[[int], Plan | None], first: int) -> tuple[int, Plan] | None:
    """The greatest number for which there is a plan, and the plan: looked for around `first`, in steps that double."""
    best: tuple[int, Plan] | None = None
    fits, too_long, tried, step = 0, 0, first, 1
    while too_long != fits + 1:
        found = plan(tried)
        if found is None:
            too_long = tried
        else:
            fits, best = tried, (tried, found)
        if fits and too_long:
            tried = (fits + too_long) // 2
        else:
            tried, step = (fits + step) if fits else max(too_long - step, 1), 2 * step
    return best


def _plan(config: ComputeConfig, tokens: int) -> Plan | None:
    model_config = load_config(MODEL)
    prepare_config(model_config, tokens, "auto")
    inputs = {name: torch.empty((1, tokens), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    model, buffers = Source(lambda: CausalLM(model_config, chunk_linear_cross_entropy), inputs).build()
    try:
        plan = plan_for(trace(model, inputs, buffers), config, config.find_hardware(), None)
    except NothingFits:
        return None
    assert isinstance(plan, Plan)
    return plan


def _speed(config: ComputeConfig, tokens: int, plan: Plan) -> dict[str, Any]:
    work = Work(tokens, model_flops(plan.graph, tokens), config.find_hardware().peak(torch.bfloat16))
    return rounded(speed_of(plan.step_seconds * config.plan_ngpus, work))


if __name__ == "__main__":
    logging.getLogger("nnscaler").setLevel(logging.ERROR)
    run(main)
