"""Prints how long tracing Llama-3 8B takes, by strategy and context length: the document's table for this project.

    python benchmarks/trace_time.py
    python benchmarks/trace_time.py --strategies cpu --lengths 1024 --layers 2 --timeout 3600

Each row is the time of `nnscaler.trace.trace`, execution and first weights included, in a process of its own, and that
process's peak memory (the GPU's own not counted). Strategies that execute the model need its weights and the
activations of a layer: rows for which this machine has not the memory, or the device, are not run, and say so.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import CORES, RESULTS, print_rows, write
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.command import ArgumentParser, run
from nnscaler.compiler import Source
from nnscaler.data.training import with_labels
from nnscaler.errors import UserError
from nnscaler.models import load_config
from nnscaler.models.causal_lm import IGNORED, CausalLM, count_parameters, prepare_config
from nnscaler.trace import STRATEGIES, find_strategy, trace

logger = logging.getLogger("trace_time")

GB = 1e9


def main() -> None:
    flags = ArgumentParser(description=__doc__)
    flags.add_argument("--model_id", default="meta-llama/Meta-Llama-3-8B-Instruct", help="model directory, or hub name")
    flags.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    flags.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="rows to run")
    flags.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 65536, 131072], help="tokens a sequence")
    flags.add_argument("--timeout", type=float, default=900.0, help="seconds after which a row is given up")
    flags.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    args = flags.parse_args()
    load_config(args.model_id)  # its errors belong here, not into every row
    rows = []
    for strategy in args.strategies:
        for length in args.lengths:
            logger.info("%s, %d tokens", strategy, length)
            result = measure(args.model_id, args.layers, strategy, length, args.timeout)
            rows.append({"strategy": strategy, "context length": f"{length // 1024}K", **result})
    print_rows(rows)
    result = {"model": args.model_id, "layers": args.layers, "cores": CORES, "rows": rows}
    write(args.output / "trace_time.json", result)


def measure(model_id: str, layers: int | None, strategy: str, length: int, timeout: float) -> dict[str, str]:
    """Columns of one row: seconds and GiB, or why there are none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_row, args=(sender, model_id, layers, strategy, length))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return _not_run(f"takes more than {timeout:.0f} s")
        return dict(receiver.recv())
    except EOFError:
        process.join()
        return _not_run(f"process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _not_run(reason: str) -> dict[str, str]:
    return {"seconds": f"not run: {reason}", "GiB": ""}


def _row(sender: Any, model_id: str, layers: int | None, strategy: str, length: int) -> None:
    try:
        sender.send(_trace(model_id, layers, strategy, length))
    except UserError as error:
        sender.send(_not_run(str(error)))


def _trace(model_id: str, layers: int | None, strategy: str, length: int) -> dict[str, str]:
    config = load_config(model_id)
    if layers is not None:
        config.num_hidden_layers = layers
    prepare_config(config, length, "auto")
    if find_strategy(strategy).executes:
        needed, there = memory_needed(config, length), memory_there(strategy)
        if needed > there:
            return _not_run(f"needs {needed / GB:.0f} GB, {there / GB:.0f} GB are free")
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    source = Source(lambda: CausalLM(config, chunk_linear_cross_entropy), with_labels(tokens, IGNORED))
    model, buffers = source.build()
    started = time.perf_counter()
    trace(model, source.inputs, buffers, strategy, source.seed)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return {"seconds": f"{seconds:.2f}", "GiB": f"{peak:.2f}"}


def memory_needed(config: Any, length: int) -> float:
    """Bytes: bf16 weights, and of a layer three tensors as wide as its MLP and eight as wide as its hidden state."""
    return 2.0 * (count_parameters(config) + length * (3 * config.intermediate_size + 8 * config.hidden_size))


def memory_there(strategy: str) -> float:
    """Free bytes where the weights of an executed model would be."""
    if STRATEGIES[strategy].device == "cuda" and not STRATEGIES[strategy].offload:
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


if __name__ == "__main__":
    run(main)
