"""A decoder layer forward and backward on one GPU, compiled, with its linear layers in bf16 and in fp8, each with
products of its own for every weight, and with those side by side that read the same tensor.

    python benchmarks/fp8_layer.py --model_id meta-llama/Meta-Llama-3-8B --sequences 2 --sequence_length 8192

Writes fp8_layer.json: milliseconds, of two rounds, what backward keeps, and the relative error of each in norm, against
the same in fp32, of the result and of the input's gradient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, print_rows, write
from nnscaler.command import ArgumentParser, run
from nnscaler.kernels import fp8
from nnscaler.models import load_config

SECONDS = 3.0  # that each runs: the clock falls to what the GPU sustains
MLP, Q_K, Q_K_V = ("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj")
GROUPS = ((), (MLP,), (Q_K, MLP), (Q_K_V, MLP))


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose layer it is; a Llama")
    add("--sequences", type=int, default=2, help="sequences of a micro-batch")
    add("--sequence_length", type=int, default=8192, help="tokens of each")
    add("--output", type=Path, default=RESULTS, help="folder for fp8_layer.json")
    return parser.parse_args()


class Layer(nn.Module):
    """A Llama's decoder layer, some of whose weights lie side by side.

    groups  names of linear layers of which each group is one product
    fp8     whether products are in fp8. Two of them that take the same tensor round it once, as the compiler finds.
    """

    def __init__(self, plain: LlamaDecoderLayer, groups: Sequence[Sequence[str]], fp8: bool) -> None:
        super().__init__()
        self.plain, self.fp8 = [plain], fp8
        self.norms = nn.ModuleList([plain.input_layernorm, plain.post_attention_layernorm])
        linear = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
        self.sizes = {name.split(".")[1]: module.out_features for name, module in linear.items()}
        weights = {name.split(".")[1]: module.weight.detach() for name, module in linear.items()}
        alone = [(name,) for name in weights if not any(name in group for group in groups)]
        self.group_of = {name: tuple(group) for group in (*groups, *alone) for name in group}
        self.weights = nn.ParameterDict(
            {"_".join(group): torch.cat([weights[name] for name in group]) for group in (*groups, *alone)}
        )

    def products(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """Name of a linear layer -> its result."""
        found: dict[str, Tensor] = {}
        for group in dict.fromkeys(self.group_of[name] for name in names):
            weight = self.weights["_".join(group)]
            y = fp8.linear(fp8.rounded(x), weight) if self.fp8 else F.linear(x, weight)
            found.update(zip(group, y.split([self.sizes[name] for name in group], -1)))
        return found

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        attention = self.plain[0].self_attn
        found = self.products(self.norms[0](x), "q_proj", "k_proj", "v_proj")
        heads = [found[name].unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = (
            one.transpose(1, 2) for one in (*heads[:2], heads[2].contiguous())
        )  # v alone, not all three, is kept
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.products(mixed.transpose(1, 2).flatten(2), "o_proj")["o_proj"]
        found = self.products(self.norms[1](x), "gate_proj", "up_proj")
        return x + self.products(F.silu(found["gate_proj"]) * found["up_proj"], "down_proj")["down_proj"]


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
    name: str, side_by_side: str, layer: Layer, x: Tensor, gradient: Tensor, where: Any, exact: list[Tensor]
) -> tuple[dict[str, Any], Callable[[], object]]:
    """A row of the table, and a step of the layer."""
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
    row = {
        "linear layers in": name, "side by side": side_by_side, "kept_mib": kept / 2**20,
        "error_of_result": errors[0], "error_of_gradient": errors[1],
    }  # fmt: skip
    return row, step


def main() -> None:
    options = parse()
    torch._dynamo.config.recompile_limit = 64  # each layer has its own
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
        found = []
        for in_fp8 in (False, True):
            for groups in GROUPS:
                beside = "; ".join(", ".join(name.removesuffix("_proj") for name in group) for group in groups)
                mine = Layer(layer, groups, in_fp8)
                found.append(measured("fp8" if in_fp8 else "bf16", beside, mine, x, gradient, where, exact))
        for number in (1, 2):
            for row, step in found:
                row[f"milliseconds {number}"] = milliseconds(step)
    rows = [row for row, _ in found]
    print_rows(rows)
    write(options.output / "fp8_layer.json", {"model": options.model_id, "shape": list(shape), "rows": rows})


if __name__ == "__main__":
    run(main)
