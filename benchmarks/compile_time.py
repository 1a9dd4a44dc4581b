"""Measures compiling, against one plain `torch.export` of the same unrolled model in the same run. Needs no GPU.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --cases 8B-128K 8B-8K --repeats 1

A compile is `train.py --run_mode compile` in a process of its own, from its start to its code on disk: wall time, CPU
time, and peak resident memory. The export's time is that of the call alone, without imports and building the model.
Every round measures everything once, one after the other; ratios are taken within a round, and medians over rounds.
Claims are about wall time; where other work keeps the machine busy, CPU time says more.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import CORES, RESULTS, ROOT, print_rows, write
from nnscaler.command import ArgumentParser, run
from nnscaler.errors import UserError
from nnscaler.models import load_config
from nnscaler.models.changes import changed_config

logger = logging.getLogger("compile_time")

BASE = "meta-llama/Meta-Llama-3-8B"
GIB = 2**30
EXPORT = "export"


@dataclass(frozen=True)
class Case:
    """One compile: changes to the 8B model's configuration, and flags of train.py."""

    sequence_length: int
    plan_ngpus: int
    runtime_ngpus: int
    changes: dict[str, str] = field(default_factory=dict)
    hardware: str = "h100"
    flags: tuple[str, ...] = ()


SHAPE_405B = {
    "num_hidden_layers": "126", "hidden_size": "16384", "intermediate_size": "53248",
    "num_attention_heads": "128", "num_key_value_heads": "8",
}  # fmt: skip
FITTING = ("a100", "h100", "h200", "mi250")  # of the bundled devices, those on which 405B fits 128, but for MI300X
# One copy of 405B does not fit 8 devices; how long planning it takes can be measured all the same.
UNBOUND = ("--gpu_mem_constraint", "4096")
CASES = {
    "8B-128K": Case(131072, 8, 8, flags=("--enable-chunk-loss",)),
    "8B-8K": Case(8192, 8, 8, flags=("--enable-chunk-loss",)),
    "32-layers": Case(8192, 8, 8, hardware="mi300x"),
    "80-layers": Case(8192, 8, 8, {"num_hidden_layers": "80"}, hardware="mi300x"),
    "405B-plan-8": Case(8192, 8, 128, SHAPE_405B, hardware="mi300x", flags=UNBOUND),
    "405B-plan-128": Case(8192, 128, 128, SHAPE_405B, hardware="mi300x"),
    **{f"405B-plan-128-{name}": Case(8192, 128, 128, SHAPE_405B, hardware=name) for name in FITTING},
}


@dataclass(frozen=True)
class Measured:
    """Wall and CPU time of the whole process, or of the export's call alone; peak memory of the process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    nodes: int


def main() -> None:
    flags = ArgumentParser(description=__doc__)
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to compile")
    flags.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    flags.add_argument("--timeout", type=float, default=300.0, help="seconds after which a compile is given up")
    flags.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    args = flags.parse_args()
    rounds: list[dict[str, Measured]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(args.repeats):
            logger.info("round %d of %d", number + 1, args.repeats)
            rounds.append({EXPORT: export(CASES["8B-128K"])})
            for name in args.cases:
                try:
                    if name not in failed:
                        rounds[-1][name] = compile_case(CASES[name], Path(directory), args.timeout)
                except UserError as error:
                    failed[name] = str(error)
    rounds = [{name: entry for name, entry in one.items() if name not in failed} for one in rounds]
    rows = [row(name, rounds) for name in rounds[0]]
    claims = check(rounds)
    print_rows(rows)
    for name, reason in failed.items():
        print(f"{name}: not measured: {reason}")
    print()
    print_rows(claims)
    result = {"cores": CORES, "rounds": args.repeats, "rows": rows, "failed": failed, "claims": claims}
    write(args.output / "compile_time.json", result)


def export(case: Case) -> Measured:
    command = [sys.executable, str(ROOT / "benchmarks" / "plain_export.py"), BASE, str(case.sequence_length)]
    process = measure(command, timeout=600.0)
    if process.status != 0:
        raise UserError(f"plain_export.py failed: {process.errors[-400:]}")
    told = json.loads(process.output)
    return Measured(told["seconds"], told["cpu_seconds"], process.peak_bytes, told["nodes"])


def compile_case(case: Case, directory: Path, timeout: float) -> Measured:
    """What a compile took. Raises UserError where it fails or takes more than `timeout` seconds."""
    model = directory / "-".join(["model", *case.changes.values()])
    if not model.exists():
        changed_config(load_config(BASE), case.changes).save_pretrained(model)
    command = [
        sys.executable, str(ROOT / "train.py"), "--run_mode", "compile", "--model_id", str(model),
        "--sequence_length", str(case.sequence_length), "--plan_ngpus", str(case.plan_ngpus),
        "--runtime_ngpus", str(case.runtime_ngpus), "--hardware", case.hardware,
        "--gen_savedir", str(directory / "code"), "--name", "case", *case.flags,
    ]  # fmt: skip
    process = measure(command, timeout)
    if process.status != 0:
        raise UserError((process.errors.strip() or "failed").splitlines()[-1])
    graph = (directory / "code" / "case" / "graph.txt").read_text()
    nodes = sum(" = " in line for line in graph.splitlines())
    return Measured(process.seconds, process.cpu_seconds, process.peak_bytes, nodes)


@dataclass(frozen=True)
class Process:
    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str
    errors: str


def measure(command: list[str], timeout: float) -> Process:
    """Runs a command to its end. Ends it and raises UserError after `timeout` seconds."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
            if ended:
                break
            if seconds > timeout:
                process.kill()
                os.wait4(process.pid, 0)
                raise UserError(f"given up after {timeout:.0f} s")
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        cpu_seconds = usage.ru_utime + usage.ru_stime
        peak = usage.ru_maxrss * 1024
        return Process(process.returncode, seconds, cpu_seconds, peak, output.read(), errors.read())


@dataclass(frozen=True)
class Claim:
    """What the project claims: the time of a case as a multiple of another's, or in seconds, is at most `most`."""

    case: str
    against: str | None
    most: float

    def found(self, measured: dict[str, Measured]) -> tuple[float, float]:
        """In wall time and in CPU time."""
        mine = measured[self.case]
        other = measured[self.against] if self.against else Measured(1.0, 1.0, 0, 0)
        return mine.seconds / other.seconds, mine.cpu_seconds / other.cpu_seconds


CLAIMS = [
    Claim("8B-128K", EXPORT, 2.0),
    Claim("8B-8K", "8B-128K", 1.1),
    Claim("8B-128K", "8B-8K", 1.1),
    Claim("80-layers", "32-layers", 1.3),
    Claim("405B-plan-8", None, 60.0),
    Claim("405B-plan-128", None, 60.0),
    *(Claim(f"405B-plan-128-{name}", None, 60.0) for name in FITTING),
]


def check(rounds: list[dict[str, Measured]]) -> list[dict[str, str]]:
    """Each claim about what was measured, and whether it is met."""
    claims = []
    for claim in CLAIMS:
        if {claim.case, claim.against or claim.case} <= rounds[0].keys():
            wall, cpu = (statistics.median(values) for values in zip(*map(claim.found, rounds)))
            text = f"{claim.case} / {claim.against}" if claim.against else f"{claim.case}, seconds"
            claims.append((text, wall, f"{cpu:.2f}", claim.most))
    peaks = [entry.peak_bytes for one in rounds for name, entry in one.items() if name != EXPORT]
    claims.append(("largest memory, GiB", max(peaks, default=0) / GIB, "", 2.0))
    return [
        {"claim": text, "wall": f"{wall:.2f}", "CPU": cpu, "at most": f"{most}", "met": "yes" if wall <= most else "NO"}
        for text, wall, cpu, most in claims
    ]


def row(name: str, rounds: list[dict[str, Measured]]) -> dict[str, Any]:
    """Medians of one case, and the medians of their ratios to the export of the same round."""
    mine, exports = [one[name] for one in rounds], [one[EXPORT] for one in rounds]
    seconds = [entry.seconds for entry in mine]
    ratios = [entry.seconds / export.seconds for entry, export in zip(mine, exports)]
    cpu_ratios = [entry.cpu_seconds / export.cpu_seconds for entry, export in zip(mine, exports)]
    memory = [entry.peak_bytes / export.peak_bytes for entry, export in zip(mine, exports)]
    return {
        "case": name,
        "seconds": f"{statistics.median(seconds):.1f}",
        "CPU s": f"{statistics.median(entry.cpu_seconds for entry in mine):.1f}",
        "GiB": f"{max(entry.peak_bytes for entry in mine) / GIB:.2f}",
        "nodes": str(mine[0].nodes),
        "time / export": f"{statistics.median(ratios):.2f}",
        "CPU / export": f"{statistics.median(cpu_ratios):.2f}",
        "memory / export": f"{statistics.median(memory):.2f}",
        "nodes / export": f"{mine[0].nodes / exports[0].nodes:.2f}",
    }


if __name__ == "__main__":
    run(main)
