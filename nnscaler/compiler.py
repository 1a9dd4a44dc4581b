"""Compiling: model -> graph -> plan -> generated code. The result is one directory with these files:

graph.txt            the traced model
plan.json            the plan with all its costs, and what the run time needs to know of parameters
plan.html            the same, for people; a pipeline also has plan_stage0.html, ...
trace.json           of a pipeline: the simulated step, for chrome://tracing and https://ui.perfetto.dev
gencode_stage0.py    what each rank runs; a pipeline has one such file for each stage
buffers.safetensors  the values of the model's buffers
compiled.json        what all of this was compiled for
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save

from nnscaler.batch import Batch
from nnscaler.codegen import generate
from nnscaler.config import ComputeConfig
from nnscaler.directory import work_beside, writing
from nnscaler.division_search import divide
from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.identity import DONE, differences, identity
from nnscaler.kernels.fp8 import E4M3
from nnscaler.lazy import seldom_collected
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.planning import AnyPlan, plan_for, plan_or_advise, traced
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.report import plan_report
from nnscaler.report.about import code_facts, headed
from nnscaler.report.chrome import chrome_trace
from nnscaler.report.divisions import division_rows
from nnscaler.report.page import plan_page
from nnscaler.report.pipeline import of_stage, pipeline_report, stage_page
from nnscaler.source import Source

logger = logging.getLogger(__name__)

# What compiling writes into a directory; that and nothing else may be replaced.
OWN_FILES = (
    "graph.txt", "plan.json", "plan*.html", "trace.json", "gencode_stage*.py", "buffers.safetensors", DONE,
    "__pycache__",
)  # fmt: skip

__all__ = ["ComputeConfig", "Source", "compile_model", "differences", "identity"]


@seldom_collected()
def compile_model(
    source: Source, config: ComputeConfig, directory: Path, explain: bool = False, batch: Batch | None = None
) -> Path:
    """Compiles into a directory, and returns it. The result appears whole or not at all.

    directory  may hold what another compile wrote, which is replaced; other files, such as checkpoints, stay
    explain    also plan with more memory and with more devices, so that plan.json and plan.html say what would help
    batch      the planner chooses how it is divided, and micro-batches' size and number, and plan_ngpus, with it

    Raises UserError where `directory` is not a folder that a compile made, the model cannot be traced, an operator is
    not known, no plan fits, or `directory` cannot be written.
    """
    check_replaceable(directory)
    started = time.perf_counter()
    hardware = config.find_hardware()
    if hardware.remark:
        logger.warning(hardware.remark)
    if source.fp8 and not hardware.multiplies(E4M3):
        logger.warning("%s has no products in fp8, as far as is known: all are planned in bf16", hardware.name)
    times = OperatorTimes.here() if config.hardware is None else None
    divided = divide(batch, source, config, hardware, times) if batch else None
    if divided is not None:
        source, config, graph, plan = divided.source, divided.config, divided.graph, divided.plan
    else:
        graph = traced(source, config.trace_strategy)
        plan = plan_or_advise(source, graph, config, hardware, times)
    replan = (lambda change: plan_for(graph, replace(config, **change), hardware, times)) if explain else None
    work_done = source.work(graph, hardware)
    about = _about(source, plan)
    if about.get("products_in_fp8") == 0 and hardware.multiplies(E4M3):
        logger.warning("no product is faster in fp8 here: all are planned in bf16")
    if isinstance(plan, PipelinePlan):
        report = headed(pipeline_report(plan, work_done, replan), about)
    else:
        report = headed(plan_report(plan, work_done, replan), about)
    if divided is not None:
        report["divisions"] = division_rows(divided, source.length)
    if times is not None:
        times.save()
    made_for = identity(source, source.build(), config, graph.record or None, batch)
    with writing(directory), work_beside(directory) as work:
        _write(work, graph, plan, report)
        (work / DONE).write_text(json.dumps(made_for, indent=1))
        put_in_place(work, directory)
    logger.info("compiled to %s in %.1f s", directory, time.perf_counter() - started)
    return directory


def _about(source: Source, plan: AnyPlan) -> dict[str, Any]:
    """What the plan is made for; and how many products of the blocks multiply in fp8, where that was asked for."""
    about = source.about()
    if source.fp8:
        stages = plan.stages if isinstance(plan, PipelinePlan) else [plan]
        about["products_in_fp8"] = sum(node.in_fp8 for stage in stages for node in stage.nodes.values())
    return about


def _write(folder: Path, graph: Graph, plan: AnyPlan, report: dict[str, Any]) -> None:
    """Writes all files but the last, which says that they are complete."""
    stages = plan.stages if isinstance(plan, PipelinePlan) else [plan]
    (folder / "graph.txt").write_text(str(graph))
    (folder / "plan.json").write_text(json.dumps(report, indent=1))
    (folder / "plan.html").write_text(plan_page(report))
    for index, stage in enumerate(stages):
        facts = code_facts(report, index if isinstance(plan, PipelinePlan) else None)
        (folder / f"gencode_stage{index}.py").write_text(generate(stage, facts))
    if isinstance(plan, PipelinePlan):
        (folder / "trace.json").write_text(json.dumps(chrome_trace(report)))
        for index in range(len(stages)):
            (folder / stage_page(index)).write_text(plan_page(of_stage(report, index)))
    if graph.buffers:
        buffers = save({name: tensor.contiguous() for name, tensor in graph.buffers.items()})
        (folder / "buffers.safetensors").write_bytes(buffers)  # safetensors' own files are for their owner alone


def check_replaceable(directory: Path) -> None:
    """Raises UserError unless a directory is absent, empty, or one that a compile made."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"{directory} is not a folder that a compile made; choose another name")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    if names and DONE not in names:
        raise UserError(
            f"{directory} holds '{names[0]}' and no {DONE}: it is not a folder that a compile made; choose another name"
        )


def put_in_place(work: Path, directory: Path) -> None:
    """Moves the files in `work` to `directory`, where they replace what another compile wrote."""
    check_replaceable(directory)
    if not directory.exists() or not any(directory.iterdir()):
        work.rename(directory)  # over an empty folder
        return
    (directory / DONE).unlink()  # nothing complete is there until the end
    for path in directory.iterdir():
        if path.is_file() and any(fnmatch(path.name, own) for own in OWN_FILES):
            path.unlink()
    for path in sorted(work.iterdir(), key=lambda path: path.name == DONE):
        path.rename(directory / path.name)
    work.rmdir()
