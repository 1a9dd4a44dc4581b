"""A torch profiler trace of a few training steps, and a table of where their time went."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before the profile: the first ones compile
STEPS = 2

# Category of a GPU kernel by its name; the first that matches counts.
_KERNELS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matmul", r"gemm|nvjet|xmma|cutlass|cublas|splitk"),
    ("optimizer", r"adam|multi_tensor"),
    ("memory-bound", r""),
)


class StepProfiler:
    """Profiles steps `WARM_UP` to `WARM_UP + STEPS` of a run: call `step()` after each.

    Writes trace.json (for Perfetto) and profile.txt into `folder`. Without a folder it does nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._done = 0
        self._profile: profile | None = None

    def step(self) -> None:
        """To be called when an optimizer step is over."""
        self._done += 1
        if self._folder is None:
            return
        if self._done == WARM_UP:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._done == WARM_UP + STEPS and self._profile is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / "trace.json"))
            text = kernel_table(self._profile, STEPS)
            (self._folder / "profile.txt").write_text(text)
            logger.info("profile of %d steps in %s\n%s", STEPS, self._folder, text)
            self._profile = None


def kernel_table(profiled: profile, steps: int, longest: int = 25) -> str:
    """Milliseconds a step by category of kernel, and of the kernels that take longest. Kernels may overlap."""
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name][0] += event.device_time / 1e3 / steps
            kernels[event.name][1] += 1 / steps
    totals: dict[str, float] = defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        totals[kernel_category(name)] += milliseconds
    lines = [f"{category:14} {totals[category]:10.2f} ms a step" for category, _ in _KERNELS if totals[category]]
    lines += ["", f"{'ms a step':>10} {'times':>6}  kernel"]
    for name, (milliseconds, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:longest]:
        lines.append(f"{milliseconds:10.2f} {count:6.0f}  {name[:110]}")
    return "\n".join(lines) + "\n"


def kernel_category(name: str) -> str:
    """The category of a GPU kernel."""
    return next(category for category, pattern in _KERNELS if re.search(pattern, name, re.IGNORECASE))
