"""Compiling: model -> graph -> plan -> generated code, as files in one directory.

graph.txt            the traced model
plan.json            the plan with all its costs, and what the runtime needs to know of parameters
plan.html            the same, to read; of a pipeline there is a plan_stage0.html, ..., too
gencode_stage0.py    what each rank runs; of a pipeline, one such file a stage
buffers.safetensors  values of the model's buffers
compiled.json        what all of this was compiled for
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nnscaler.codegen import generate
from nnscaler.config import ComputeConfig
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.operators.registry import all_registered
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, find_pipeline
from nnscaler.plan import Plan
from nnscaler.planner import find_plan
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.report import plan_report
from nnscaler.report.page import plan_page
from nnscaler.report.pipeline import pipeline_report, stage_page
from nnscaler.report.values import Work
from nnscaler.trace import build_on_meta, find_strategy, trace
from nnscaler.trace.repeated import describe

logger = logging.getLogger(__name__)

GIB = 2**30
DONE = "compiled.json"


@dataclass(frozen=True)
class Source:
    """What is compiled.

    make    builds the model
    inputs  examples of its forward's arguments by name; values matter only to a trace strategy that executes the model
    dtype   of the parameters in computation
    seed    of the weights with which such a strategy executes it
    tokens  of a micro-batch, and `flops` the forward and backward operations that they take (attention counted in full,
            and halved by causality), for figures of speed; None: without
    """

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    tokens: int = 0
    flops: tuple[float, float] | None = None

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model on the meta device, and its buffers' values."""
        model, buffers = build_on_meta(self.make)
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.to(self.dtype)
        return model, buffers

    def work(self, hardware: Hardware) -> Work | None:
        """What a micro-batch is, where that is known."""
        peak = hardware.flops.get(str(self.dtype).removeprefix("torch."))
        return Work(self.tokens, self.flops, peak) if self.flops and peak else None


def compile_model(source: Source, config: ComputeConfig, directory: Path, explain: bool = False) -> Path:
    """Compiles into `directory`, replacing what is there. It appears whole or not at all.

    explain  also plan with more memory and more devices, for plan.json and plan.html to say what would help; this is
             not done for a pipeline

    Raises UserError where the model cannot be traced, an operator is not known, or no plan fits.
    """
    started = time.perf_counter()
    hardware = config.find_hardware()
    if hardware.remark:
        logger.warning(hardware.remark)
    model, buffers = source.build()
    graph = trace(model, source.inputs, buffers, config.trace_strategy, source.seed)
    logger.info(
        "traced %s in %.1f s: %d operators in %d blocks",
        type(model).__name__, time.perf_counter() - started,
        sum(len(block.nodes) for block in graph.all_blocks()), len(graph.all_blocks()),
    )  # fmt: skip
    times = OperatorTimes.here() if config.hardware is None else None
    plan = (_pipeline if config.explore_pipeline else _plan)(graph, config, hardware, times)
    if isinstance(plan, PipelinePlan):
        stages = plan.stages
        report = pipeline_report(plan, source.work(hardware))
        pages = {stage_page(index): plan_page(stage) for index, stage in enumerate(report["stages"])}
    else:
        replan = (lambda change: _plan(graph, replace(config, **change), hardware, times)) if explain else None
        stages, report, pages = [plan], plan_report(plan, source.work(hardware), replan), {}
    if times is not None:
        times.save()
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (work / "graph.txt").write_text(str(graph))
        (work / "plan.json").write_text(json.dumps(report, indent=1))
        for name, page in {"plan.html": plan_page(report), **pages}.items():
            (work / name).write_text(page)
        for index, stage in enumerate(stages):
            (work / f"gencode_stage{index}.py").write_text(generate(stage))
        if graph.buffers:
            save_file(
                {name: tensor.contiguous() for name, tensor in graph.buffers.items()}, work / "buffers.safetensors"
            )
        (work / DONE).write_text(json.dumps(identity(source, model, config), indent=1))
        shutil.rmtree(directory, ignore_errors=True)
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("compiled to %s in %.1f s", directory, time.perf_counter() - started)
    return directory


def _plan(graph: Graph, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None) -> Plan:
    return find_plan(graph, config.meshes(hardware), hardware, **_settings(config, hardware, times))


def _pipeline(
    graph: Graph, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None
) -> Plan | PipelinePlan:
    wanted = Wanted(config.pipeline_pivots, config.pipeline_schedule, config.pipeline_nstages)
    return find_pipeline(graph, config.meshes(hardware), hardware, wanted, **_settings(config, hardware, times))


def _settings(config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None) -> dict[str, Any]:
    return {
        "memory": None if config.gpu_mem_constraint is None else config.gpu_mem_constraint * GIB,
        "recompute_modules": config.recompute_modules,
        "micro_batches": config.micro_batches,
        "fused": hardware.name != "CPU",
        "times": times,
    }


def identity(source: Source, model: nn.Module, config: ComputeConfig) -> dict[str, Any]:
    """Everything that a compiled directory depends on, as plain values: equal identities compile to the same files."""
    return {
        "model": _digest(describe(model)),
        "inputs": {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in source.inputs.items()},
        "dtype": str(source.dtype),
        "values": _values(source) if find_strategy(config.trace_strategy).executes else None,
        "config": {
            **asdict(config),
            "recompute_modules": list(config.recompute_modules or [None]),
            "pipeline_pivots": list(config.pipeline_pivots),
        },
        "hardware": config.find_hardware().identity(),
        "operators": _digest("\n".join(_source_of(function) for function in all_registered())),
        "nnscaler": _package_digest(),
        "torch": torch.__version__.split("+")[0],
    }


def _values(source: Source) -> str:
    """Digest of what decides the values that an executed model reads."""
    digest = hashlib.sha256(str(source.seed).encode())
    for tensor in source.inputs.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(directory: Path, wanted: Mapping[str, Any]) -> list[str] | None:
    """What a compiled directory was compiled differently for; None where there is nothing complete."""
    try:
        found: dict[str, Any] = json.loads((directory / DONE).read_text())
    except (OSError, ValueError):
        return None
    found_flat, wanted_flat = _flatten(found), _flatten(wanted)
    return [
        f"{key}: compiled {found_flat.get(key)}, wanted {wanted_flat.get(key)}"
        for key in sorted({*found_flat, *wanted_flat})
        if found_flat.get(key) != wanted_flat.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return function.__qualname__


def _package_digest() -> str:
    """Digest of this package's own source: another version of the compiler may plan and write differently."""
    root = Path(__file__).parent
    files = sorted(path for kind in ("*.py", "*.json") for path in root.rglob(kind))
    return _digest("\n".join(f"{path.relative_to(root)}\n{path.read_text()}" for path in files))
