"""How long operators take on this machine's GPU: each distinct call is timed once, and the times are kept on disk.

operators/<device name>.json in the cache folder (see `nnscaler.hardware.local`) maps a call, written with the types and
shapes of its tensors, to the seconds of its forward and its backward; or to null, where it could not be run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler.graph import Node, Ref, TensorMeta, format_arguments, map_refs
from nnscaler.hardware.local import operators_path, write_text
from nnscaler.operators import operator_of

logger = logging.getLogger(__name__)

# Seconds that each operator runs. A GPU at the limit of its power lowers its clock within tenths of a second: attention
# takes 10 % longer then than at first (H200), and in training it is always so.
_SUSTAINED = 0.6
_LAUNCHING = 0.05  # a first run counts if the host is busy for at most this part of it: nothing was compiled then
_DEVICE = "cuda"
_KERNEL_LIBRARIES = ("flash-attn-4", "flash-attn", "liger-kernel")


class Part(NamedTuple):
    """A part of a call: its inputs, and how many times as long the whole takes."""

    inputs: Sequence[TensorMeta]
    times: float


@dataclass
class OperatorTimes:
    """Seconds of operators, from the cache, or measured on this machine.

    path      the file of the cache
    versions  of the libraries that the times depend on
    known     call -> [seconds of forward, seconds of backward], None where it could not be run
    measured  how many were measured since the cache was read
    spent     processor seconds that all measuring took
    """

    path: Path
    versions: str
    known: dict[str, list[float] | None] = field(default_factory=dict)
    measured: int = 0
    spent: float = 0.0

    @staticmethod
    def here() -> OperatorTimes | None:
        """The times of this machine's GPU. None where there is no GPU."""
        if not torch.cuda.is_available():
            return None
        times = OperatorTimes(operators_path(torch.cuda.get_device_name()), _versions())
        times.known = times.kept()
        return times

    def kept(self) -> dict[str, list[float] | None]:
        """What the cache has."""
        try:
            kept = json.loads(self.path.read_text())
            return dict(kept["seconds"]) if kept["versions"] == self.versions else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing was measured yet, or the file is of no use: it is written anew

    def seconds(self, node: Node, inputs: Sequence[TensorMeta], part: Part | None = None) -> tuple[float, float] | None:
        """(seconds of forward, seconds of backward) of a node on inputs of these local shapes. None where it cannot be
        run.

        part  what is timed in its place, if it takes very long

        Backward is 0 where no input has a gradient.
        """
        key = call_text(node, inputs)
        if key not in self.known and part is not None:
            of_part = self.seconds(node, part.inputs)
            self.known[key] = None if of_part is None else [part.times * seconds for seconds in of_part]
        if key not in self.known:
            if not self.measured:
                logger.info("timing operators on this device, once each (kept in %s)", self.path)
            self.measured += 1
            began = time.process_time()
            self.known[key] = _measure(node, inputs)
            self.spent += time.process_time() - began
        found = self.known[key]
        return None if found is None else (found[0], found[1])

    def save(self) -> None:
        """Writes what was measured, if anything was. Raises UserError where that is not possible.

        What another run has added to the cache meanwhile stays there.
        """
        if self.measured:
            known = self.kept() | self.known
            text = json.dumps({"versions": self.versions, "seconds": dict(sorted(known.items()))}, indent=0)
            write_text(self.path, text)
            self.measured = 0


def call_text(node: Node, inputs: Sequence[TensorMeta]) -> str:
    """A call, in which tensors are written by their types and shapes; `*` marks those with a gradient."""
    metas = iter(inputs)
    args, kwargs = map_refs((node.args, node.kwargs), lambda ref: Ref(_tensor_text(next(metas))))
    return f"{node.op}({format_arguments(args, kwargs)})"


def _tensor_text(meta: TensorMeta) -> str:
    return f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)}{'*' * meta.requires_grad}"


def _versions() -> str:
    """The versions of what the times depend on besides the device: torch, and the libraries of kernels."""
    found = [f"torch {torch.__version__}"]
    for name in _KERNEL_LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _measure(node: Node, inputs: Sequence[TensorMeta]) -> list[float] | None:
    try:
        given = operator_of(node).examples(node, inputs)
        tensors = iter([given[i].to(_DEVICE) if i in given else _example(meta) for i, meta in enumerate(inputs)])
        args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(tensors))
        return _forward_and_backward(_function(node), operator_of(node).backward == 0.0, args, kwargs)
    except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError too
        logger.info("%s cannot be timed here (%s): estimated instead", call_text(node, inputs), str(error)[:80])
        return None
    finally:
        torch.cuda.empty_cache()


def _function(node: Node) -> Callable[..., Any]:
    operator = operator_of(node)
    if operator.function is not None:
        return operator.function
    found: Any = torch.ops
    for part in node.op.split("."):
        found = getattr(found, part)
    return found


def _example(meta: TensorMeta) -> Tensor:
    """A tensor of random numbers like those in training.

    Kernels run faster on zeros, and where softmax gives equal or extreme results. So a matrix is taken for weights,
    which keep the size of what they are multiplied with, and all else is normalised. Integers are zeros, which are
    valid indices anywhere.
    """
    if not meta.dtype.is_floating_point:
        return torch.zeros(meta.shape, dtype=meta.dtype, device=_DEVICE)
    value = torch.randn(meta.shape, dtype=meta.dtype, device=_DEVICE)
    if len(meta.shape) == 2:
        value *= meta.shape[-1] ** -0.5
    return value.requires_grad_(meta.requires_grad)


def _forward_and_backward(function: Callable[..., Any], all_at_once: bool, args: Any, kwargs: Any) -> list[float]:
    """[seconds of forward, seconds of backward]: medians over the second half of some runs.

    They take so long that the clock falls to what the GPU can sustain. Where one run does, it is enough.

    all_at_once  forward computes the gradients too, as for results whose gradients are all equal
    """
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    gradients: list[Tensor] = []

    def run() -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        out = function(*args, **kwargs)
        events[1].record()
        results = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if x.requires_grad]
        if not gradients:
            gradients.extend(x.new_ones(()).expand(x.shape) if all_at_once else torch.randn_like(x) for x in results)
        if results:
            torch.autograd.grad(results, inputs, gradients, allow_unused=True)
        events[2].record()
        return events

    def alone() -> tuple[list[torch.cuda.Event], float, float]:
        """Events of one run; seconds of the host's work for it, and of all of it."""
        started = time.perf_counter()
        events = run()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        return events, launched - started, time.perf_counter() - started

    events, launching, seconds = alone()
    if seconds < _SUSTAINED or launching > _LAUNCHING * seconds:  # kernels may have been compiled
        events, _, seconds = alone()
    # Without waiting in between, when the device would rest.
    runs = [events] if seconds >= _SUSTAINED else [run() for _ in range(max(2, round(_SUSTAINED / seconds)))]
    torch.cuda.synchronize()
    late = runs[len(runs) // 2 :]
    forward, backward = (median(one[i].elapsed_time(one[i + 1]) / 1e3 for one in late) for i in (0, 1))
    return [forward, backward if gradients else 0.0]
