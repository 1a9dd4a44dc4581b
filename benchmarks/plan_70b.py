"""Plans the document's 70B setting: Llama-3 70B, 8,192 tokens, 16 MI300X of 153 GB, plan 8, 64 accumulation steps.

    python benchmarks/plan_70b.py --json benchmarks/results/plan_70b.json

Prints the best plan without a pipeline, with 1F1B only, and with every schedule. All figures are predictions from the
data sheet and the modelled communication of `nnscaler/hardware/specs/mi300x.json`, not measurements. Tokens a second
and MFU are those of the plan's own report; the document reports 24.2 % by its formula, from 100.3 s a step.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nnscaler.command import ArgumentParser, run
from nnscaler.compiler import Source
from nnscaler.graph import Graph
from nnscaler.hardware import load_hardware
from nnscaler.mesh import meshes
from nnscaler.models import load_config
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, find_pipeline
from nnscaler.plan import GIB
from nnscaler.report.arithmetic import model_flops
from nnscaler.report.values import Work, rounded, speed_of
from nnscaler.trace import trace

MODEL, LENGTH, ACCUMULATION, MEMORY = "meta-llama/Meta-Llama-3-70B", 8192, 64, 153 * GIB
MESHES = meshes(8, 2, devices_per_node=8)
SEARCHES = {  # the longest first, as two run at a time
    "every schedule": Wanted(("LlamaDecoderLayer",)),
    "1F1B only": Wanted(("LlamaDecoderLayer",), schedule="1f1b"),
    "no pipeline": Wanted(stages=1),
}


def main() -> None:
    flags = ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--json", type=Path, help="file to write the results to (default: none)")
    args = flags.parse_args()
    graph, tracing = timed(trace_model)
    print(f"traced in {tracing['wall_seconds']} s")
    begin = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(2, _inherit, (graph,)) as processes:
        rows = processes.map(search, SEARCHES, chunksize=1)
    planning = round(time.perf_counter() - begin, 1)
    print(f"planned in {planning} s on two cores")
    for row in rows:
        print(
            f"{row['search']:15} {row['plan']:45} {row['tokens_per_second_per_gpu']:6.0f} tokens/s/GPU, causal MFU "
            f"{100 * row['mfu_causal']:.1f} %, the document's {100 * row['mfu']:.1f} %, {row['step_seconds']:.1f} s a "
            f"step, {row['memory_gib']:.0f} GiB; found in {row['wall_seconds']} s ({row['cpu_seconds']} s of one core)"
        )
    if args.json:
        setting = {"model": MODEL, "tokens": LENGTH, "devices": "16 MI300X", "accumulation": ACCUMULATION}
        result = {"setting": setting, "predicted": True, "torch": torch.__version__, "tracing": tracing}
        result |= {"planning_wall_seconds": planning, "plans": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _inherit(graph: Graph) -> None:
    """In a process of its own: what the parent has traced, which it need not send."""
    global traced
    traced = graph


def search(name: str) -> dict[str, Any]:
    """One of SEARCHES over the traced model."""
    return {"search": name, **plan(traced, SEARCHES[name])}


def trace_model() -> Graph:
    config = load_config(MODEL)
    prepare_config(config, LENGTH, "auto")
    inputs = {name: torch.empty((1, LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    source = Source(lambda: CausalLM(config), inputs)
    model, buffers = source.build()
    return trace(model, inputs, buffers)


def plan(graph: Graph, wanted: Wanted) -> dict[str, Any]:
    """The best plan as wanted, in figures."""
    hardware = load_hardware("mi300x")
    found, times = timed(
        lambda: find_pipeline(graph, MESHES, hardware, wanted, memory=MEMORY, micro_batches=ACCUMULATION, fused=True)
    )
    device_seconds = found.step_seconds * found.mesh.plan_ngpus / ACCUMULATION  # of a micro-batch
    speed = speed_of(device_seconds, Work(LENGTH, model_flops(graph, LENGTH), hardware.flops["bfloat16"]))
    figures: dict[str, Any] = {
        "plan": "no pipeline",
        "step_seconds": round(found.step_seconds, 2),
        **rounded(speed),
        "memory_gib": round(found.memory_bytes / GIB, 1),
    }
    if isinstance(found, PipelinePlan):
        layers = [len(stage.graph.calls("llama_decoder_layer")) for stage in found.stages]
        busy = [found.timeline.busy(rank) / found.timeline.seconds for rank in range(found.schedule.ranks)]
        figures |= {"plan": str(found.schedule), "layers": layers, "computing": [round(part, 3) for part in busy]}
    return figures | times


def timed(function: Any) -> tuple[Any, dict[str, float]]:
    """A function's result, and the seconds that it took, by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


if __name__ == "__main__":
    logging.getLogger("nnscaler").setLevel(logging.INFO)
    run(main)
