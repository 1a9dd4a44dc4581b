"""Runs of benchmarks/train_llama.py, as many at a time as there are GPUs for, and one file of what came out of them.

A run's row is written when the run ends. What the file has is not run again, so that a list of runs can be measured in
several calls. Each run has GPUs of its own, and all share the host, of whose memory each GPU gets an equal part. Runs
that may copy to it come one at a time, as they would share its rate, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from nnscaler.command import ArgumentParser

POLL = 0.5  # seconds between looks at what runs
TAIL = 30  # lines of the log of a run that failed
ABOUT = ("torch", "transformers", "python", "revision")  # of a run's result, for the whole file


@dataclass(frozen=True)
class Setting:
    """A run.

    name    of its row
    flags   of train_llama.py
    what    it is for, in words
    copies  whether its plan may keep things on the host
    """

    name: str
    devices: int
    flags: str
    what: str = ""
    copies: bool = False


@dataclass
class Running:
    """A run that was started, and the GPUs that it has."""

    setting: Setting
    gpus: list[str]
    process: subprocess.Popen[bytes]
    began: float
    until: float

    def stop(self) -> None:
        """Ends it at once, with all processes that it started."""
        for pid in _with_descendants(self.process.pid) if self.process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _with_descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started; itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def parse(description: str | None, file: Path) -> argparse.Namespace:
    """What is asked of a script that measures so. `file`: of its results, if no other is given"""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--gpus", default="0,1", help="numbers of the GPUs to use, with commas (default: 0,1)")
    add("--json", type=Path, default=file, help="file of the results; the runs that it has are not repeated")
    add("--limit", type=float, default=300.0, help="seconds after which a run is given up (default: 300)")
    add("--seconds", type=float, help="end after so many: what is not measured then is left to another call")
    add("--least", type=float, default=80.0, help="with --seconds: no run begins in the last of them (default: 80)")
    add("--host_mem_constraint", type=float, default=100.0, help="GiB of the host for each GPU (default: 100)")
    add("--logs", type=Path, help="folder that keeps what runs write and say (default: only failures are shown)")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="only runs in whose names one of these occurs")
    add(
        "--more",
        default="",
        help="further flags of train_llama.py for each run, as --more='...'; they come last, and so count",
    )
    return parser.parse_args()


def measured(
    settings: Sequence[Setting],
    options: argparse.Namespace,
    row_of: Callable[[Setting, dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of all settings that were measured, now or before, in the settings' order. Ends where there are none.

    row_of  a row, from what train_llama.py writes about a run
    """
    file = json.loads(options.json.read_text()) if options.json.exists() else {}
    rows = {row["name"]: row for row in file.get("rows", [])}
    wanted = [one for one in settings if one.name not in rows and any(text in one.name for text in options.only)]
    print(f"{len(wanted)} of {len(settings)} to run, {len(rows)} in {options.json}", flush=True)
    for setting, result, seconds in run_all(wanted, options):
        if result is None:
            continue
        rows[setting.name] = {"name": setting.name, "what": setting.what, **row_of(setting, result)}
        ordered = [rows[one.name] for one in settings if one.name in rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {key: result[key] for key in ABOUT}
        options.json.write_text(json.dumps({**about, "settings": len(settings), "rows": ordered}, indent=1) + "\n")
        times = f"{result['predicted_seconds_per_step']:.3f} / {result['seconds_per_step']:.3f} s a step"
        print(f"{setting.name}: {times}, predicted / measured; the run took {seconds:.0f} s", flush=True)
    if not rows:
        sys.exit("nothing was measured")
    return [rows[one.name] for one in settings if one.name in rows]


def run_all(
    settings: Sequence[Setting], options: argparse.Namespace
) -> Iterator[tuple[Setting, dict[str, Any] | None, float]]:
    """(setting, what it wrote, or None where it failed; seconds that it took) of each, as they end."""
    waiting, running, free = list(settings), list[Running](), options.gpus.split(",")
    most = max((setting.devices for setting in settings), default=0)
    if most > len(free):
        raise ValueError(f"--gpus {options.gpus} are too few for a run on {most}")
    began = time.monotonic()
    end = began + options.seconds if options.seconds else float("inf")
    folder = options.logs or Path(tempfile.mkdtemp(prefix="nnscaler-runs-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while running or (waiting and time.monotonic() < end - options.least):
            for setting in list(waiting):
                now = time.monotonic()
                alone = not (setting.copies and any(one.setting.copies for one in running))
                if alone and setting.devices <= len(free) and now < end - options.least:
                    gpus, free = free[: setting.devices], free[setting.devices :]
                    until = min(now + options.limit, end)
                    running.append(Running(setting, gpus, _start(setting, gpus, folder, options), now, until))
                    waiting.remove(setting)
            time.sleep(POLL)
            for one in list(running):
                late = time.monotonic() > one.until
                if one.process.poll() is None and not late:
                    continue
                one.stop()
                running.remove(one)
                free += one.gpus
                path = folder / f"{one.setting.name}.json"
                if not path.exists():
                    _tell(one.setting, folder, "ran out of time" if late else f"ended with {one.process.returncode}")
                result = json.loads(path.read_text()) if path.exists() else None
                yield one.setting, result, time.monotonic() - one.began
        for setting in waiting:
            print(f"{setting.name}: no time was left", flush=True)
    finally:
        for one in running:
            one.stop()
        if options.logs is None:
            shutil.rmtree(folder)


def _start(setting: Setting, gpus: Sequence[str], folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    torchrun = f"-m torch.distributed.run --nproc_per_node {setting.devices} --master_addr 127.0.0.1"
    own = f"--label {setting.name} --output {folder} --host_mem_constraint {options.host_mem_constraint}"
    script = str(ROOT / "benchmarks" / "train_llama.py")
    command = [sys.executable, *torchrun.split(), "--master_port", str(_free_port()), script, *own.split()]
    (folder / f"{setting.name}.json").unlink(missing_ok=True)  # of an earlier call
    with (folder / f"{setting.name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *setting.flags.split(), *options.more.split()], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}, cwd=ROOT,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _tell(setting: Setting, folder: Path, what: str) -> None:
    """Prints why a run gave nothing."""
    lines = (folder / f"{setting.name}.log").read_text(errors="replace").splitlines()
    print("\n".join([f"{setting.name}: {what}", *(f"    {line[:300]}" for line in lines[-TAIL:])]), flush=True)
