"""A decoder layer forward and backward on one GPU, compiled, with its linear layers in bf16 and in fp8.

    python benchmarks/fp8_layer.py --model_id meta-llama/Meta-Llama-3-8B --sequences 2 --sequence_length 8192

Writes fp8_layer.json: milliseconds, what backward keeps, and the relative error of each in norm, against the same in
fp32, of the result and of the input's gradient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, print_rows, write
from nnscaler.command import ArgumentParser, run
from nnscaler.kernels import fp8
from nnscaler.models import load_config

SECONDS = 3.0  # that each runs: the clock falls to what the GPU sustains


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose layer it is; a Llama")
    add("--sequences", type=int, default=2, help="sequences of a micro-batch")
    add("--sequence_length", type=int, default=8192, help="tokens of each")
    add("--output", type=Path, default=RESULTS, help="folder for fp8_layer.json")
    return parser.parse_args()


class InFp8(nn.Module):
    """A linear layer. Two of them that take the same tensor round it once, as the compiler finds."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return fp8.linear(fp8.rounded(x), self.weight)


def linear_layers_in_fp8(layer: nn.Module) -> nn.Module:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, InFp8(child))
    return layer


def milliseconds(step: Callable[[], object]) -> float:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = max(4, int(SECONDS / (time.perf_counter() - started)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for index in range(count):
        if index == count // 2:
            events[0].record()
        step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / (count - count // 2)


def measured(
    name: str, layer: nn.Module, x: Tensor, gradient: Tensor, where: Any, exact: list[Tensor]
) -> dict[str, Any]:
    compiled = torch.compile(layer, dynamic=False)

    def step() -> list[Tensor]:
        x.grad = None
        layer.zero_grad()
        result = compiled(x, position_embeddings=where)
        result.backward(gradient)
        assert x.grad is not None
        return [result.detach(), x.grad]

    found = step()
    errors = [float((one.float() - wanted).norm() / wanted.norm()) for one, wanted in zip(found, exact)]
    del found
    before = torch.cuda.memory_allocated()
    result = compiled(x, position_embeddings=where)
    kept = torch.cuda.memory_allocated() - before - result.nbytes
    del result
    return {
        "linear layers in": name, "milliseconds": milliseconds(step), "kept_mib": kept / 2**20,
        "error_of_result": errors[0], "error_of_gradient": errors[1],
    }  # fmt: skip


def main() -> None:
    options = parse()
    config = load_config(options.model_id)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    layer = LlamaDecoderLayer(config, 0).bfloat16()
    shape = (options.sequences, options.sequence_length, config.hidden_size)
    x, gradient = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape).bfloat16()
    where = LlamaRotaryEmbedding(config)(x, torch.arange(options.sequence_length).unsqueeze(0))
    wide = x.detach().float().requires_grad_()
    result = layer.float()(wide, position_embeddings=tuple(one.float() for one in where))
    result.backward(gradient.float())
    assert wide.grad is not None
    exact = [result.detach(), wide.grad]
    del result
    layer.bfloat16().zero_grad()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        rows = [measured("bf16", layer, x, gradient, where, exact)]
        rows.append(measured("fp8", linear_layers_in_fp8(layer), x, gradient, where, exact))
    print_rows(rows)
    write(options.output / "fp8_layer.json", {"model": options.model_id, "shape": list(shape), "rows": rows})


if __name__ == "__main__":
    run(main)
