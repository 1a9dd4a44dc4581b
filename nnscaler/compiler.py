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
import shutil
import tempfile
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from safetensors.torch import save_file

from nnscaler.codegen import generate
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.identity import DONE, differences, identity
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.planner import NothingFits
from nnscaler.planning import plan_for, what_fits
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.report import plan_report
from nnscaler.report.about import code_facts, headed
from nnscaler.report.chrome import chrome_trace
from nnscaler.report.page import plan_page
from nnscaler.report.pipeline import of_stage, pipeline_report, stage_page
from nnscaler.source import Source
from nnscaler.trace import trace

logger = logging.getLogger(__name__)

# What compiling writes into a directory; that and nothing else may be replaced.
OWN_FILES = (
    "graph.txt", "plan.json", "plan*.html", "trace.json", "gencode_stage*.py", "buffers.safetensors", DONE,
    "__pycache__",
)  # fmt: skip

__all__ = ["ComputeConfig", "Source", "compile_model", "differences", "identity"]


def compile_model(source: Source, config: ComputeConfig, directory: Path, explain: bool = False) -> Path:
    """Compiles into a directory, and returns it. The result appears whole or not at all.

    directory  may hold what another compile wrote, which is replaced; other files, such as checkpoints, stay
    explain    also plan with more memory and with more devices, so that plan.json and plan.html say what would help

    Raises UserError where `directory` is not a folder that a compile made, the model cannot be traced, an operator is
    not known, or no plan fits.
    """
    check_replaceable(directory)
    started = time.perf_counter()
    hardware = config.find_hardware()
    if hardware.remark:
        logger.warning(hardware.remark)
    model, buffers = source.build()
    graph = trace(model, source.inputs, buffers, config.trace_strategy, source.seed)
    if not any(parameter.requires_grad for parameter in graph.parameters.values()):
        raise UserError(f"what {type(model).__name__} returns gives no parameter a gradient: there is nothing to train")
    logger.info(
        "traced %s in %.1f s: %d operators in %d blocks",
        type(model).__name__, time.perf_counter() - started,
        sum(len(block.nodes) for block in graph.all_blocks()), len(graph.all_blocks()),
    )  # fmt: skip
    times = OperatorTimes.here() if config.hardware is None else None
    try:
        plan = plan_for(graph, config, hardware, times)
    except NothingFits as refusal:
        raise UserError(f"{refusal}; {what_fits(source, graph, config, hardware, refusal)}") from None
    replan = (lambda change: plan_for(graph, replace(config, **change), hardware, times)) if explain else None
    if isinstance(plan, PipelinePlan):
        stages = plan.stages
        report = pipeline_report(plan, source.work(graph, hardware), replan)
        report = headed(report, source.about())
        pages = {stage_page(index): plan_page(of_stage(report, index)) for index in range(len(stages))}
    else:
        stages, pages = [plan], {}
        report = headed(plan_report(plan, source.work(graph, hardware), replan), source.about())
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
            facts = code_facts(report, index if isinstance(plan, PipelinePlan) else None)
            (work / f"gencode_stage{index}.py").write_text(generate(stage, facts))
        if isinstance(plan, PipelinePlan):
            (work / "trace.json").write_text(json.dumps(chrome_trace(report)))
        if graph.buffers:
            save_file(
                {name: tensor.contiguous() for name, tensor in graph.buffers.items()}, work / "buffers.safetensors"
            )
        (work / DONE).write_text(json.dumps(identity(source, model, config, graph.record or None), indent=1))
        put_in_place(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("compiled to %s in %.1f s", directory, time.perf_counter() - started)
    return directory


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
