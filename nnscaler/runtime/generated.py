"""The names that generated code imports."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnscaler.constants import imported
from nnscaler.operators import registered
from nnscaler.recompute.wrappers import recompute
from nnscaler.runtime.pieces import in_pieces
from nnscaler.runtime.regions import region

if TYPE_CHECKING:
    from nnscaler.runtime.module import Weights

__all__ = ["imported", "in_pieces", "operators", "recompute", "region", "scope"]


def operators(*names: str) -> SimpleNamespace:
    """Registered functions as attributes.

    Each has the operator's name; a function for a split with communication is called `<name>_along_<dimension>`, and
    one that communicates with other copies of the model `<name>_among_copies`.
    """
    found = SimpleNamespace()
    for name in names:
        operator = registered(name)
        setattr(found, name, operator.function)
        for dimension, function in operator.along.items():
            way = f"{name}_along_{dimension.replace(' ', '_')}"
            setattr(found, way, _imported(function))
        if operator.among_copies is not None:
            setattr(found, f"{name}_among_copies", _imported(operator.among_copies))
    return found


def _imported(function: Callable[..., Any] | str) -> Any:
    if not isinstance(function, str):
        return function
    module, _, name = function.rpartition(".")
    return imported(module, name)


class scope:  # noqa: N801  reads as a function in generated code
    """The weights below a module path, by the rest of their names."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def scale_of(self, name: str) -> Tensor:
        return self._weights.scale_of(self._prefix + name)
