"""Measures what checkpoints cost: training's speed with one every 20 steps, against without, and merging's peak memory.

    python benchmarks/checkpoint_cost.py --processes 2
    python benchmarks/checkpoint_cost.py --merge

Speed: a Llama of random weights trains on random tokens. Runs with and without take turns, so that a machine whose
speed drifts does not decide. A run's figure is the mean of its steps without the first interval's; the writing that
goes on beside them is in it. Merging: ckpt_merger.py merges and exports, both verified, a checkpoint of many tensors of
one GiB; the peak is of all the resident memory of its process, Python and PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, ROOT, table, write
from benchmarks.train_llama import dataset
from nnscaler.checkpoint.folder import TrainerState, complete_checkpoints
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, LogConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.command import ArgumentParser, run
from nnscaler.compiler import ComputeConfig
from nnscaler.models import load_config
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, prepare_config
from tests import launch
from tests.checkpoint.test_merging import write_checkpoint

INTERVAL = 20  # steps


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose configuration is used, but for what follows")
    add("--layers", type=int, default=4, help="decoder layers")
    add("--hidden_size", type=int, default=256, help="width; 8 heads, a feed-forward of three times the width")
    add("--sequence_length", type=int, default=512, help="tokens")
    add("--vocabulary", type=int, default=8192, help="tokens that there are")
    add("--processes", type=int, default=2, help="ranks, of which each has the whole model")
    add("--micro_batch_size", type=int, default=1, help="sequences a rank and step")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="as in train.py")
    add(
        "--intervals", type=int, default=3, help=f"intervals of {INTERVAL} steps of a turn, the first of which warms up"
    )
    add("--turns", type=int, default=3, help="runs with, and as many without")
    add("--merge", action="store_true", help="measure merging instead")
    add("--gigabytes", type=float, default=6.0, help="of the checkpoint that is merged, in GB of 2^30 bytes")
    add("--output", type=Path, help="file for the result's JSON (default: in benchmarks/results)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.merge:
        measure_merging(options)
    else:
        measure_training(options)


def measure_training(options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(2 * options.turns):
            what = "with" if turn % 2 else "without"
            work = Path(directory) / f"{what}{turn}"
            launch.run(options.processes, train, options, work, what == "with", init=False, timeout=3600)
            lines = (work / "runs" / "cost" / "metrics.jsonl").read_text().splitlines()
            seconds[what] += [json.loads(line)["seconds_per_step"] for line in lines[1:]]
        checkpoint = complete_checkpoints(work)[-1]
        size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
        parameters = TrainerState.read(checkpoint).parameters.values()
    report(options, seconds, sum(prod(entry["shape"]) for entry in parameters), size)


def train(options: argparse.Namespace, work: Path, save: bool) -> None:
    """One run, on each rank."""
    config = load_config(options.model_id)
    width = options.hidden_size
    config.num_hidden_layers, config.hidden_size, config.vocab_size = options.layers, width, options.vocabulary
    config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 3 * width, 8, 4
    config.head_dim = width // 8
    prepare_config(config, options.sequence_length, "auto")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.processes))
    data = dataset(work / f"data{os.environ['RANK']}", 64, options.sequence_length, options.vocabulary)
    args = TrainerArgs(
        name="cost",
        model=ModelConfig(lambda: CausalLM(config), None, WEIGHT_PREFIX),
        compute=ComputeConfig(1, options.processes, micro_batches=1),
        dataset=DatasetConfig(data),
        checkpoint=CheckpointConfig(work / "checkpoints", interval=INTERVAL if save else None, keep=2),
        log=LogConfig(work / "runs", interval=INTERVAL),
        precision=options.precision,
        micro_batch_size=options.micro_batch_size,
        max_train_steps=options.intervals * INTERVAL,
        gen_savedir=work / "code",
    )
    Trainer(args).run()


def report(options: argparse.Namespace, seconds: dict[str, list[float]], parameters: int, size: int) -> None:
    means = {what: statistics.mean(found) for what, found in seconds.items()}
    medians = {what: statistics.median(found) for what, found in seconds.items()}
    rows = [
        [f"{what} checkpoints", means[what], medians[what], means["without"] / means[what]]
        for what in ("without", "with")
    ]
    model = f"{parameters / 1e6:.1f} million parameters on {options.processes} processes"
    print(f"{model}, {size / 2**20:.0f} MiB every {INTERVAL} steps")
    print(table(["", "mean seconds a step", "median", "throughput"], rows))
    result = {
        "parameters": parameters,
        "checkpoint_bytes": size,
        "interval_steps": INTERVAL,
        "processes": options.processes,
        "tokens_per_step": options.processes * options.micro_batch_size * options.sequence_length,
        "precision": options.precision,
        "seconds_per_step": seconds,
        "throughput": means["without"] / means["with"],
        "throughput_of_medians": medians["without"] / medians["with"],
    }
    write(options.output or RESULTS / "checkpoint_cost.json", result)


def measure_merging(options: argparse.Namespace) -> None:
    tensor = 2**30  # bytes of a tensor, such as 131072 x 2048 in fp32; of each there are three, with its moments
    tensors = max(1, round(options.gigabytes * 2**30 / (3 * tensor)))
    rows, result = [], {"largest_tensor_bytes": tensor, "limit_bytes": tensor + 2**30}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        # By a process of its own, because the peak of those that this one starts begins with this one's memory.
        (checkpoint,) = launch.run(1, write_checkpoint, folder / "run", 131072, 2048, tensors, timeout=3600)
        size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
        for flag in ("--output_fname", "--output_dir"):
            command = [sys.executable, "ckpt_merger.py", "--ckpt_dir", str(checkpoint), flag, str(folder / "output")]
            merger = subprocess.Popen([*command, "--verify"], cwd=ROOT)
            _, status, used = os.wait4(merger.pid, 0)
            assert status == 0
            peak = used.ru_maxrss * 1024
            result[f"peak_bytes{flag}"] = peak
            rows.append([flag, size / 2**30, tensor / 2**30, peak / 2**30, 1 + tensor / 2**30])
            output = folder / "output"
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    print(table(["", "checkpoint, GiB", "largest tensor", "peak memory", "limit"], rows))
    write(options.output or RESULTS / "merge_memory.json", {"checkpoint_bytes": size, **result})


if __name__ == "__main__":
    run(main)
