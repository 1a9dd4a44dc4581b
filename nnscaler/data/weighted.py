"""The datasets that `--dataset_path` names, with their weights. They are checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nnscaler.data.files import is_url
from nnscaler.errors import UserError

BLOCK = 1 << 16  # samples in which each dataset comes as often as its weight says, which counts to 1 / BLOCK of all


@dataclass(frozen=True)
class WeightedDataset:
    """One of the datasets of --dataset_path.

    path    a path or a URL
    weight  None: none is given
    """

    path: str
    weight: float | None = None

    @staticmethod
    def read_all(texts: Sequence[str], flag: str) -> list[WeightedDataset]:
        """From texts PATH or PATH=WEIGHT. Raises UserError where one of several has no weight, or a weight that is
        not allowed."""
        sources = [WeightedDataset._read(text, flag) for text in texts]
        for place, source in enumerate(sources):
            if len(sources) > 1 and source.weight is None:
                raise UserError(
                    f"{flag} is '{source.path}', which has no weight; where there are several datasets, each "
                    "needs one: PATH=WEIGHT"
                )
            if source.path in [other.path for other in sources[:place]]:
                raise UserError(f"{flag} has '{source.path}' twice")
        shares_of([source.weight or 1.0 for source in sources], [source.path for source in sources], flag)
        return sources

    @staticmethod
    def _read(text: str, flag: str) -> WeightedDataset:
        if os.path.exists(os.path.expanduser(text)) or "=" not in text:
            return WeightedDataset(spelled(text))
        path, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            return WeightedDataset(spelled(text))
        if not 0 < weight <= 1e9:
            raise UserError(f"{flag} gives '{path}' the weight {number}; it must be more than 0 and at most 1e9")
        return WeightedDataset(spelled(path), weight)


def spelled(path: str) -> str:
    """A path or URL in one of the ways to spell it, by which logs name it and by which it is known again."""
    return path.rstrip("/") if is_url(path) else os.path.normpath(os.path.expanduser(path))


def shares_of(weights: Sequence[float], names: Sequence[str], flag: str) -> list[int]:
    """How many of BLOCK samples come from each dataset, by weight. The numbers are rounded so that their sum is
    BLOCK."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    largest = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in largest[: BLOCK - sum(shares)]:
        shares[index] += 1
    for name, share in zip(names, shares):
        if share == 0:
            raise UserError(f"{flag} gives '{name}' less than 1/{BLOCK:,} of all weights, which is too small to count")
    return shares
