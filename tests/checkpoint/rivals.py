"""Two jobs of torchrun in one folder and with one name, whose workers are killed: each continues only itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnscaler.checkpoint.claim import CLAIM, Claim
from nnscaler.checkpoint.folder import TrainerState, own_checkpoints
from nnscaler.cli.log import METRICS
from tests.launch import free_port

ROOT = Path(__file__).parents[2]
NAME, RANKS = "rival", 2
STUCK = 600.0  # seconds in which any machine, however busy, starts a job again and saves a step


@dataclass
class Job:
    """A torchrun whose run differs from the other's in its seed."""

    folder: Path
    seed: int
    steps: int
    interval: int = 1
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        flags = {
            "model_id": "model", "dataset_path": "data", "precision": "fp32", "hardware": "hardware.json",
            "plan_ngpus": 1, "grad_accumulation_steps": 1, "name": NAME, "max_train_steps": self.steps,
            "checkpoint_interval": self.interval, "lr_schedule": "constant", "seed": self.seed,
        }  # fmt: skip
        command = [  # with torchrun's run id "none"
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", "--max-restarts=10000",
            f"--master_port={free_port()}", str(ROOT / "train.py"),
            *(f"--{name}={value}" for name, value in flags.items()),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"seed{self.seed}.log").open("ab") as out:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=out, env=environment)

    @property
    def workers(self) -> list[int]:
        listed = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint of this run's seed, in whatever folder."""
        return max((state.step for _, state in saved(self.folder, self.seed)), default=0)


def saved(folder: Path, seed: int) -> list[tuple[Path, TrainerState]]:
    """Run folder and state of each checkpoint of a seed."""
    found = []
    for run in (folder / "checkpoints").glob("*/"):
        for checkpoint in own_checkpoints(run):
            try:
                state = TrainerState.read(checkpoint)
            except (ValueError, OSError):  # removed meanwhile
                continue
            if state.seed == seed:
                found.append((run, state))
    return found


def kill_rivals(folder: Path, times: int, seed: int) -> Iterator[int]:
    """Yields the seed of the job that was hit, having checked what both have saved."""
    generator = random.Random(seed)
    jobs = [Job(folder, job_seed, 10**6) for job_seed in (1, 2)]
    at_least = {job.seed: 1 for job in jobs}  # a step that must be saved before the job is hit again
    try:
        for _ in range(times):
            job = generator.choice(jobs)
            _wait(job, at_least[job.seed] if generator.random() < 0.75 else 0)  # or while it starts
            time.sleep(generator.uniform(0, 0.5))
            while not (workers := job.workers):
                time.sleep(0.01)
            os.kill(generator.choice(workers), signal.SIGKILL)
            check(folder)
            at_least[job.seed] = job.newest + 1
            yield job.seed
        for job in jobs:
            _wait(job, at_least[job.seed])  # each goes on after its last hit
        check(folder)
    finally:
        for job in jobs:
            job.process.terminate()
        for job in jobs:
            job.process.wait()


def _wait(job: Job, step: int) -> None:
    deadline = time.monotonic() + STUCK
    while job.newest < step or not job.workers:
        assert job.process.poll() is None, (job.folder / f"seed{job.seed}.log").read_text()
        assert time.monotonic() < deadline, f"job {job.seed} did not save step {step} within {STUCK} s"
        time.sleep(0.05)


def check(folder: Path) -> None:
    """Each job has one folder, where nobody else has saved, and which it has always claimed as the same run."""
    homes = [{run for run, _ in saved(folder, seed)} for seed in (1, 2)]
    assert all(len(home) <= 1 for home in homes), homes
    assert homes[0].isdisjoint(homes[1]), homes
    for seed, home in zip((1, 2), homes):
        for run in home:
            claim = Claim.read(run)
            assert claim is not None, f"{run} has no {CLAIM}"
            assert {state.owner for _, state in saved(folder, seed)} <= {claim.run}, run


def losses_by_step(folder: Path, seed: int) -> dict[int, float]:
    """What the run of a seed has logged; every step must be there once."""
    (run,) = {run for run, _ in saved(folder, seed)}
    entries = [json.loads(line) for line in (folder / "runs" / run.name / METRICS).read_text().splitlines()]
    steps = [entry["step"] for entry in entries]
    assert steps == list(range(1, len(steps) + 1)), f"the steps logged by {run.name} are {steps}"
    return {entry["step"]: entry["loss"] for entry in entries}
