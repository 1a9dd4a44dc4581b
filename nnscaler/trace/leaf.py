"""Leaves: calls that tracing must not look into. They are registered operators, and repeated modules, which are traced
on their own.

Such a call is recorded as one node `nnscaler::leaf(token, tensors)`. The token names a `Leaf` of the current session,
which keeps everything about the call that is not a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.operators.registry import Operator
from nnscaler.trace.observe import Observation
from nnscaler.trace.structure import EmptyTensor, Structure, call_key, empty, operators_call


@dataclass
class Leaf:
    """Calls that are the same: of one registered operator, or of modules that trace to the same graph.

    arguments  how the first call's arguments are built from tensors
    given      shapes and types of these tensors
    result     how the results are built from tensors
    results    shapes and types of these tensors
    operator   the operator that is called; None: `module` is called
    call       the number of the first call, among calls of modules
    """

    arguments: Structure
    given: list[EmptyTensor]
    result: Structure
    results: list[EmptyTensor]
    operator: Operator | None = None
    module: nn.Module | None = None
    call: int = 0


@dataclass
class Session:
    """The leaves of one model while it is traced, after it was observed.

    reuse  True: calls of modules with equal keys are one leaf; False: each call is a leaf of its own
    """

    observation: Observation
    reuse: bool
    leaves: dict[str, Leaf] = field(default_factory=dict)
    tokens: dict[Any, str] = field(default_factory=dict)
    calls: int = 0

    def call_module(self, path: str, module: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Records a call of a module that may repeat, and gives its results. Raises UserError where the call has
        changed."""
        _, tensors = Structure.take((args, kwargs))
        index, self.calls = self.calls, self.calls + 1
        known = self.observation.calls[index : index + 1]
        if not known or known[0].path != path or known[0].given != [empty(tensor) for tensor in tensors]:
            raise UserError(
                f"module '{path}' is called otherwise than when the model ran before; a compiled model computes the "
                "same in each step"
            )
        (call,) = known
        leaf = Leaf(call.arguments, call.given, call.nest, call.results, module=module, call=index)
        key = call.key if self.reuse else index
        return call.nest.put(self._call(("module", key), leaf, tensors))

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments, tensors = Structure.take((args, kwargs))
        key = call_key(operator.name, arguments, tensors)
        if key not in self.observation.results:
            raise UserError(
                f"registered operator '{operator.name}' is called otherwise than when the model ran before; a compiled "
                "model computes the same in each step"
            )
        result, results = self.observation.results[key]
        leaf = Leaf(arguments, [empty(tensor) for tensor in tensors], result, results, operator)
        return result.put(self._call(key, leaf, tensors))

    def _call(self, key: Any, leaf: Leaf, tensors: list[Tensor]) -> Any:
        token = self.tokens.setdefault(key, str(len(self.leaves)))
        self.leaves.setdefault(token, leaf)
        return torch.ops.nnscaler.leaf(token, tensors)


_session: Session | None = None


@contextmanager
def recording(observation: Observation, reuse: bool) -> Iterator[Session]:
    """Inside, every call of a registered operator becomes a leaf of the session that this yields."""
    global _session
    assert _session is None, "tracing is not reentrant"
    _session = Session(observation, reuse)
    try:
        with operators_call(_session.call_operator):
            yield _session
    finally:
        _session = None


@torch.library.custom_op("nnscaler::leaf", mutates_args=())
def leaf_op(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    raise AssertionError("a leaf is traced, not run")


@leaf_op.register_fake
def _(token: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    assert _session is not None
    results = _session.leaves[token].results
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in results]
