"""Samples for training, in an order that depends on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnscaler.data.documents import POSITIONS, document_inputs
from nnscaler.data.files import COLUMN, LABELS
from nnscaler.data.packed import IGNORED, PackedDataset

__all__ = ["Batches", "PackedDataset", "SampleOrder", "Share", "with_labels"]


@dataclass
class SampleOrder:
    """Which row is the k-th sample: a new permutation of all rows every epoch."""

    rows: int
    seed: int
    _epoch: int = -1
    _permutation: Any = None

    def row(self, sample: int) -> int:
        epoch, place = divmod(sample, self.rows)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch, self._permutation = epoch, generator.permutation(self.rows)
        return int(self._permutation[place])


@dataclass(frozen=True)
class Share:
    """A replica's part of each step's samples: micro-batch m of replica r holds the next `micro_batch_size` samples
    after those of micro-batches before it and of replicas before it."""

    replica: int
    replicas: int
    micro_batch_size: int
    micro_batches: int

    @property
    def step_samples(self) -> int:
        return self.replicas * self.micro_batch_size * self.micro_batches

    def samples(self, consumed: int, micro_batch: int) -> range:
        """Sample numbers of a micro-batch of the step that starts after `consumed` samples."""
        begin = consumed + (micro_batch * self.replicas + self.replica) * self.micro_batch_size
        return range(begin, begin + self.micro_batch_size)


class Batches:
    """Micro-batches of one replica, read ahead by a thread.

    documents  whether batches keep documents apart: inputs say which token is whose, and no token is to be given by a
               document before its own
    """

    def __init__(
        self,
        dataset: PackedDataset,
        seed: int,
        share: Share,
        ignored: int,
        device: torch.device,
        documents: bool = False,
    ) -> None:
        self._dataset, self._share, self._ignored, self._device = dataset, share, ignored, device
        self._documents = documents
        self._order = SampleOrder(len(dataset), seed)

    def after(self, consumed: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        """(inputs on the device, number of labels) of each micro-batch of the steps after `consumed` samples, without
        end. While one is computed with, the next is read, also from one step to the next."""
        wanted = self._samples(consumed)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, next(wanted))
            while True:
                batch, labels = ahead.result()
                ahead = reader.submit(self._read, next(wanted))
                yield {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}, labels

    def _samples(self, consumed: int) -> Iterator[range]:
        for begin in count(consumed, self._share.step_samples):
            yield from (self._share.samples(begin, index) for index in range(self._share.micro_batches))

    def _read(self, samples: range) -> tuple[dict[str, Tensor], int]:
        numbers = [self._order.row(sample) for sample in samples]
        rows = [self._dataset.rows[number] for number in numbers]
        batch = with_labels(_stacked(rows, COLUMN), self._ignored)
        if self._dataset.has_labels:
            own = _stacked(rows, LABELS)[:, 1:]
            batch["labels"][:, :-1] = own.masked_fill(own == IGNORED, self._ignored)
        if self._documents:
            starts = [self._dataset.document_starts(number) for number in numbers]
            batch |= document_inputs(starts, self._dataset.sequence_length)
            batch["labels"][:, :-1].masked_fill_(batch[POSITIONS][:, 1:] == 0, self._ignored)
        labels = int((batch["labels"] != self._ignored).sum())
        if self._device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch, labels


def _stacked(rows: list[dict[str, Any]], column: str) -> Tensor:
    return torch.from_numpy(np.stack([row[column] for row in rows]).astype(np.int64))


def with_labels(input_ids: Tensor, ignored: int) -> dict[str, Tensor]:
    """`input_ids` [b, l] int64 and `labels`, the same shape: the token after each; `ignored` after the last."""
    labels = torch.full_like(input_ids, ignored)
    labels[:, :-1] = input_ids[:, 1:]
    return {"input_ids": input_ids, "labels": labels}
