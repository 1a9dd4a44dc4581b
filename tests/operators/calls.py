"""Operator calls as nodes of a graph, run by ATen itself and by the Python text that generated code has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler.graph import Block, Node, Ref, TensorMeta, map_refs
from nnscaler.operators import operator_of, spell, verify
from nnscaler.operators.arguments import by_name, overload, parameters
from nnscaler.operators.verify import meta_of


def fixed(tensor: Tensor) -> Tensor:
    """The tensor, as an argument to which its operator has no gradient."""
    tensor.fixed = True  # type: ignore[attr-defined]
    return tensor


def is_fixed(tensor: Tensor) -> bool:
    return hasattr(tensor, "fixed")


def node_of(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Node, Block, list[Tensor]]:
    """The call as a node of a block, with its results' types, and its tensor arguments in order: leaves that need a
    gradient where they can have one."""
    node, tensors = verify.node_of(op, args, kwargs, lambda one: verify.can_have_gradient(one) and not is_fixed(one))
    results = run(node, tensors)
    node.outputs = tuple(f"out{i}" for i in range(len(results)))
    named = [*zip(node.inputs, tensors), *zip(node.outputs, results)]
    return node, Block("test", "Test", {name: meta_of(tensor) for name, tensor in named}), tensors


def run(node: Node, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The results of the operator itself."""
    function = operator_of(node).function or overload(node.op)
    remaining = iter(tensors)
    args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(remaining))
    return _as_list(function(*args, **kwargs))


def run_text(
    node: Node, tensors: Sequence[Tensor], results: Sequence[TensorMeta], parts: Mapping[str, int] | None = None
) -> list[Tensor]:
    """The results of the Python text that generated code has where a device's results are such."""
    if operator_of(node).function is not None:
        return run(node, tensors)
    text = spell(node, [Ref(f"x{i}") for i in range(len(tensors))], results, parts)
    names = {f"x{i}": tensor for i, tensor in enumerate(tensors)}
    return _as_list(eval(text, {"torch": torch, "F": F, "device": torch.device("cpu"), **names}))


def _as_list(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (list, tuple)) else [results]


def forms(op: str, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The same ATen call as it may be written: as given; with every default written out; all by keyword; with
    dimensions counted from the end."""
    yield args, kwargs
    if not op.startswith("aten."):
        return
    given = by_name(op, args, kwargs)
    by_keyword = {parameter.name for parameter in parameters(op) if parameter.keyword_only}
    optional = {parameter.name for parameter in parameters(op) if parameter.default is None}
    yield (
        tuple(value for name, value in given.items() if name not in by_keyword),
        {name: value for name, value in given.items() if name in by_keyword},
    )
    yield (), {name: value for name, value in given.items() if value is not None or name not in optional}
    if any(name in _DIMS for name in given):
        yield (), {name: _from_the_end(op, value, given) if name in _DIMS else value for name, value in given.items()}


_DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination"}


def _from_the_end(op: str, value: Any, given: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_from_the_end(op, item, given) for item in value]
    tensor = given["self"] if "self" in given else given["tensors"][0]
    rank = tensor.dim() + (op in ("aten.unsqueeze.default", "aten.stack.default"))
    return value - rank if isinstance(value, int) and value >= 0 else value


def in_types(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The same call with its float64 tensors in float32, in bfloat16, and with the first of them alone in float32."""

    def cast(value: Any, to: torch.dtype, left: list[int]) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float64 and left[0]:
            left[0] -= 1
            return fixed(value.to(to)) if is_fixed(value) else value.to(to)
        if isinstance(value, (list, tuple)):
            return type(value)(cast(item, to, left) for item in value)
        return value

    for to, count in ((torch.float32, 99), (torch.bfloat16, 99), (torch.float32, 1)):
        left = [count]
        yield cast(args, to, left), {key: cast(value, to, left) for key, value in kwargs.items()}
