"""Kills a random rank of a training run with SIGKILL, at random moments, again and again, and lets the run go on.

    python benchmarks/crash.py --times 100

Two ranks train a tiny Llama and save it after every step. Half of the kills wait until a checkpoint is being written;
the others come at any time, starting and resuming included. After every kill each checkpoint that bears a name is read
and compared with its checksums, none that was complete before may be missing, and the next start must go on from the
newest. At the end every loss that was ever logged, and the last state, must be those of a run that nobody disturbed.
The first thing that is not so ends this script with an error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, table, write
from nnscaler.cli.args import ArgumentParser, run
from tests import tiny
from tests.checkpoint.crashes import assert_as_if_never_crashed, crashes


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks")
    parser.add_argument("--output", type=Path, default=RESULTS / "crash.json", help="file for the result's JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder, began = Path(directory), time.perf_counter()
        tiny.write_hardware(folder)
        tiny.write_dataset(folder / "data")
        found = list(tqdm(crashes(folder, options.times, options.seed), total=options.times, unit="kill"))
        steps = assert_as_if_never_crashed(folder, found[-1].newest)
        seconds = time.perf_counter() - began
    result = {
        "kills": len(found),
        "while a checkpoint was being written": sum(crash.writing for crash in found),
        "before the run had logged a step": sum(crash.begun is None for crash in found),
        "resumed from the newest checkpoint": sum(crash.begun is not None for crash in found),
        "steps whose loss is that of the undisturbed run": steps,
        "seconds": round(seconds),
    }
    print(table(["", "count"], list(result.items())))
    write(options.output, {"seed": options.seed, **result})


if __name__ == "__main__":
    run(main)
