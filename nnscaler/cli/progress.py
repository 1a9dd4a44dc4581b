"""What has happened since the last report: the mean loss of a label, and the speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.cli.reports import Read
from nnscaler.data.training import Counts
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.runtime.reading import Moment, Reading


@dataclass(frozen=True)
class StepSize:
    """What an optimizer step of all devices takes on.

    samples, tokens  sequences in all, and tokens of each
    mesh             of all devices
    flops            operations of a sequence: with attention in full, and with what its masks leave
    peak             operations a second that a device could do; None: not known
    """

    samples: int
    tokens: int
    mesh: Mesh | PipelineMesh
    flops: tuple[float, float]
    peak: float | None


class Progress:
    """Sums up steps until they are reported.

    step         after which training begins
    gives_loss   whether this rank has the losses: of a pipeline, those with the last stage do
    """

    def __init__(self, size: StepSize, step: int, gives_loss: bool, device: torch.device) -> None:
        self._size, self._reported, self._gives_loss, self._device = size, step, gives_loss, device
        self._total = torch.zeros(3, dtype=torch.float64, device=device)  # losses, labels, padding
        self._since = Moment(device)
        self._pauses: list[tuple[Moment, Moment]] = []  # since then

    def add(self, loss: Tensor, counts: Counts, norm: Tensor) -> None:
        """A step's sum of losses and its tokens on this rank; where the gradient's `norm` is not finite, they count for
        nothing."""
        if self._gives_loss:
            found = [loss, torch.full_like(loss, counts.labels), torch.full_like(loss, counts.padding)]
            self._total += torch.where(norm.isfinite(), torch.stack(found), 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside is no training: the time does not count."""
        began = Moment(self._device)
        yield
        self._pauses.append((began, Moment(self._device)))

    def report(self, step: int) -> Read:
        """What reads the numbers of all steps since the last report. Collective."""
        if dist.is_initialized():
            dist.all_reduce(self._total)
        total, memory = Reading(self._total), self._memory()
        steps, since, pauses, now = step - self._reported, self._since, self._pauses, Moment(self._device)
        self._total.zero_()
        self._since, self._pauses, self._reported = now, [], step

        def read() -> dict[str, float | None]:
            losses, labels, padding = total.numbers()
            seconds = since.until(now) - sum(began.until(ended) for began, ended in pauses)
            # Every device of a copy that has the loss has counted its labels.
            alike = self._size.mesh.ngpus_with_loss
            speed = self._speed(steps, seconds, labels / alike, padding / alike)
            return {"loss": losses / labels if labels else None, **speed, **memory}

        return read

    def _speed(self, steps: int, seconds: float, labels: float, padding: float) -> dict[str, float]:
        devices = self._size.mesh.runtime_ngpus
        sequences = steps * self._size.samples / seconds / devices  # a second and device
        values = {
            "tokens_per_second_per_gpu": sequences * self._size.tokens,
            "labels_per_second_per_gpu": labels / seconds / devices,
            "seconds_per_step": seconds / steps,
            "padding": padding / (steps * self._size.samples * self._size.tokens),
        }
        flops, peak = self._size.flops, self._size.peak
        if peak and self._device.type == "cuda":
            values["mfu"], values["mfu_causal"] = flops[0] * sequences / peak, flops[1] * sequences / peak
        return values

    def _memory(self) -> dict[str, float]:
        """The most that a GPU has held at a time since the last report."""
        if self._device.type != "cuda":
            return {}
        most = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {"peak_memory_gib": most}
