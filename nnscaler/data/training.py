"""Samples for training, in an order that depends on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nnscaler.data.documents import DOCUMENTS, POSITIONS, document_inputs
from nnscaler.data.files import COLUMN, DOCUMENT_STARTS, LABELS
from nnscaler.data.packed import IGNORED, PackedDataset, Row
from nnscaler.kernels import Documents

__all__ = [
    "Batch", "Batches", "Counts", "First", "InOrder", "PackedDataset", "SampleOrder", "Samples", "Share", "Shuffled",
    "with_labels",
]  # fmt: skip


@dataclass
class SampleOrder:
    """Which row is the k-th sample: all rows, in a new order in every epoch.

    part  the place of the dataset in a mixture; each dataset of a mixture has an order of its own
    """

    rows: int
    seed: int
    part: int = 0
    _epoch: int = -1
    _permutation: Any = None

    def row(self, sample: int) -> int:
        epoch, place = divmod(sample, self.rows)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch, self.part) if self.part else (self.seed, epoch))
            self._epoch, self._permutation = epoch, generator.permutation(self.rows)
        return int(self._permutation[place])


@dataclass(frozen=True)
class Share:
    """The samples of each step that one copy of the model trains on.

    Micro-batch m of copy r gets the next `micro_batch_size` samples after those of all micro-batches before it, and of
    copies before it in the same micro-batch.
    """

    replica: int
    replicas: int
    micro_batch_size: int
    micro_batches: int

    @property
    def step_samples(self) -> int:
        return self.replicas * self.micro_batch_size * self.micro_batches

    def samples(self, consumed: int, micro_batch: int) -> range:
        """The numbers of a micro-batch's samples, in the step that begins after `consumed` samples."""
        begin = consumed + (micro_batch * self.replicas + self.replica) * self.micro_batch_size
        return range(begin, begin + self.micro_batch_size)


class Samples(Protocol):
    """Rows by sample number, from 0."""

    def sample(self, number: int) -> Row | None:
        """A row with `input_ids`, and with `labels` where it says itself what is learned; None: there are no more."""


class InOrder:
    """Each row of a dataset once, in the order in which they are stored."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset

    def sample(self, number: int) -> Row | None:
        return self._dataset.row(number) if number < len(self._dataset) else None


class Shuffled:
    """The rows of a dataset in the order of a seed, epoch after epoch, without end."""

    def __init__(self, dataset: PackedDataset, seed: int, part: int = 0) -> None:
        self._dataset, self._order = dataset, SampleOrder(len(dataset), seed, part)

    def sample(self, number: int) -> Row:
        return self._dataset.row(self._order.row(number))


@dataclass(frozen=True)
class First:
    """The first `count` samples of others."""

    samples: Samples
    count: int

    def sample(self, number: int) -> Row | None:
        return self.samples.sample(number) if number < self.count else None


class Batch(NamedTuple):
    """A micro-batch: a model's inputs, and how many of its tokens have labels and how many are padding."""

    inputs: dict[str, Tensor]
    labels: int
    padding: int


class _Coming:
    """A batch on its way to the device.

    stream  what copies it there, beside what is computed; None: it is copied at once
    """

    def __init__(self, on_host: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.on_host, self._device = on_host, device
        with torch.cuda.stream(stream):  # of None, nothing changes
            self._inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in on_host.inputs.items()}
        self._copied = stream.record_event() if stream is not None else None

    def take(self) -> Batch:
        """The batch on the device. What is computed next comes after its copy."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for tensor in self._inputs.values():
                tensor.record_stream(current)  # its memory stays its own until that is computed
        return self.on_host._replace(inputs=self._inputs)


class Batches:
    """The micro-batches of one copy of the model. A thread reads them ahead.

    length     tokens of every row
    ignored    the label of tokens that do not count. Where samples end, rows have only such labels
    documents  whether batches keep documents apart: inputs say to which document a token belongs, and the last token of
               a document has no label
    """

    def __init__(
        self,
        samples: Samples,
        length: int,
        share: Share,
        ignored: int,
        device: torch.device,
        documents: bool = False,
    ) -> None:
        self._samples, self._length, self._share = samples, length, share
        self._ignored, self._device, self._documents = ignored, device, documents
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after(self, consumed: int) -> Iterator[Batch]:
        """The micro-batches of the steps after `consumed` samples, on the device, without end.

        While one is computed with, the next is copied to the device and the one after it is read, also from one step to
        the next: copies to a GPU run in turn, and one that is asked for after an update waits for all that the update
        brings from the host.
        """
        wanted = self._numbers(consumed)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, next(wanted))
            coming: _Coming | None = None
            while True:
                batch = ahead.result()
                ahead = reader.submit(self._read, next(wanted))
                here, coming = coming, _Coming(batch, self._device, self._stream)
                if here is not None:
                    yield self._arrived(here)

    def _arrived(self, coming: _Coming) -> Batch:
        """The batch on the device, for what is computed next."""
        batch = coming.take()
        if self._documents:
            Documents(batch.inputs[DOCUMENTS]).note(coming.on_host.inputs[DOCUMENTS])
        return batch

    def _numbers(self, consumed: int) -> Iterator[range]:
        for begin in count(consumed, self._share.step_samples):
            yield from (self._share.samples(begin, index) for index in range(self._share.micro_batches))

    def _read(self, numbers: range) -> Batch:
        rows = [self._samples.sample(number) for number in numbers]
        batch = with_labels(_stacked([self._column(row, COLUMN, 0) for row in rows]), self._ignored)
        own = _stacked([self._column(row, LABELS if row and LABELS in row else COLUMN, IGNORED) for row in rows])
        batch["labels"][:, :-1] = own[:, 1:].masked_fill(own[:, 1:] == IGNORED, self._ignored)
        if self._documents:
            starts = [self._column(row, DOCUMENT_STARTS, 0) for row in rows]
            batch |= document_inputs(starts, self._length)
            batch["labels"][:, :-1].masked_fill_(batch[POSITIONS][:, 1:] == 0, self._ignored)
        labels = int((batch["labels"] != self._ignored).sum())
        if self._device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return Batch(batch, labels, _padding(own, batch["input_ids"]))

    def _column(self, row: Row | None, column: str, otherwise: int) -> Any:
        return np.full(self._length, otherwise) if row is None else row[column]


class Counts:
    """What some micro-batches hold together, in tokens: those with labels, and those that fill rows up."""

    def __init__(self) -> None:
        self.labels, self.padding = 0, 0

    def of(self, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
        """The inputs of micro-batches, which are counted as they are taken."""
        for batch in batches:
            self.labels += batch.labels
            self.padding += batch.padding
            yield batch.inputs


def _padding(labels: Tensor, input_ids: Tensor) -> int:
    """Tokens at the ends of rows that are one and the same, and not learned: two at least, since one may be a token
    like others. `labels` at their own places."""
    same = (input_ids == input_ids[:, -1:]) & (labels == IGNORED)
    lengths = same.flip(1).long().cumprod(1).sum(1)
    return int(lengths[lengths > 1].sum())


def _stacked(rows: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def with_labels(input_ids: Tensor, ignored: int) -> dict[str, Tensor]:
    """`input_ids` [b, l] int64; and `labels`, of the same shape: the token after each, and `ignored` after the last."""
    labels = torch.full_like(input_ids, ignored)
    labels[:, :-1] = input_ids[:, 1:]
    return {"input_ids": input_ids, "labels": labels}
