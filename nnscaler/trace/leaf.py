"""Calls that tracing must not look into: registered operators, and repeated modules that are traced on their own.

Such a call is recorded as one node `nnscaler::leaf(token, tensors)`. The token names a `Leaf` of the running session,
which keeps everything about the call that is not a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnscaler.operators.registry import Operator, leaf_tracer


@dataclass
class Structure:
    """A nest of values with its tensors taken out, and back."""

    spec: pytree.TreeSpec
    constants: list[Any]  # `_TENSOR` where a tensor stood

    @staticmethod
    def take(value: Any) -> tuple[Structure, list[Tensor]]:
        flat, spec = pytree.tree_flatten(value)
        tensors = [item for item in flat if isinstance(item, Tensor)]
        return Structure(spec, [_TENSOR if isinstance(item, Tensor) else item for item in flat]), tensors

    def tensor_names(self, positional: Sequence[str]) -> list[str]:
        """A name for each tensor of an (args, kwargs) nest: its parameter's, with the place inside it."""
        paths, _ = pytree.tree_flatten_with_path(self.put([_TENSOR] * len(self.constants)))
        names = []
        for path, value in paths:
            if value is _TENSOR:
                _, first, *rest = [getattr(key, "idx", getattr(key, "key", None)) for key in path]
                head = positional[first] if isinstance(first, int) else str(first)
                names.append("_".join([head, *map(str, rest)]))
        return names

    @property
    def is_tensor(self) -> bool:
        return self.spec.is_leaf()

    @property
    def is_flat(self) -> bool:
        """Whether the value is a tensor, or a list or tuple of nothing but tensors."""
        nest = [self.spec] if self.is_tensor else self.spec.children()
        return all(item is _TENSOR for item in self.constants) and all(child.is_leaf() for child in nest)

    def put(self, tensors: Sequence[Any]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if item is _TENSOR else item for item in self.constants], self.spec)


_TENSOR = object()


@dataclass
class Leaf:
    """One distinct call: what to run, and how its arguments and results are built from tensors."""

    function: Callable[..., Any]
    arguments: Structure
    operator: Operator | None = None
    result: Structure | None = None
    example: list[Tensor] = field(default_factory=list)  # the first call's inputs, on the meta device
    empty_results: list[tuple[torch.Size, torch.dtype, torch.device]] | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = self.arguments.put(tensors)
        self.result, results = Structure.take(self.function(*args, **kwargs))
        return results


@dataclass
class Session:
    """The leaves met while one model is traced."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    tokens: dict[Any, str] = field(default_factory=dict)

    def call(self, key: Any, make: Callable[[Structure], Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records a call. Calls with equal `key`, constants and tensor types are one leaf; None is equal to nothing."""
        arguments, tensors = Structure.take((args, kwargs))
        types = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        full_key = None if key is None else (key, str(arguments.spec), repr(arguments.constants), types)
        token = None if full_key is None else self.tokens.get(full_key)
        if token is None:
            token = str(len(self.leaves))
            leaf = make(arguments)
            leaf.example = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
            self.leaves[token] = leaf
            if full_key is not None:
                self.tokens[full_key] = token
        results = torch.ops.nnscaler.leaf(token, tensors)
        structure = self.leaves[token].result
        assert structure is not None
        return structure.put(results)

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert operator.function is not None
        function = operator.function
        return self.call(operator.name, lambda arguments: Leaf(function, arguments, operator), args, kwargs)


_session: Session | None = None


@contextmanager
def recording() -> Iterator[Session]:
    """A session to which every registered operator called inside reports."""
    global _session
    assert _session is None, "tracing is not reentrant"
    _session = Session()
    token = leaf_tracer.set(_session.call_operator)
    try:
        yield _session
    finally:
        leaf_tracer.reset(token)
        _session = None


@torch.library.custom_op("nnscaler::leaf", mutates_args=())
def leaf_op(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    assert _session is not None
    with _not_recording():
        return [result.clone() for result in _session.leaves[token].run(tensors)]


@leaf_op.register_fake
def _(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    assert _session is not None
    leaf = _session.leaves[token]
    if leaf.empty_results is None:
        with _not_recording():
            results = leaf.run(tensors)
        leaf.empty_results = [(result.shape, result.dtype, result.device) for result in results]
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in leaf.empty_results]


@contextmanager
def _not_recording() -> Iterator[None]:
    """A leaf's own body runs plainly: registered operators inside it are its own business."""
    token = leaf_tracer.set(None)
    try:
        yield
    finally:
        leaf_tracer.reset(token)
