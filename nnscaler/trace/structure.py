"""Taking the calls of modules and registered operators: what they are called with, apart from the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnscaler.constants import constant_text
from nnscaler.operators.registry import LeafTracer, leaf_tracer


@dataclass
class Structure:
    """A nested value, such as (args, kwargs), with its tensors taken out.

    spec       how it is nested
    constants  what is in it; a marker where a tensor was
    """

    spec: pytree.TreeSpec
    constants: list[Any]  # `_TENSOR` where a tensor stood

    @staticmethod
    def take(value: Any) -> tuple[Structure, list[Tensor]]:
        """Takes a nested value apart: (how it is nested, its tensors in order)."""
        flat, spec = pytree.tree_flatten(value)
        tensors = [item for item in flat if isinstance(item, Tensor)]
        return Structure(spec, [_TENSOR if isinstance(item, Tensor) else item for item in flat]), tensors

    def holds(self, tensors: Sequence[Tensor], nest: Any) -> bool:
        """Whether a nest that `put` built of these tensors has not been changed since."""
        other, found = Structure.take(nest)
        before, now = [*self.constants, *tensors], [*other.constants, *found]
        return self.spec == other.spec and len(before) == len(now) and all(a is b for a, b in zip(before, now))

    def tensor_names(self, positional: Sequence[str]) -> list[str]:
        """A name for each tensor of an (args, kwargs) nest: that of the argument, with the place inside it."""
        paths, _ = pytree.tree_flatten_with_path(self.put([_TENSOR] * len(self.constants)))
        names = []
        for path, value in paths:
            if value is _TENSOR:
                _, first, *rest = [_step(key) for key in path]
                head = positional[first] if isinstance(first, int) else str(first)
                names.append("_".join([head, *map(str, rest)]))
        return names

    @property
    def is_tensor(self) -> bool:
        return self.spec.is_leaf()

    @property
    def is_flat(self) -> bool:
        """Whether the value is a tensor, or a list or tuple of tensors only."""
        nest = [self.spec] if self.is_tensor else self.spec.children()
        of_kind = self.is_tensor or issubclass(self.spec.type, (list, tuple))
        return of_kind and all(item is _TENSOR for item in self.constants) and all(child.is_leaf() for child in nest)

    @property
    def described(self) -> str:
        """The value in words: its type, and what is in it."""
        kinds = ["Tensor" if item is _TENSOR else type(item).__name__ for item in self.constants]
        return kinds[0] if self.is_tensor else f"a {self.spec.type.__name__} of {', '.join(kinds)}"

    def put(self, tensors: Sequence[Any]) -> Any:
        """Builds the nested value again, with these tensors in it."""
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if item is _TENSOR else item for item in self.constants], self.spec)


def _step(key: Any) -> Any:
    """What leads from a nest to what lies in it: a place, a key, or a name."""
    return next(getattr(key, kind) for kind in ("idx", "key", "name") if hasattr(key, kind))


_TENSOR = object()


class EmptyTensor(NamedTuple):
    """What a tensor is without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def empty(tensor: Tensor) -> EmptyTensor:
    """A tensor without its values. It claims to be on the CPU, as all tensors of a traced model do."""
    return EmptyTensor(tensor.shape, tensor.dtype, torch.device("cpu"))


def call_key(operator: str, arguments: Structure, tensors: Sequence[Tensor]) -> Any:
    """Equal for calls of the same operator with equal constants, and equal shapes and types of tensors.

    Raises UserError for a constant that generated code could not have.
    """
    types = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    constants = ["" if item is _TENSOR else constant_text(item) for item in arguments.constants]
    return operator, str(arguments.spec), tuple(constants), types


@contextmanager
def operators_call(take: LeafTracer | None) -> Iterator[None]:
    """Inside, `take` is called in place of registered operators. None: they run themselves."""
    token = leaf_tracer.set(take)
    try:
        yield
    finally:
        leaf_tracer.reset(token)
