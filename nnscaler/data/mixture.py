"""Several datasets as one: each sample comes from one of them, drawn by weight.

Samples come in blocks. In each block, every dataset has as many samples as its weight says, in an order that depends
only on the seed and the number of the block. So the row of the k-th sample is found without the samples before it, and
a run continues exactly where it was, on any number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nnscaler.counting import counted
from nnscaler.data.documents import DocumentLengths
from nnscaler.data.files import is_url
from nnscaler.data.packed import PackedDataset, Row
from nnscaler.data.streamed import StreamedDataset, StreamedInOrder, Streaming
from nnscaler.data.training import InOrder, Samples, Shuffled
from nnscaler.data.weighted import WeightedDataset, shares_of
from nnscaler.errors import UserError

_DRAWS = (1 << 32) - 1  # tells the seeds of draws from those of rows' orders

Part: TypeAlias = PackedDataset | StreamedDataset


@dataclass(frozen=True)
class Mixture:
    """Several datasets with rows of one length.

    For each dataset, it is known how many of a block's samples come from it.
    """

    parts: tuple[Part, ...]
    shares: tuple[int, ...]

    @staticmethod
    def of(parts: Sequence[Part], weights: Sequence[float], flag: str) -> Mixture:
        """Raises UserError where the rows are not of one length."""
        for part in parts[1:]:
            if part.sequence_length != parts[0].sequence_length:
                raise UserError(
                    f"{flag} is '{part.path}', whose sequences have {counted(part.sequence_length, 'token')}, but "
                    f"those of '{parts[0].path}' have {parts[0].sequence_length}"
                )
        return Mixture(tuple(parts), tuple(shares_of(weights, [str(part.path) for part in parts], flag)))

    @property
    def sequence_length(self) -> int:
        return self.parts[0].sequence_length

    @property
    def path(self) -> str:
        return ", ".join(str(part.path) for part in self.parts)

    def __len__(self) -> int:
        """Rows of all datasets together: an epoch has as many samples."""
        return sum(map(len, self.parts))

    @property
    def document_lengths(self) -> DocumentLengths:
        """How long documents are: those of all datasets; for a token's own document, the average over the samples that
        are drawn.

        Raises UserError where a dataset does not say where documents begin.
        """
        found = [part.document_lengths for part in self.parts]
        documents = sum(each.documents for each in found)
        of_token = np.average([each.of_token for each in found], weights=self.shares)
        return DocumentLengths(
            documents=documents,
            mean=sum(each.documents * each.mean for each in found) / max(1, documents),
            longest=max(each.longest for each in found),
            of_token=float(of_token),
            cut=sum(each.cut for each in found),
            padded=sum(each.padded for each in found),
            positions=max(each.positions for each in found),
            estimated=any(each.estimated for each in found),
        )

    def seen(self, seed: int, consumed: int) -> list[int]:
        """How many of the first samples come from each dataset."""
        block, place = divmod(consumed, sum(self.shares))
        counts = np.bincount(_draw(seed, self.shares, block)[0][:place], minlength=len(self.shares))
        return [block * share + int(count) for share, count in zip(self.shares, counts)]

    def described(self) -> dict[str, list[int]]:
        """Name of each dataset -> how many rows it has, and how many of a block's samples come from it."""
        return {name: [len(part), share] for name, part, share in zip(self.names, self.parts, self.shares)}

    @property
    def names(self) -> list[str]:
        """The names of the datasets in logs: that of the folder; where two are equal, the path."""
        short = [Path(part.path).name for part in self.parts]
        return [name if short.count(name) == 1 else str(part.path) for name, part in zip(short, self.parts)]


Dataset: TypeAlias = Part | Mixture


class Mixed:
    """The samples of a mixture.

    samples  of each dataset, one after the other
    shares   how many of a block's samples come from each dataset
    """

    def __init__(self, samples: Sequence[Samples], shares: Sequence[int], seed: int) -> None:
        self._samples, self._shares, self._seed = samples, tuple(shares), seed

    def sample(self, number: int) -> Row | None:
        block, place = divmod(number, sum(self._shares))
        draws, numbers = _draw(self._seed, self._shares, block)
        part = int(draws[place])
        return self._samples[part].sample(block * self._shares[part] + int(numbers[place]))


def open_sources(sources: Sequence[WeightedDataset]) -> Dataset | None:
    """The datasets that `--dataset_path` names, as one. None where it names none.

    Raises UserError as `PackedDataset.open` and `StreamedDataset.open` do, and where the rows are not of one length.
    """
    parts = [open_dataset(source.path) for source in sources]
    if len(parts) > 1:
        return Mixture.of(parts, [source.weight or 1.0 for source in sources], "dataset_path")
    return parts[0] if parts else None


def open_dataset(path: str, flag: str = "dataset_path") -> Part:
    """The dataset at a path or URL. Raises UserError as `PackedDataset.open` and `StreamedDataset.open` do."""
    if is_url(path) or any(Path(path).glob("**/*.parquet")) or Path(path).suffix == ".parquet":
        return StreamedDataset.open(path, flag)
    return PackedDataset.open(Path(path), flag)


def samples_of(dataset: Dataset, seed: int, vocabulary: int | None = None) -> Samples:
    """The rows of a dataset, without end, in the order of a seed.

    vocabulary  how many ids the model knows, by which streamed rows are judged as they are read
    """
    parts = [
        Shuffled(part, seed, place) if isinstance(part, PackedDataset) else Streaming(part, seed, place, vocabulary)
        for place, part in enumerate(dataset.parts)
    ]
    return Mixed(parts, dataset.shares, seed) if isinstance(dataset, Mixture) else parts[0]


def in_order(dataset: Part, vocabulary: int | None = None) -> Samples:
    """Each row of a dataset once, in the order in which they are stored. `vocabulary`: as in `samples_of`."""
    return StreamedInOrder(dataset, vocabulary) if isinstance(dataset, StreamedDataset) else InOrder(dataset)


@lru_cache(maxsize=2)
def _draw(seed: int, shares: tuple[int, ...], block: int) -> tuple[Any, Any]:
    """For each sample of a block: the dataset that it comes from, and how many samples of the block come from that
    before."""
    draws = np.random.default_rng((seed, block, _DRAWS)).permutation(np.repeat(np.arange(len(shares)), shares))
    numbers = np.empty(len(draws), dtype=np.int64)
    for part, share in enumerate(shares):
        numbers[draws == part] = np.arange(share)
    return draws, numbers
