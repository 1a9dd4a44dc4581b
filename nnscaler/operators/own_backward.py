"""Functions with a backward of their own (`torch.autograd.Function`) as operators, without being registered.

What such a function does cannot be read from its forward alone. So it becomes one operator, as it is. Where forward and
backward consist of elementwise operators, every dimension may be split; else each device computes it whole. One that
was registered (`register_op`) is split as its annotation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nnscaler.errors import UserError
from nnscaler.operators.annotating import write
from nnscaler.operators.arguments import written_by_user
from nnscaler.operators.register import register_op
from nnscaler.operators.registry import all_registered, leaf_tracer, save_both

# Operators that give each element its place, like elementwise ones, but are not marked so in PyTorch.
_PLACE_BY_PLACE = {"detach", "clone", "alias", "_to_copy", "zeros_like", "ones_like", "full_like", "empty_like"}


@contextmanager
def functions_are_operators() -> Iterator[None]:
    """Inside, while operators are traced, calls of `torch.autograd.Function` are calls of operators."""
    original = vars(Function)["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        tracer = leaf_tracer.get()
        if tracer is None or cls.__module__.partition(".")[0] == "torch":  # torch's own are machinery
            return original.__func__(cls, *args, **kwargs)
        for operator in all_registered():
            if written_by_user(operator.function) is cls:  # type: ignore[arg-type]
                return tracer(operator, args, kwargs)
        return own_backward(cls, annotation_of(cls, args), *args)

    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]


@register_op(lambda function, annotation, *args: annotation, saves=save_both)
def own_backward(function: type[Function], annotation: str, *args: Any) -> Any:
    """`function.apply(*args)`. The annotation is that of `annotation_of`, for tensors of these shapes."""
    return function.apply(*args)


def annotation_of(function: type[Function], args: Sequence[Any]) -> str:
    """The annotation of a call.

    Raises UserError for a function that draws random numbers, writes into its arguments, or reads values.
    """
    token = leaf_tracer.set(None)
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            given, results, calls = _run(function, args, 1)
            shapes = [tuple(tensor.shape) for tensor in (*given, *results)]
            full = shapes[-1]
            elementwise = all(_is_elementwise(op) for op, _ in calls) and all(_fits(shape, full) for shape in shapes)
            if elementwise and _same_when_larger(function, args, calls):
                texts = [[f"d{dim}" if size > 1 else "1" for dim, size in _dims(shape, full)] for shape in shapes]
            else:
                texts = [[f"{size}" for size in shape] for shape in shapes]
    finally:
        leaf_tracer.reset(token)
    return write(texts[: len(given)], texts[len(given) :])


Call = tuple[torch._ops.OpOverload, str]  # an operator, and its arguments that are no tensors


class _Calls(TorchDispatchMode):
    """Collects the calls of operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        constants = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
        self.made.append((func, repr(constants)))
        return func(*args, **(kwargs or {}))


def _run(function: type[Function], args: Sequence[Any], times: int) -> tuple[list[Tensor], list[Tensor], list[Call]]:
    """Runs forward and backward without values, with tensors whose dimensions are so many times as large: (the tensors
    given, the results, the calls of operators)."""

    def on_meta(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = [size if size == 1 else times * size for size in leaf.shape]
        # No leaf of autograd: into those, nothing can be written.
        return torch.empty(shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.is_floating_point()).clone()

    with torch.enable_grad():
        args = pytree.tree_map(on_meta, args)
    given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    floats = [tensor for tensor in given if tensor.requires_grad]
    versions = [tensor._version for tensor in given]
    with torch.enable_grad(), _Calls() as calls:
        try:
            results = [one for one in pytree.tree_leaves(function.apply(*args)) if isinstance(one, Tensor)]
            differentiable = [result for result in results if result.requires_grad]
            if differentiable:
                ones = [torch.ones_like(result) for result in differentiable]
                torch.autograd.grad(differentiable, floats, ones, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(f"{function.__name__} cannot be traced: {str(error).splitlines()[0]}") from error
    if versions != [tensor._version for tensor in given]:
        raise UserError(f"{function.__name__} writes into its arguments, which is not supported")
    if any(torch.Tag.nondeterministic_seeded in op.tags for op, _ in calls.made):
        raise UserError(f"{function.__name__} draws random numbers, which is not supported")
    return given, results, calls.made


def _same_when_larger(function: type[Function], args: Sequence[Any], calls: list[Call]) -> bool:
    """Whether larger tensors lead to the same calls, so that it does not compute with sizes."""
    try:
        return _run(function, args, 2)[2] == calls
    except UserError:
        return False


def _is_elementwise(op: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in op.tags or op.overloadpacket.__name__ in _PLACE_BY_PLACE


def _dims(shape: Sequence[int], full: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(dimension of the result, size) of each dimension."""
    return zip(range(len(full) - len(shape), len(full)), shape)


def _fits(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor is as large as the result in each dimension, or the same for all of it."""
    return len(shape) <= len(full) and all(size in (1, full[dim]) for dim, size in _dims(shape, full))
