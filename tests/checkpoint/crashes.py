"""Kills ranks of a training run at random moments, and has it go on each time from what is on disk."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnscaler.checkpoint.checksums import Checksums
from nnscaler.checkpoint.folder import TrainerState, complete_checkpoints
from tests.checkpoint.jobs import assert_equal, final, train
from tests.launch import run, start
from tests.parity import Case

CASE = Case(1, 2)
NAME = "crashed"
OPTIONS = {"interval": 1, "keep": 3}  # nearly always, something is being written
LONGEST = 8.0  # seconds that a run is left alone: starting, compiling, training
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


def crashes(folder: Path, times: int, seed: int) -> Iterator[Crash]:
    """Yields every crash, after which it has checked that no complete checkpoint is lost, and none is torn."""
    generator = random.Random(seed)
    runs, newest = folder / "checkpoints" / NAME, 0
    for _ in range(times):
        logged = len(metrics(folder))
        options = {**OPTIONS, "resume": runs} if newest else OPTIONS
        started = time.time()
        ranks = start(CASE.runtime, train, CASE, folder, 10**6, NAME, options)
        _wait(runs, started, generator)
        writing, before = _is_writing(runs, started), _newest(runs)
        assert all(process.is_alive() for process in ranks), "the run ended by itself"
        generator.choice(ranks).kill()
        time.sleep(generator.uniform(0, SURVIVORS))
        for process in ranks:
            process.kill()
            process.join()
        for checkpoint in complete_checkpoints(runs):
            assert not list(Checksums.read(checkpoint).damages(shards=True)), f"{checkpoint} is torn"
        steps = [step for step, _ in metrics(folder)[logged:]]
        assert not steps or steps[0] == newest + 1, f"resumed at step {steps[0]}, saved was {newest}"
        assert _newest(runs) >= before, f"step {before} was complete, {_newest(runs)} is the newest now"
        newest = _newest(runs)
        yield Crash(steps[0] if steps else None, writing, newest)


def _wait(runs: Path, started: float, generator: random.Random) -> None:
    """Until some moment: any, or, half of the times, one in which a checkpoint is being written."""
    if generator.random() < 0.5:
        time.sleep(generator.uniform(0, LONGEST))
        return
    deadline = started + 4 * LONGEST
    while time.time() < deadline and not _is_writing(runs, started):
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


def metrics(folder: Path, name: str = NAME) -> list[tuple[int, float]]:
    """(step, loss) of each line of a run's metrics that was written whole."""
    path, found = folder / "runs" / name / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            found.append((entry["step"], entry["loss"]))
        except ValueError:
            continue
    return found


def assert_as_if_never_crashed(folder: Path, newest: int) -> int:
    """Finishes the run, and compares every loss and the last state with an undisturbed run's. Returns its steps."""
    runs = folder / "checkpoints" / NAME
    steps = newest + 3
    run(CASE.runtime, train, CASE, folder, steps, NAME, {**OPTIONS, "resume": runs} if newest else OPTIONS, init=False)
    run(CASE.runtime, train, CASE, folder, steps, "undisturbed", init=False)
    wanted = dict(metrics(folder, "undisturbed"))
    for step, loss in metrics(folder):
        assert step not in wanted or loss == wanted[step], f"step {step}: {loss}, undisturbed {wanted[step]}"
    assert_equal(final(folder, NAME), final(folder, "undisturbed"))
    return steps
