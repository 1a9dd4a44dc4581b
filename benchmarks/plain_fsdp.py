"""Trains the same model as train_llama.py on random tokens, by transformers under FSDP2 alone, and reports the speed.

    torchrun --nproc_per_node=2 benchmarks/plain_fsdp.py --model_id FOLDER --layers 4 --sequence_length 8192

What somebody writes who has no planner: each layer is a unit of `fully_shard` and is compiled, weights are fp32 and are
gathered in bf16, gradients are reduced in fp32, AdamW is the fused one. Each process trains sequences of its own. The
loss is computed in chunks, so that logits of a long sequence need no memory that train_llama.py does not need either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, write
from nnscaler.command import ArgumentParser, run
from nnscaler.models import load_config

CHUNK = 4096  # tokens whose logits exist at once


class Loss(nn.Module):
    """The mean cross-entropy of the next token. tokens [sequences, length + 1] -> a scalar, fp32"""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = model.model, model.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        chunks = zip(hidden.split(CHUNK), tokens[:, 1:].flatten().split(CHUNK))
        losses = [checkpoint(self._sum, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / hidden.shape[0]

    def _sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), labels, reduction="sum")


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose configuration is used")
    add("--layers", type=int, required=True, help="decoder layers")
    add("--sequence_length", type=int, default=8192, help="tokens")
    add("--micro_batch_size", type=int, default=1, help="sequences of a process and step")
    add("--steps", type=int, default=6, help="optimizer steps, of which two warm up")
    add("--recompute", action="store_true", help="keep the input of each layer alone")
    add("--experts", default="grouped_mm", help="transformers' implementation of experts")
    add("--output", type=Path, default=RESULTS / "train", help="folder for the result's JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    config = load_config(options.model_id)
    config.num_hidden_layers = options.layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=options.experts
        )
    loss_of = Loss(model).train()
    mesh = init_device_mesh("cuda", (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = set(model.model.layers)
    if options.recompute:
        apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    for layer in model.model.layers:
        layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss_of, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=1e-5, fused=True)
    shape = (options.micro_batch_size, options.sequence_length + 1)
    seconds = []
    for step in range(options.steps):
        torch.manual_seed(1000 * step + rank)
        tokens = torch.randint(config.vocab_size, shape, device="cuda")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.item()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        if rank == 0:
            print(f"step {step + 1}: {seconds[-1]:.3f} s, loss {shown:.4f}", file=sys.stderr)
    if rank == 0:
        median, tokens_a_step = statistics.median(seconds[2:]), options.micro_batch_size * options.sequence_length
        name = f"fsdp-{Path(options.model_id).name}-{options.layers}layers-{options.sequence_length}"
        result = {
            "name": name,
            "sequence_length": options.sequence_length,
            "sequences_per_step": options.micro_batch_size * world,
            "devices": world,
            "recompute": options.recompute,
            "seconds_per_step": median,
            "tokens_per_second_per_gpu": tokens_a_step / median,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            "steps": seconds,
        }
        write(options.output / f"{name}.json", result)
        print(f"{name}: {tokens_a_step / median:.0f} tokens/s/GPU, {result['peak_memory_gib']:.1f} GiB")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
