"""Writing annotations for given shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Names = Sequence[str]


def dim_names(shape: Sequence[int]) -> list[str]:
    """A name for each dimension: d0, d1, ..."""
    return [f"d{i}" for i in range(len(shape))]


def write(inputs: Iterable[Names], outputs: Iterable[Names]) -> str:
    """The annotation of tensors given as lists of dimension texts."""
    return f"{_tensors(inputs)} -> {_tensors(outputs)}"


def _tensors(tensors: Iterable[Names]) -> str:
    return ", ".join(" ".join(names) or "()" for names in tensors)
