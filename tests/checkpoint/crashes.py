"""Kills ranks of a training run at random moments, and has it go on each time from what is on disk."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnscaler.checkpoint.checksums import Checksums
from nnscaler.checkpoint.folder import TrainerState, complete_checkpoints
from nnscaler.cli.log import METRICS
from tests.checkpoint.jobs import assert_equal, final, train
from tests.launch import run, start
from tests.parity import Case

CASE = Case(1, 2)
NAME = "crashed"
OPTIONS = {"interval": 1, "keep": 3}  # nearly always, something is being written
LONGEST = 8.0  # seconds that a run is left alone: starting, compiling, training
STUCK = 300.0  # seconds in which any machine, however busy, saves the next step
SURVIVORS = 0.5  # seconds at most until the other ranks are killed as well


@dataclass(frozen=True)
class Crash:
    """What a kill met and left.

    begun     step that the run had resumed at (None: it was killed before it logged a step)
    writing   whether a checkpoint was being written
    newest    step of the newest complete checkpoint afterwards; 0: there is none
    """

    begun: int | None
    writing: bool
    newest: int


def crashes(folder: Path, times: int, seed: int, case: Case = CASE) -> Iterator[Crash]:
    """Yields every crash, after which it has checked that no complete checkpoint is lost, and none is torn."""
    generator = random.Random(seed)
    runs, newest = folder / "checkpoints" / NAME, 0
    logs = folder / "runs" / NAME
    for count in range(times):
        if newest == 0:
            shutil.rmtree(logs, ignore_errors=True)  # else what begins anew is another run, in another folder
        elif (logs / METRICS).exists():
            (logs / METRICS).rename(logs / f"{count}.jsonl")
        options = {**OPTIONS, "resume": runs} if newest else OPTIONS
        started = time.time()
        ranks = start(case.runtime, train, case, folder, 10**6, NAME, options)
        _wait(runs, started, generator, last=count == times - 1)
        writing, before = _is_writing(runs, started), _newest(runs)
        assert all(process.is_alive() for process in ranks), "the run ended by itself"
        generator.choice(ranks).kill()
        time.sleep(generator.uniform(0, SURVIVORS))
        for process in ranks:
            process.kill()
            process.join()
        for checkpoint in complete_checkpoints(runs):
            assert not list(Checksums.read(checkpoint).damages(shards=True)), f"{checkpoint} is torn"
        steps = [step for step, _ in metrics(logs / METRICS)]
        assert not steps or steps[0] == newest + 1, f"resumed at step {steps[0]}, saved was {newest}"
        assert _newest(runs) >= before, f"step {before} was complete, {_newest(runs)} is the newest now"
        newest = _newest(runs)
        yield Crash(steps[0] if steps else None, writing, newest)


def _wait(runs: Path, started: float, generator: random.Random, last: bool) -> None:
    """Until some moment: any, or, half of the times and the last, one in which a checkpoint is being written.

    Of a last one that moment is after a checkpoint is complete, however long that takes.
    """
    if generator.random() < 0.5 and not last:
        time.sleep(generator.uniform(0, LONGEST))
        return
    wanted = _newest(runs) + (1 if last else generator.randrange(3))
    while not (_is_writing(runs, started) and _newest(runs) >= wanted):
        assert time.time() < started + STUCK, f"no step after {_newest(runs)} has been saved in {STUCK} s"
        time.sleep(0.0005)
    time.sleep(generator.uniform(0, 0.03))


def _is_writing(runs: Path, started: float) -> bool:
    """Whether there is an unfinished checkpoint of the run that started then."""
    with suppress(FileNotFoundError):
        return any(path.stat().st_mtime > started for path in runs.glob(".step_*.writing"))
    return False  # it has just got its name


def _newest(runs: Path) -> int:
    found = complete_checkpoints(runs)
    return TrainerState.read(found[-1]).step if found else 0


def metrics(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of a run's metrics that was written whole."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            found.append((entry["step"], entry["loss"]))
        except ValueError:
            continue
    return found


def assert_as_if_never_crashed(folder: Path, newest: int, case: Case = CASE) -> int:
    """Finishes the run, and compares every loss and the last state with an undisturbed run's. Returns its steps."""
    runs = folder / "checkpoints" / NAME
    steps = newest + 3
    run(case.runtime, train, case, folder, steps, NAME, {**OPTIONS, "resume": runs} if newest else OPTIONS, init=False)
    run(case.runtime, train, case, folder, steps, "undisturbed", init=False)
    wanted = dict(metrics(folder / "runs" / "undisturbed" / METRICS))
    for path in (folder / "runs" / NAME).glob("*.jsonl"):
        for step, loss in metrics(path):
            assert step not in wanted or loss == wanted[step], f"step {step}: {loss}, undisturbed {wanted[step]}"
    assert_equal(final(folder, NAME), final(folder, "undisturbed"))
    return steps
