"""A user's module, whatever it takes and returns, as one that the compiler knows: named tensors in, numbers out.

`Signature` flattens arguments: forward(batch={"x": a, "y": b}, scale=2.0) is called with the tensors batch_x and
batch_y, and scale is a constant of what is compiled. `Numbers` flattens results: the loss, and the other numbers that
forward returns. Its other results are not computed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nnscaler.errors import UserError

MicroBatch: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor
LossOf: TypeAlias = Callable[[Any], Tensor]


class Signature:
    """How a module is called, by an example.

    tensors    name -> tensor, of the example
    constants  name -> value, of everything in the example that is not a tensor
    """

    def __init__(self, module: nn.Module, example: MicroBatch) -> None:
        self._module = type(module).__name__
        self._parameters = inspect.signature(module.forward)
        kinds = {name: parameter.kind for name, parameter in self._parameters.parameters.items()}
        self._rest = [name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL]
        self._leaves, self._nest = self._flat(example, "the example")
        self.tensors = {name: value for name, value in self._leaves.items() if isinstance(value, Tensor)}
        self.constants = {name: value for name, value in self._leaves.items() if not isinstance(value, Tensor)}
        if not self.tensors:
            raise UserError(f"the example of {self._module}'s inputs has no tensor")
        self._kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def named(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The tensors of a micro-batch, by name. Raises UserError where it is not like the example."""
        found, _ = self._flat(micro_batch, "a micro-batch")
        unknown = [name for name in found if name not in self._leaves]
        if unknown:
            raise UserError(f"a micro-batch has '{unknown[0]}'; the example has {', '.join(self._leaves)}")
        for name, (shape, dtype) in self._kinds.items():
            value = found.get(name)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
                given = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else _shown(name, found)
                raise UserError(f"input '{name}' of a micro-batch is {given}; the example was {list(shape)} {dtype}")
        for name, value in self.constants.items():
            if name not in found or not _same(found[name], value):
                raise UserError(
                    f"input '{name}' of a micro-batch is {_shown(name, found)}; the example was {value!r}, which is a "
                    "constant of what is compiled"
                )
        return {name: found[name] for name in self._kinds}

    def put(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward's arguments by place and by keyword, with these tensors in them."""
        values = {**self.constants, **tensors}
        args, kwargs = pytree.tree_unflatten([values[name] for name in self._leaves], self._nest)
        return args, kwargs

    def _flat(self, micro_batch: MicroBatch, what: str) -> tuple[dict[str, Any], pytree.TreeSpec]:
        """Everything in forward's arguments by name, that of the parameter and the way inside it; and how it is
        nested."""
        if isinstance(micro_batch, Tensor):
            micro_batch = (micro_batch,)
        args, kwargs = ((), dict(micro_batch)) if isinstance(micro_batch, Mapping) else (tuple(micro_batch), {})
        try:
            bound = self._parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"forward of {self._module} takes {self._parameters}; of {what}: {error}") from None
        bound.apply_defaults()
        paths, nest = pytree.tree_flatten_with_path((bound.args, bound.kwargs))
        by_place = [
            text
            for name, value in bound.arguments.items()
            for text in ([f"{name}_{i}" for i in range(len(value))] if name in self._rest else [name])
        ]
        found: dict[str, Any] = {}
        for (side, first, *rest), value in paths:
            head = by_place[_step(first)] if _step(side) == 0 else _step(first)
            found[re.sub(r"\W", "_", "_".join(map(str, [head, *map(_step, rest)])))] = value
        if len(found) < len(paths):
            raise UserError(f"inputs of {self._module} have names that differ only in '_' and other signs; rename one")
        return found, nest


def _step(key: Any) -> Any:
    return next(getattr(key, kind) for kind in ("idx", "key", "name") if hasattr(key, kind))


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (TypeError, ValueError, RuntimeError):  # of arrays, for example
        return False


def _shown(name: str, found: Mapping[str, Any]) -> str:
    return repr(found[name]) if name in found else "missing"


class Numbers:
    """Makes modules give numbers: fp64 [1 + n], the loss first; or the loss alone, where they return no other.

    signature  how they are called
    loss_of    what they return -> the loss; None: see `nnscaler.parallelize`
    names      of the other numbers, known once such a module has run
    """

    def __init__(self, signature: Signature, loss_of: LossOf | None) -> None:
        self._signature, self._loss_of = signature, loss_of
        self.names: list[str] = []

    def of(self, module: nn.Module) -> nn.Module:
        """The module, which from now on takes `signature.tensors` by name."""
        original, kind, numbers = type(module), cast(Any, type(type(module))), self

        def forward(self: nn.Module, **tensors: Tensor) -> Tensor:
            args, kwargs = numbers._signature.put(tensors)
            return numbers._take(original.forward(self, *args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in self._signature.tensors]
        forward.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
        facts = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
        module.__class__ = kind(original.__name__, (original,), facts)  # copies of the module have it too
        return module

    def _take(self, output: Any) -> Tensor:
        loss = _loss(output) if self._loss_of is None else self._loss_of(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"what loss= makes of what forward gives is {given}; it must be one number, the loss")
        others = {name or "output": one for name, one in _tensors(output) if one.numel() == 1 and one is not loss}
        self.names = list(others)
        if not others:
            return loss.reshape(())
        detached = [one.detach() for one in others.values()]
        return torch.stack([one.reshape(()).to(torch.float64) for one in (loss, *detached)])


def _loss(output: Any) -> Tensor:
    """What is trained where the user does not say: see `nnscaler.parallelize`."""
    found = dict(_tensors(output))
    named = found.get("loss", getattr(output, "loss", None))
    if isinstance(named, Tensor) and named.numel() == 1:
        return named
    if found and all(one.numel() == 1 for one in found.values()):
        first, *others = found.values()
        return sum((one.reshape(()) for one in others), first)
    given = ", ".join(f"{name} {list(one.shape)}".strip() for name, one in found.items()) or type(output).__name__
    raise UserError(
        f"forward gives {given}; what is trained must give one number, the loss: name it by loss=, a function of what "
        "forward gives"
    )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a module returns, with the way to each."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value)
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, item in items:
        yield from _tensors(item, f"{name}.{key}" if name else str(key))
