"""Trains a Llama of random weights on random tokens, with the plan that the planner finds, and reports the speed.

    torchrun --nproc_per_node=4 benchmarks/train_llama.py --sequence_length 131072
    torchrun --nproc_per_node=2 benchmarks/train_llama.py --layers 8 --sequence_length 65536 --plan_ngpus 2
    torchrun --nproc_per_node=2 benchmarks/train_llama.py --documents zipf
    torchrun --nproc_per_node=2 benchmarks/train_llama.py --sequence_length 8192 --global_batch_size 64

Everything of a training step is in it: data loading, gradient exchange, clipping and the optimizer. The result is the
median of the steps after the first two, and the most memory of all steps, beside what the plan predicted. With
--documents, rows hold documents that are kept apart: all of one length; or of lengths by Zipf's law (documents of twice
a length or more are half as frequent), 8,192 tokens on average. They are laid end to end, and cut at the ends of rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, table, write
from chunk_linear_cross_entropy import in_chunks
from nnscaler.cli.config import (
    CheckpointConfig,
    DatasetConfig,
    LogConfig,
    ModelConfig,
    TrainerArgs,
)
from nnscaler.cli.trainer import Trainer
from nnscaler.command import ArgumentParser, run
from nnscaler.compiler import ComputeConfig
from nnscaler.data.training import PackedDataset
from nnscaler.models import load_config
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, prepare_config
from nnscaler.models.changes import changed_config
from nnscaler.profiler.steps import LEAST

MEAN = 8192  # tokens of a document, by Zipf's law
LITTLE = 0.85  # of a device's memory: a plan that may use less is said to in the README
WARM_UP = 2  # steps; where there are no more, one


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose configuration is used")
    add("--layers", type=int, help="decoder layers (default: the configuration's)")
    add("--sequence_length", type=int, default=131072, help="tokens")
    add("--global_batch_size", type=int, help="as in train.py: the planner divides it, as far as other flags do not")
    add("--micro_batch_size", type=int, help="sequences (default: 1)")
    add("--grad_accumulation_steps", type=int, help="micro-batches of a step (default: 4)")
    add("--steps", type=int, default=5, help="optimizer steps, of which two warm up (of two one, of one none)")
    add("--plan_ngpus", type=int, help="devices of one copy of the model (default: all)")
    add("--gpu_mem_constraint", type=float, help="GB a device that the plan may use")
    add("--offload", default="auto", choices=("auto", "off"), help="as in train.py")
    add("--host_mem_constraint", type=float, help="GiB of the host's memory that the plan may use for a device")
    add("--recompute_modules", default="", help="as in train.py")
    add("--search_seconds", type=float, default=ComputeConfig.search_seconds, help="as in train.py")
    add("--explore_pipeline", action="store_true", help="as in train.py")
    add("--pipeline_schedule", help="as in train.py")
    add("--pipeline_nstages", type=int, help="as in train.py")
    add("--attn_implementation", default="auto", help="as in train.py")
    add("--precision", choices=("bf16", "fp8"), default="bf16", help="as in train.py")
    add("--documents", help="keep documents apart: tokens of each, or zipf (default: a row is one sequence)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in train.py")
    add("--profile", type=Path, help="folder for a profile of step 5; take 8 for the speed without it")
    add("--no_chunk_loss", action="store_true", help="loss by PyTorch, on all logits")
    add("--note", help="what the table of README says of the result")
    add("--label", help="what the result is called (default: from the setting)")
    add("--output", type=Path, default=RESULTS / "train", help="folder for the result's JSON")
    return parser.parse_args()


def dataset(folder: Path, sequences: int, length: int, vocabulary: int, documents: str | None) -> PackedDataset:
    """Random tokens. Every rank writes its own, equal ones."""
    import datasets

    tokens = np.random.default_rng(0).integers(vocabulary, size=(sequences, length), dtype=np.int32)
    columns: dict[str, Any] = {"input_ids": tokens}
    if documents is not None:
        places = np.cumsum([0, *lengths_of(documents, tokens.size, length)])
        columns["document_starts"] = [
            places[(places >= begin) & (places < begin + length)] - begin for begin in range(0, tokens.size, length)
        ]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return PackedDataset.open(folder)


def lengths_of(documents: str, tokens: int, longest: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Lengths of documents that have `tokens` together, or more.

    By Zipf's law, they have the density 1 / length^2, from the shortest, which follows from the mean, to the longest.
    The mean is MEAN, or a sixteenth of the longest where that is less.
    """
    if documents != "zipf":
        return np.full(tokens // int(documents) + 1, int(documents))
    wanted, shortest = min(MEAN, longest / 16), 1.0
    while shortest * np.log(longest / shortest) / (1 - shortest / longest) < wanted:
        shortest *= 1.001
    places = np.random.default_rng(1).random(int(2 * tokens / wanted) + 100)
    return (1 / (1 / shortest - places * (1 / shortest - 1 / longest))).round().astype(np.int64)


def main() -> None:
    options = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr)
    config = load_config(options.model_id)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    config = changed_config(config, dict(one.split("=", 1) for one in options.set))
    length = options.sequence_length
    loss = None if options.no_chunk_loss else in_chunks
    apart = options.documents is not None
    prepare_config(config, length, options.attn_implementation, apart)
    batch, fixed, left_open = options.global_batch_size, *division(options, world)
    divided = f"{length}x{fixed['micro_batch_size']}-plan{fixed['plan_ngpus']}of{world}"
    name = f"{options.model_id.rsplit('/', 1)[-1]}-{config.num_hidden_layers}layers-"
    name += f"{length}-batch{batch}of{world}" if left_open else divided
    name += (f"-documents-{options.documents}" if apart else "") + ("-fp8" if options.precision == "fp8" else "")
    name = options.label or name
    # The ranks share one folder, of which the port of their rendezvous is the name they all know.
    work = Path(tempfile.gettempdir()) / f"nnscaler-benchmark-{os.environ.get('MASTER_PORT', os.getpid())}"
    try:
        compute = ComputeConfig(
            fixed["plan_ngpus"],
            world,
            gpu_mem_constraint=options.gpu_mem_constraint,
            offload=options.offload,
            host_mem_constraint=options.host_mem_constraint,
            recompute_modules=tuple(filter(None, options.recompute_modules.split(","))) or None,
            micro_batches=fixed["micro_batches"],
            search_seconds=options.search_seconds,
            explore_pipeline=options.explore_pipeline or batch is not None,
            pipeline_schedule=options.pipeline_schedule,
            pipeline_nstages=options.pipeline_nstages,
        )
        copies = world // fixed["plan_ngpus"]
        sequences = batch or copies * fixed["micro_batch_size"] * fixed["micro_batches"]
        rows = dataset(work / f"data{rank}", sequences * options.steps, length, config.vocab_size, options.documents)
        data = DatasetConfig(rows, document_mask=apart)
        args = TrainerArgs(
            name="benchmark",
            model=ModelConfig(lambda: CausalLM(config, loss, data.mean_document), None, WEIGHT_PREFIX, None),
            compute=compute,
            dataset=data,
            checkpoint=CheckpointConfig(work / "checkpoints", interval=None),
            log=LogConfig(work / "runs", profile=options.profile),
            precision=options.precision,
            global_batch_size=batch,
            micro_batch_size=fixed["micro_batch_size"],
            left_open=left_open,
            max_train_steps=options.steps,
            gen_savedir=work / "code",
        )
        Trainer(args).run()
        if rank == 0:
            report(options, name, work, compute, sequences, world)
    finally:
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def division(options: argparse.Namespace, world: int) -> tuple[dict[str, int], list[str]]:
    """How a step is divided, as far as the flags or defaults fix it, and what is left open; see `TrainerArgs`."""
    given = {
        "plan_ngpus": options.plan_ngpus, "micro_batch_size": options.micro_batch_size,
        "micro_batches": options.grad_accumulation_steps,
    }  # fmt: skip
    defaults = {"plan_ngpus": world, "micro_batch_size": 1, "micro_batches": 4}
    left_open = [name for name, value in given.items() if value is None] if options.global_batch_size else []
    return {name: given[name] or default for name, default in defaults.items()}, left_open


def report(
    options: argparse.Namespace,
    name: str,
    work: Path,
    compute: ComputeConfig,
    sequences: int,
    world: int,
) -> None:
    """Prints what was measured beside what was predicted, and writes it."""
    metrics = [json.loads(line) for line in (work / "runs" / "benchmark" / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((work / "code" / "benchmark" / "plan.json").read_text())
    predicted = plan["predicted"]
    counted = metrics[min(WARM_UP, len(metrics) - 1) :]
    if options.profile and len(metrics) > LEAST + 1:  # writing the profile takes time of the step after it, too
        counted = metrics[LEAST + 1 :]
    seconds = statistics.median(entry["seconds_per_step"] for entry in counted)
    memory = predicted["memory_bytes"] / 2**30
    peaks = [entry.get("peak_memory_gib", 0.0) for entry in metrics]  # the first: of all that was before it, too
    peak = max(peaks)
    hardware = compute.find_hardware()
    rate = hardware.flops["bfloat16"] * world
    tokens, micro_batches = (
        sequences * options.sequence_length / world,
        sequences / plan["about"]["sequences_per_micro_batch"],
    )
    blocks = plan.get("blocks", {})  # a pipeline's are its stages'
    result = {
        "name": name,
        "sequence_length": options.sequence_length,
        "sequences_per_step": sequences,
        "document_length": plan["about"].get("document_length"),
        "devices": world,
        "precision": options.precision,
        "memory_limit_gib": options.gpu_mem_constraint,
        "seconds_per_step": seconds,
        "predicted_seconds_per_step": predicted["step_seconds"],
        "tokens_per_second_per_gpu": tokens / seconds,
        "mfu": predicted["micro_batch_flops"] * micro_batches / seconds / rate,
        "mfu_causal": predicted["micro_batch_flops_causal"] * micro_batches / seconds / rate,
        "peak_memory_gib": peak,
        "predicted_memory_gib": memory,
        "predicted_host_gib": predicted.get("host_bytes", 0.0) / 2**30,
        "host_limit_gib": predicted.get("host_limit_bytes", 0.0) / 2**30,
        "recompute": {name: block["recompute"] for name, block in blocks.items() if block["recompute"]},
        "mesh": plan["mesh"]["sizes"],
        "pipeline": plan.get("pipeline", {}).get("schedule"),
        "divisions": plan.get("divisions"),
        "plan_sha256": hashlib.sha256((work / "code" / "benchmark" / "plan.json").read_bytes()).hexdigest()[:16],
        "seconds_by_category": predicted.get("seconds_by_category", {}),
        "gib_by_category": {what: size / 2**30 for what, size in predicted.get("bytes_by_category", {}).items()},
        "steps": [entry["seconds_per_step"] for entry in metrics],
        "peak_memory_of_steps_gib": peaks,
        "loss": [entry["loss"] for entry in metrics],
    }
    if options.note:
        result["note"] = options.note
    limit = options.gpu_mem_constraint
    if limit is not None and limit * 2**30 < LITTLE * hardware.memory:
        result["device_memory_gib"] = limit
    profiled = options.profile / "profile.json" if options.profile else None  # which only runs on GPUs write
    if profiled is not None and profiled.exists():
        result["profile"] = json.loads(profiled.read_text())
    write(options.output / f"{name}.json", result)
    rows = [
        ["seconds a step", seconds, predicted["step_seconds"], predicted["step_seconds"] / seconds],
        ["peak memory of all steps, GiB", peak, memory, memory / peak if peak else 0.0],
    ]
    mfu = f"causal MFU {result['mfu_causal']:.1%}, the document's {result['mfu']:.1%}"
    print(f"{name}: {tokens / seconds:.0f} tokens/s/GPU, {mfu}")
    print(table(["", "measured", "predicted", "ratio"], rows))
    if "profile" in result:
        print(table(["of a step on the first device", "ms", "%"], shares(result["profile"]["milliseconds"])))


def shares(milliseconds: dict[str, float]) -> list[list[Any]]:
    """Rows of a profile's times: what, its milliseconds, and its part of the whole in percent."""
    return [[what, value, 100 * value / milliseconds["whole"]] for what, value in milliseconds.items()]


if __name__ == "__main__":
    run(main)
