"""Times attention as models and data ask for it: windows, caps of scores, sinks, documents.

    python benchmarks/attention.py --length 131072

For each case: the kernel that is chosen, the time of forward and backward, their rate for the pairs of row and key that
see each other, and this rate as a part of plain causal attention's with the same heads.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, table, write
from nnscaler.command import ArgumentParser, run
from nnscaler.kernels.attention import Asked, attend
from nnscaler.kernels.attention.choice import _probed
from nnscaler.kernels.attention.probe import kind_of
from nnscaler.runtime.dealing import Rows


@dataclass(frozen=True)
class Case:
    """heads, shared: of the query, of keys and values; size, value_size: of a head, of its values; left: the window"""

    heads: int = 32
    shared: int = 8
    size: int = 128
    value_size: int = 128
    left: int | None = None
    softcap: float | None = None
    sinks: bool = False
    documents: str | None = None


CASES = {
    "causal": Case(),
    "window of 4,096 (Mistral)": Case(left=4095),
    "cap (Gemma 2)": Case(16, 8, 256, 256, softcap=50.0),
    "cap, window of 4,096 (Gemma 2)": Case(16, 8, 256, 256, left=4095, softcap=50.0),
    "window of 1,024 (Gemma 3)": Case(16, 8, 256, 256, left=1023),
    "sinks (gpt-oss)": Case(64, 8, 64, 64, sinks=True),
    "sinks, window of 128 (gpt-oss)": Case(64, 8, 64, 64, left=127, sinks=True),
    "MLA (DeepSeek)": Case(16, 16, 192, 128),
    "documents of 4,096": Case(documents="even"),
    "documents of Zipf's lengths, 8,192 in the mean": Case(documents="zipf"),
    "independent rows of 4,096": Case(documents="rows"),
}


def documents_of(kind: str, length: int) -> np.ndarray:
    """[length] numbers of the documents that the tokens are of"""
    if kind != "zipf":
        return np.arange(length) // 4096
    draw = np.random.default_rng(0).zipf(1.4, length).clip(max=length // 512)
    lengths = (draw * 8192 / draw.mean()).astype(np.int64).clip(1)
    return np.repeat(np.arange(len(lengths)), lengths)[:length]


def call(case: Case, length: int) -> tuple[list[Tensor], Asked, Tensor, float]:
    """(query, key, value, options, gradient, pairs that see each other)"""
    rows = length // 4096 if case.documents == "rows" else 1
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int, size: int) -> Tensor:
        shape = (rows, length // rows, heads, size)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator).transpose(1, 2)

    tensors = [draw(case.heads, case.size), draw(case.shared, case.size), draw(case.shared, case.value_size)]
    asked = Asked(case.size**-0.5, 0, case.left, 0, case.softcap)
    numbers = np.zeros(length, np.int64)
    if case.sinks:
        asked = replace(asked, sinks=torch.randn(case.heads, dtype=torch.bfloat16, device="cuda").requires_grad_())
    if case.documents is not None:
        numbers = documents_of(case.documents, length)
        if case.documents != "rows":
            asked = replace(asked, documents=torch.from_numpy(numbers).cuda().unsqueeze(0))
    pairs = float(Rows.of(numbers)._seen(length, (case.left, 0)).sum())
    return [x.requires_grad_() for x in tensors], asked, draw(case.heads, case.value_size).transpose(1, 2), pairs


def seconds_of(case: Case, length: int, seconds: float) -> tuple[str, float, float]:
    """(kernel, seconds of forward and backward, floating-point operations of the pairs that see each other)"""
    tensors, asked, gradient, pairs = call(case, length)
    wanted = tensors if asked.sinks is None else [*tensors, asked.sinks]

    def once() -> None:
        torch.autograd.grad(attend(*tensors, asked, "auto"), wanted, gradient)

    once()
    torch.cuda.synchronize()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        once()
        torch.cuda.synchronize()
        runs += 1
    taken = (time.perf_counter() - started) / runs
    turned = [x.transpose(1, 2) for x in tensors]
    kernel = _probed(kind_of(*turned, asked), asked.options(length, length))
    # Forward: scores and sums of values; backward: five products, of which three have the size of query and key.
    flops = 2 * pairs * case.heads * (4 * case.size + 3 * case.value_size)
    return kernel, taken, flops


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=131072, help="tokens")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case, after the first call")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json", help="the result's JSON file")
    options: argparse.Namespace = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rates: dict[tuple[int, int], float] = {}
    found = []
    for name, case in CASES.items():
        sizes = case.size, case.value_size
        if sizes not in rates:
            plain = Case(case.heads, case.shared, *sizes)
            _, taken, flops = seconds_of(plain, options.length, options.seconds)
            rates[sizes] = flops / taken
        kernel, taken, flops = seconds_of(case, options.length, options.seconds)
        found.append({
            "case": name, "kernel": kernel, "milliseconds": 1e3 * taken, "tflops": flops / taken / 1e12,
            "of_causal": flops / taken / rates[sizes],
        })  # fmt: skip
    write(options.output, {"length": options.length, "device": torch.cuda.get_device_name(), "cases": found})
    print(table(list(found[0]), [list(row.values()) for row in found]))


if __name__ == "__main__":
    run(main)
