"""One plain `torch.export` of a model, the yardstick of compile_time.py.

    python benchmarks/plain_export.py MODEL SEQUENCE_LENGTH

Prints {"seconds", "cpu_seconds", "nodes"} of the call.
The model is the one that train.py compiles, logits and loss included, with the attention of transformers, in bf16 on
the meta device, and every layer is traced.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nnscaler.models import load_config
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.trace import build_on_meta


def main() -> None:
    model_id, length = sys.argv[1], int(sys.argv[2])
    config = load_config(model_id)
    prepare_config(config, length, "sdpa")
    model, _ = build_on_meta(lambda: CausalLM(config))
    model = model.to(torch.bfloat16)
    tokens = torch.empty(1, length, dtype=torch.int64, device="meta")
    wall, cpu = time.perf_counter(), time.process_time()
    program = torch.export.export(model, (), {"input_ids": tokens, "labels": tokens})
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "nodes": nodes}))


if __name__ == "__main__":
    main()
