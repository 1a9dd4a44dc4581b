"""Calls that tracing must not look into: registered operators, and repeated modules that are traced on their own.

Such a call is recorded as one node `nnscaler::leaf(token, tensors)`. The token names a `Leaf` of the running session,
which keeps everything about the call that is not a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from nnscaler.operators.registry import Operator, leaf_tracer

if TYPE_CHECKING:
    from nnscaler.trace.execute import Execution


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


class EmptyTensor(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class Leaf:
    """One distinct call: what to run, and how its arguments and results are built from tensors."""

    function: Callable[..., Any]
    arguments: Structure
    operator: Operator | None = None
    result: Structure | None = None
    example: list[Tensor] = field(default_factory=list)  # the first call's inputs, on the meta device
    empty_results: list[EmptyTensor] | None = None
    reads: Callable[[], AbstractContextManager[Any]] = nullcontext  # inside, Python can read values of tensors

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = self.arguments.put(tensors)
        with self.reads():
            self.result, results = Structure.take(self.function(*args, **kwargs))
        return results


class Callee(Protocol):
    """Takes the calls of repeated modules and registered operators."""

    def call_module(self, key: str | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def call_key(key: Any, arguments: Structure, tensors: Sequence[Tensor]) -> Any:
    """Equal for calls with equal `key`, constants and tensor types."""
    types = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    return key, str(arguments.spec), repr(arguments.constants), types


@dataclass
class Session:
    """The leaves met while one model is traced, and what its execution told where there was one."""

    execution: Execution | None = None
    leaves: dict[str, Leaf] = field(default_factory=dict)
    tokens: dict[Any, str] = field(default_factory=dict)
    modules: int = 0

    def call_module(self, key: str | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Records a call of a repeated module. Calls with an equal key are one leaf; None is equal to nothing."""
        arguments, tensors = Structure.take((args, kwargs))
        leaf = Leaf(function, arguments)
        if self.execution is not None:
            leaf.reads = partial(self.execution.reads.replay, str(self.modules))
            self.modules += 1
        return self._call(None if key is None else call_key(key, arguments, tensors), leaf, tensors)

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments, tensors = Structure.take((args, kwargs))
        assert operator.function is not None
        leaf = Leaf(operator.function, arguments, operator)
        key = call_key(operator.name, arguments, tensors)
        if self.execution is not None and key in self.execution.results:
            leaf.result, leaf.empty_results = self.execution.results[key]
        return self._call(key, leaf, tensors)

    def _call(self, key: Any, leaf: Leaf, tensors: list[Tensor]) -> Any:
        token = None if key is None else self.tokens.get(key)
        if token is None:
            token = str(len(self.leaves))
            leaf.example = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
            self.leaves[token] = leaf
            if key is not None:
                self.tokens[key] = token
        results = torch.ops.nnscaler.leaf(token, tensors)
        structure = self.leaves[token].result
        assert structure is not None
        return structure.put(results)


_session: Session | None = None


@contextmanager
def recording(execution: Execution | None = None) -> Iterator[Session]:
    """A session to which every registered operator called inside reports."""
    global _session
    assert _session is None, "tracing is not reentrant"
    _session = Session(execution)
    try:
        with operators_call(_session):
            yield _session
    finally:
        _session = None


@contextmanager
def operators_call(callee: Callee | None) -> Iterator[None]:
    """Inside, registered operators call `callee`; None: themselves."""
    token = leaf_tracer.set(None if callee is None else callee.call_operator)
    try:
        yield
    finally:
        leaf_tracer.reset(token)


@torch.library.custom_op("nnscaler::leaf", mutates_args=())
def leaf_op(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    assert _session is not None
    with operators_call(None):  # inside of one, registered operators are its own business
        return [result.clone() for result in _session.leaves[token].run(tensors)]


@leaf_op.register_fake
def _(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    assert _session is not None
    leaf = _session.leaves[token]
    if leaf.empty_results is None:
        with operators_call(None):
            results = leaf.run(tensors) if leaf.operator is None else _run_on_meta(leaf, tensors)
        leaf.empty_results = [EmptyTensor(result.shape, result.dtype, result.device) for result in results]
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in leaf.empty_results]


def _run_on_meta(leaf: Leaf, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A registered operator's results. All its tensors are arguments, so that plain meta tensors do; they are several
    times as fast as fake ones, which counts where it loops over a long sequence."""
    try:
        with _disable_current_modes():
            return leaf.run([torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors])
    except (NotImplementedError, RuntimeError):  # fake tensors know more operators, and say what is wrong
        return leaf.run(tensors)
