"""Validation between steps: the loss of a dataset on which the model is not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import torch
import torch.distributed as dist

from nnscaler.cli.config import EvaluationConfig
from nnscaler.data.mixture import Part, in_order
from nnscaler.data.training import Batches, Counts, Share
from nnscaler.runtime.pipeline import TrainedModule

_LARGEST = 700.0  # nats, whose exponential still is a number


class Evaluation:
    """Evaluates a model in batches of as many samples as its training steps have, by forward alone.

    share       of a step's samples; the last batch is filled up with rows that count for nothing
    documents   whether they are kept apart
    go_on       asked before every batch, on all ranks alike, whether to
    vocabulary  how many ids the model knows; None: it is not judged
    """

    def __init__(
        self, config: EvaluationConfig, dataset: Part, module: TrainedModule, share: Share, ignored: int,
        device: torch.device, documents: bool, go_on: Callable[[], bool], vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        self._config, self._module, self._share, self._device, self._go_on = config, module, share, device, go_on
        samples = in_order(dataset, vocabulary)
        self._batches = Batches(samples, dataset.sequence_length, share, ignored, device, documents)
        whole = math.ceil(len(dataset) / share.step_samples)
        self._steps = min(whole, config.steps or whole)

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this optimizer step."""
        return last or step % self._config.interval == 0

    def run(self) -> dict[str, float | None]:
        """`eval_loss`, mean over all labels, in nats, and `eval_perplexity`, None where they are not finite; nothing
        where it did not go on. Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)  # losses, labels
        batches = self._batches.after(0)
        for _ in range(self._steps):
            if not self._go_on():
                return {}
            counts = Counts()
            loss = self._module.evaluate(counts.of(islice(batches, self._share.micro_batches)))
            if self._module.gives_loss:
                total += torch.stack([loss, torch.full_like(loss, counts.labels)])
        if dist.is_initialized():
            dist.all_reduce(total)
        losses, labels = total.tolist()
        mean = losses / labels if labels else math.nan
        if not math.isfinite(mean):
            return {"eval_loss": None, "eval_perplexity": None}
        return {"eval_loss": mean, "eval_perplexity": math.exp(mean) if mean < _LARGEST else None}
