"""The longest sequence with which 8B trains on few devices, and its predicted speed: planned, not run.

    python benchmarks/longest.py --json benchmarks/results/longest.json
    python benchmarks/longest.py --json benchmarks/results/longest.json --devices 8 --kinds h200 --first 10000000 \\
        --processes 60

Of Llama-3 8B, bf16, one sequence a step, for each number of H100 (80 GB) and H200: the greatest multiple of 32,768
tokens for which a plan fits, within 80 % of 128 GiB of host memory a device, or of 1.9 TB a node. Published beside it:
ALST and UPipe, 8B with exact attention on hosts of 1.9 TB. Rows of the file that are not asked for stay as they are;
where there is a row, the search begins at its length. Several processes look for all rows at a time, and for each row
plan several lengths at a time.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
T = TypeVar("T")


def main() -> None:
    flags = ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="how many (default: 1 2 4 8)")
    flags.add_argument("--kinds", nargs="+", choices=("h100", "h200"), default=["h100", "h200"], help="of which kinds")
    flags.add_argument("--json", type=Path, help="file to write the results to (default: none)")
    flags.add_argument("--missing", action="store_true", help="leave out the rows that the file has")
    flags.add_argument("--first", type=int, help="tokens at which to begin where there is no row (default: a guess)")
    flags.add_argument("--processes", type=int, default=1, help="that plan at a time (default: 1)")
    args = flags.parse_args()
    known = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    rows = {(row["devices"], row["host"]): row for row in known}
    asked = [Asked(kind, devices, host) for devices in args.devices for kind in args.kinds for host in HOSTS]
    asked = [one for one in asked if not args.missing or (one.name, one.host) not in rows]
    at_once = max(1, args.processes // max(1, len(asked)))
    with (
        ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), _begin) as planners,
        ThreadPoolExecutor(min(args.processes, len(asked)) or 1) as searches,
    ):
        began = {
            searches.submit(
                _row, one, rows.get((one.name, one.host), {}).get("tokens") or args.first, planners, at_once
            ): one
            for one in asked
        }
        for found in as_completed(began):
            one = began[found]
            rows[one.name, one.host] = {"devices": one.name, **found.result(), "revision": environment()["revision"]}
            if args.json:
                write(args.json, {"model": MODEL, "predicted": True, "rows": _ordered(rows)})
    names = dict.fromkeys(name for row in rows.values() for name in row)  # where nothing fits, a row has few
    print_rows([{name: row.get(name, "") for name in names} for row in _ordered(rows)])


def _begin() -> None:
    """Of each process that plans."""
    logging.getLogger("nnscaler").setLevel(logging.ERROR)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Asked:
    """A row that is looked for."""

    kind: str
    devices: int
    host: str

    @property
    def name(self) -> str:
        return f"{self.devices} x {self.kind.upper()}"

    @property
    def config(self) -> ComputeConfig:
        host = 0.8 * HOSTS[self.host](self.devices) / GIB
        return ComputeConfig(
            self.devices, self.devices, hardware=self.kind, host_mem_constraint=host, search_seconds=SEARCH_SECONDS
        )  # fmt: skip


def _ordered(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], [*HOSTS].index(key[1])))]


def _row(asked: Asked, first: int | None, planners: Executor, at_once: int) -> dict[str, Any]:
    """`first`: tokens at which the search begins; None: a guess"""
    started = time.perf_counter()
    published = PUBLISHED.get((asked.kind, asked.devices), {})
    first = first or max(published.values(), default=500_000 * asked.devices)

    def plans(lengths: Sequence[int]) -> list[dict[str, Any] | None]:
        found = list(planners.map(_planned, [asked] * len(lengths), [steps * STEP for steps in lengths]))
        told = ", ".join(f"{steps * STEP:,} {'fits' if one else 'does not'}" for steps, one in zip(lengths, found))
        print(f"{asked.name}, {asked.host}, {time.perf_counter() - started:.0f} s: {told}", flush=True)
        return found

    found = longest(plans, max(1, first // STEP), at_once)
    if found is None:
        return {"host": asked.host, "tokens": 0}
    row = {"host": asked.host, "tokens": found[0] * STEP, **found[1]}
    return {**row, "published": ", ".join(f"{who} {length:,}" for who, length in published.items())}


def longest(plans: Callable[[Sequence[int]], Sequence[T | None]], first: int, at_once: int = 1) -> tuple[int, T] | None:
    """The greatest number for which there is a plan, and the plan.

    plans    numbers, in ascending order -> a plan of each, None where there is none
    at_once  numbers that are tried at a time

    The numbers around `first` are tried, then those beyond, in steps that double, and then those between what fits and
    what does not.
    """
    best: tuple[int, T] | None = None
    begin = max(1, first - at_once // 2)
    fits, too_long, step, tried = 0, 0, 1, list(range(begin, begin + at_once))
    while too_long != fits + 1:
        found = dict(zip(tried, plans(tried)))
        for number, plan in found.items():
            if plan is not None:
                fits, best = number, (number, plan)
        too_long = min((number for number in tried if number > fits), default=too_long)
        if fits and too_long:
            inside = too_long - fits - 1
            count = min(at_once, inside)
            tried = [fits + (place + 1) * (inside + 1) // (count + 1) for place in range(count)]
        elif fits:
            tried, step = [fits + step * place for place in range(1, at_once + 1)], 2 * step
        else:
            below = range(1, at_once + 1)
            tried, step = sorted({max(1, too_long - step * place) for place in below}), 2 * step
    return best


def _planned(asked: Asked, tokens: int) -> dict[str, Any] | None:
    """What a row says of the plan for so many tokens; None: none fits."""
    config = asked.config
    plan = _plan(config, tokens)
    if plan is None:
        return None
    sizes = {"memory_gib": round(plan.memory_bytes / GIB, 1), "host_gib": round(plan.host_bytes / GIB, 1)}
    return {**_speed(config, tokens, plan), **sizes}


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
