"""The arguments of an operator's call by name, whether they were given by place, by keyword, or not at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nnscaler.errors import UserError

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator. `default`: REQUIRED where every call must give it"""

    name: str
    default: Any = REQUIRED
    keyword_only: bool = False


def overload(op: str) -> torch._ops.OpOverload:
    """The ATen overload of a name such as `aten.linear.default`. Raises UserError where torch has none."""
    found: Any = torch.ops
    try:
        for part in op.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise UserError(f"torch {torch.__version__} has no operator {op}") from None
    return found


@cache
def parameters(op: str) -> tuple[Parameter, ...]:
    """The parameters of an ATen overload, in the order of its schema."""
    return tuple(
        Parameter(
            argument.name,
            argument.default_value if argument.has_default_value() else REQUIRED,
            argument.kwarg_only,
        )
        for argument in overload(op)._schema.arguments
    )


def by_name(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of an ATen call, by name and in the order of the schema. Those that are not given have their
    defaults.

    Raises UserError where the call does not fit the schema.
    """
    known = parameters(op)
    given = {parameter.name: value for parameter, value in zip(known, args)} | dict(kwargs)
    unknown = [name for name in kwargs if all(name != parameter.name for parameter in known)]
    missing = [parameter.name for parameter in known if parameter.default is REQUIRED and parameter.name not in given]
    if len(args) > len(known) or unknown or missing:
        raise UserError(
            f"operator {op} is {overload(op)._schema}; called with {len(args)} arguments and {list(kwargs)}"
        )
    return {parameter.name: given.get(parameter.name, parameter.default) for parameter in known}


def written_by_user(function: Callable[..., Any]) -> Any:
    """What the user wrote of a registered function: of `apply` its class, of a compiled function what was compiled."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner
    return inspect.unwrap(function)


@cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a registered function; of an autograd function's `apply`, those that `forward` takes of it.

    Raises UserError where Python cannot tell them.
    """
    written = written_by_user(function)
    if not (isinstance(written, type) and issubclass(written, torch.autograd.Function)):
        try:
            return inspect.signature(written)
        except ValueError:
            raise UserError(f"the parameters of {written} are not known; wrap its call in a Python function") from None
    signature = inspect.signature(written.forward)
    takes_context = written.setup_context is torch.autograd.Function.setup_context
    return signature.replace(parameters=list(signature.parameters.values())[takes_context:])
