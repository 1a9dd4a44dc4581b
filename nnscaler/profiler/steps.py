"""A trace of two training steps by torch's profiler, and a table of where the time of the second one went.

That step is counted from the end of the backward before it to the end of its own: so it has one whole update, and the
forward beside which the update runs.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before the profile: the first ones compile
LEAST = WARM_UP + 2  # steps that a run takes
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # of the kinds of events in a trace
_MARK = "spin_kernel"  # what `torch.cuda._sleep` runs, and nothing else: where the counted step begins and ends

COMMUNICATION, COPIES = "communication", "copies to the host"
EXPOSED, HIDDEN, IDLE, WHOLE = "exposed", "hidden", "idle", "whole"
# Category of a GPU kernel by its name; the first that matches counts.
_KERNELS = (
    (COMMUNICATION, r"nccl"),
    (COPIES, r"memcpy (htod|dtoh)"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matmul", r"gemm|nvjet|xmma|cutlass|cublas|splitk"),
    ("optimizer", r"adam|multi_tensor|foreach|add_gradient"),
    ("memory-bound", r""),
)


class KernelRun(NamedTuple):
    """One run of a kernel on the device: its name, and when it starts and ends, in milliseconds."""

    name: str
    start: float
    end: float


class StepProfiler:
    """Profiles two steps of a run after the first WARM_UP. `step()` must be called after each step.

    A context in which the steps run: leaving it before the last of those steps gives the profile up, and says so.

    folder     where trace.json (for Perfetto), profile.txt, and profile.json with the same times are written; None:
               nothing is profiled
    predicted  category -> seconds of a step, by the plan
    """

    def __init__(self, folder: Path | None, predicted: Mapping[str, float]) -> None:
        self._folder, self._predicted = folder, predicted
        self._done = 0
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()  # a process that ends with a running one crashes
            self._profile = None
        if self._folder is not None and self._done < LEAST:
            logger.warning("no profile is written: this run took %d of the %d steps that it needs", self._done, LEAST)

    def step(self) -> None:
        """To be called when an optimizer step is over."""
        self._done += 1
        if self._folder is None:
            return
        if self._done == WARM_UP:
            if torch.cuda.is_available():
                torch.cuda._sleep(1)  # a kernel's first launch waits for all that the device does, an update too
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._profile is not None and self._done <= LEAST:
            if torch.cuda.is_available():
                torch.cuda._sleep(1)
            if self._done == LEAST:
                self._write(self._profile, self._folder)
                self._profile = None

    def _write(self, profiled: profile, folder: Path) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiled.stop()
        try:
            text = self._tables(profiled, folder)
        except (OSError, ValueError) as error:  # a full disk, say, on which the trace is missing or cut short
            logger.warning(
                "no profile is written to %s, which has no room for it or cannot be written: %s", folder, error
            )
        else:
            logger.info("profile of a step in %s\n%s", folder, text)

    def _tables(self, profiled: profile, folder: Path) -> str:
        """Writes the files; returns what is said of them."""
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / "trace.json"
        profiled.export_chrome_trace(str(trace))
        kernels = kernel_runs(trace)
        text = step_table(kernels, self._predicted)
        (folder / "profile.txt").write_text(text)
        if times := milliseconds_by_category(kernels):
            (folder / "profile.json").write_text(json.dumps({"milliseconds": times}, indent=1) + "\n")
        return text


def kernel_runs(trace: Path) -> list[KernelRun]:
    """What ran on the GPU in the step that is counted; of what ran longer, the part within.

    trace  what torch's profiler wrote. (What it has in memory takes it several times as long to tell.)
    """

    def of_a_device(found: dict[str, Any]) -> dict[str, Any] | None:
        return found if found.get("cat") in _ON_DEVICE or "traceEvents" in found else None

    with trace.open() as file:
        events = json.load(file, object_hook=of_a_device)["traceEvents"]
    kernels = [
        KernelRun(event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3) for event in events if event
    ]
    marks = sorted((kernel for kernel in kernels if _MARK in kernel.name), key=lambda kernel: kernel.start)
    if not kernels:
        return []
    assert len(marks) == 2, f"{len(marks)} marks among the kernels of a profile"
    begin, end = marks[0].end, marks[1].start
    return [
        KernelRun(kernel.name, max(kernel.start, begin), min(kernel.end, end))
        for kernel in kernels
        if kernel.start < end and kernel.end > begin
    ]


def step_table(kernels: Sequence[KernelRun], predicted: Mapping[str, float], longest: int = 25) -> str:
    """A text: where the time of the counted step went, beside what the plan predicts, and its longest kernels.

    kernels    what ran on the GPU in that step
    predicted  category -> seconds of a step (`predicted.seconds_by_category` of plan.json)

    All figures are milliseconds of a step on this device. Communication is exposed while nothing is computed beside it,
    and copies to and from the host are while there is no communication either; time in which no kernel runs is idle.
    Where no kernel ran on a GPU, the text says that alone.
    """
    if not kernels:
        return "no kernel ran on a GPU, and only GPUs have such a table; trace.json has what the processor did\n"
    measured, planned = milliseconds_by_category(kernels), _planned(predicted)
    lines = [f"{'ms a step':26} {'measured':>10} {'plan':>10}"]
    for name in dict.fromkeys((*measured, *planned)):
        cells = ("" if name not in values else f"{values[name]:.2f}" for values in (measured, planned))
        lines.append(f"{name:26} {' '.join(f'{cell:>10}' for cell in cells)}")
    lines += ["", f"{'ms a step':>10} {'times':>6}  kernel"]
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.end - kernel.start)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:longest]:
        lines.append(f"{sum(times):10.2f} {len(times):6}  {name[:110]}")
    return "\n".join(lines) + "\n"


def milliseconds_by_category(kernels: Sequence[KernelRun]) -> dict[str, float]:
    """Category -> milliseconds, between the first kernel's start and the last one's end; nothing without kernels."""
    if not kernels:
        return {}
    totals = {name: 0.0 for name, _ in _KERNELS}
    for kernel in kernels:
        totals[kernel_category(kernel.name)] += kernel.end - kernel.start
    communication, copies = totals.pop(COMMUNICATION), totals.pop(COPIES)
    on_device = [kernel for kernel in kernels if kernel_category(kernel.name) != COPIES]
    computed = covered([kernel for kernel in on_device if kernel_category(kernel.name) != COMMUNICATION])
    without_copies, busy = covered(on_device), covered(kernels)
    whole = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return {
        **totals,
        f"{COMMUNICATION} {EXPOSED}": without_copies - computed,
        f"{COPIES} {EXPOSED}": busy - without_copies,
        IDLE: whole - busy,
        WHOLE: whole,
        f"{COMMUNICATION} {HIDDEN}": communication - (without_copies - computed),
        f"{COPIES} {HIDDEN}": copies - (busy - without_copies),
    }


def covered(kernels: Sequence[KernelRun]) -> float:
    """Milliseconds in which at least one of these kernels runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def _planned(predicted: Mapping[str, float]) -> dict[str, float]:
    """The plan's milliseconds, in the categories of kernels. Registered operators, such as the loss, count as
    matmul."""
    own = {name for name, _ in _KERNELS} | {"recompute", f"{COMMUNICATION} {EXPOSED}", f"{COPIES} {EXPOSED}"}
    kinds = {name: name for name in own} | {"casts of master weights": "memory-bound"}
    values: dict[str, float] = defaultdict(float)
    for name, seconds in predicted.items():
        values[kinds.get(name, "matmul")] += seconds * 1e3
    return {**values, WHOLE: sum(values.values())}


def kernel_category(name: str) -> str:
    """The category of a GPU kernel."""
    return next(category for category, pattern in _KERNELS if re.search(pattern, name, re.IGNORECASE))
