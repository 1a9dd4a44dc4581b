"""Writing annotations for tensors of given shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Names = Sequence[str]


def dim_names(shape: Sequence[int]) -> list[str]:
    """A name for each of so many dimensions: d0, d1, ..."""
    return [f"d{i}" for i in range(len(shape))]


def write(inputs: Iterable[Names], outputs: Iterable[Names]) -> str:
    """The text of an annotation. Each tensor is given as a list of the texts of its dimensions."""
    return f"{_tensors(inputs)} -> {_tensors(outputs)}"


def _tensors(tensors: Iterable[Names]) -> str:
    return ", ".join(" ".join(names) or "()" for names in tensors)
