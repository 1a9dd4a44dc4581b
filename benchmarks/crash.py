"""Kills workers of training runs with SIGKILL, at random moments, again and again, and lets the runs go on.

    python benchmarks/crash.py --times 100
    python benchmarks/crash.py --rivals --times 50

One run: two ranks train a tiny Llama and save it after every step. Half of the kills wait until a checkpoint is being
written; the others come at any time, starting and resuming included. After every kill each checkpoint that bears a name
is read and compared with its checksums, none that was complete before may be missing, and the next start must go on
from the newest. At the end every loss that was ever logged, and the last state, must be those of a run that nobody
disturbed.

Rivals: two jobs of `torchrun --max-restarts` are started at once in one folder, with one name and torchrun's own run id
("none"); they differ in the seed. torchrun restarts whichever is hit. Each must always save into its own folder, log
each of its steps once, and in the end have the losses of a run that was alone and not disturbed.

The first thing that is not so ends this script with an error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, table, write
from nnscaler.command import ArgumentParser, run
from tests import tiny
from tests.checkpoint.crashes import assert_as_if_never_crashed, crashes
from tests.checkpoint.rivals import Job, kill_rivals, losses_by_step


def one_run(folder: Path, times: int, seed: int) -> dict[str, int]:
    found = list(tqdm(crashes(folder, times, seed), total=times, unit="kill"))
    steps = assert_as_if_never_crashed(folder, found[-1].newest)
    return {
        "kills": len(found),
        "while a checkpoint was being written": sum(crash.writing for crash in found),
        "before the run had logged a step": sum(crash.begun is None for crash in found),
        "resumed from the newest checkpoint": sum(crash.begun is not None for crash in found),
        "steps whose loss is that of the undisturbed run": steps,
    }


def rivals(folder: Path, times: int, seed: int) -> dict[str, int]:
    tiny.write_model(folder / "model")
    hits = Counter(tqdm(kill_rivals(folder, times, seed), total=times, unit="kill"))
    compared = 0
    for job_seed in (1, 2):
        found = losses_by_step(folder, job_seed)
        alone = folder / f"alone{job_seed}"
        alone.mkdir()
        for name in ("model", "data", "hardware.json"):
            (alone / name).symlink_to(folder / name)
        assert Job(alone, job_seed, len(found), interval=0).process.wait() == 0, f"the run of seed {job_seed} failed"
        assert found == losses_by_step(alone, job_seed), f"losses of seed {job_seed} differ"
        compared += len(found)
    return {
        "kills": hits.total(),
        "of the first job": hits[1],
        "of the second job": hits[2],
        "continued another's run": 0,
        "steps whose loss is that of the undisturbed runs": compared,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="kills")
    parser.add_argument("--rivals", action="store_true", help="two jobs in one folder, under torchrun --max-restarts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks")
    parser.add_argument("--output", type=Path, help="file for the result's JSON (default: in benchmarks/results)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder, began = Path(directory), time.perf_counter()
        tiny.write_hardware(folder)
        tiny.write_dataset(folder / "data")
        result = (rivals if options.rivals else one_run)(folder, options.times, options.seed)
        result["seconds"] = round(time.perf_counter() - began)
    print(table(["", "count"], list(result.items())))
    name = "crash_rivals.json" if options.rivals else "crash.json"
    write(options.output or RESULTS / name, {"seed": options.seed, **result})


if __name__ == "__main__":
    run(main)
