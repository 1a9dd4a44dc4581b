"""Recording what a model computes while it runs: each call of torch, with its arguments.

Modules with equal records trace to the same graph. It does not matter what could have made them differ: an attribute,
the code of `forward` or of what it calls, a hook, a closure, an environment variable. Only what the model did is
compared.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from nnscaler.constants import constant_text
from nnscaler.errors import UserError
from nnscaler.trace.digest import digest
from nnscaler.trace.loops import Loops
from nnscaler.trace.own_code import is_own_code, line_of

_IN_BACKWARD = {"register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"}


class Outline(TorchFunctionMode):
    """A digest of the calls of torch, with only the types and shapes of tensors.

    It is the same for a plain run and for one under `torch.export`, which uses tensors of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outline = hashlib.sha1()
        self._functions: dict[Any, str] = {}

    @property
    def digest(self) -> str:
        return self._outline.hexdigest()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self._name_of(func)
        self.check(name, args)
        outline = _outline((args, kwargs))
        result = func(*args, **kwargs)
        # What torch calls itself, to take a constant in, is not the same under export.
        if self.matters(name, result) and not name.startswith("aten.") and name != "torch..empty_strided":
            self.outline(f"{name} {self.line()} {torch.is_grad_enabled()} {outline}")
        return result

    def outline(self, text: str) -> None:
        self._outline.update(f"{text}\n".encode())

    def line(self) -> str:
        """`file.py:line` of the line of the model's own code that is running."""
        frame: FrameType | None = sys._getframe(1)
        inside = False
        while frame is not None:
            file = frame.f_code.co_filename
            kind = _files.get(file)
            if kind is None:
                kind = _files[file] = "tracing" if file.startswith(_TRACING) else "own" * is_own_code(file)
            if kind == "own":
                return line_of(file, frame.f_lineno)
            if kind == "tracing" and inside:
                break
            inside = inside or kind != "tracing"
            frame = frame.f_back
        return "an unknown line"

    def _name_of(self, func: Any) -> str:
        name = self._functions.get(func)
        if name is None:
            name = self._functions[func] = _full_name(func)
        return name

    def matters(self, name: str, result: Any) -> bool:
        """Whether a call is recorded. One that gives a number or a shape is not: it shows in the calls that follow
        from it."""
        if name == "nnscaler.leaf":
            return False
        return next(_tensors(result), None) is not None or name.rsplit(".", 1)[-1] in _SETTERS

    def check(self, name: str, tensors: Any) -> None:
        """Raises UserError for a call that reaches into backward, which an exported program cannot hold."""
        short = name.rsplit(".", 1)[-1]
        if short in _IN_BACKWARD:
            raise UserError(f"{short} at {self.line()}: what runs in backward alone is not traced; remove it")
        for tensor in _tensors(tensors):
            kind = type(tensor.grad_fn)
            # A custom operator is a node of the graph, with the backward that is registered for it.
            if kind.__name__.startswith("BackwardHookFunction"):
                raise UserError(
                    f"a module has a backward hook (it is called at {self.line()}): remove it, it is not traced"
                )
            if issubclass(kind, BackwardCFunction) and not kind.__name__.startswith("GeneratedBackwardFor_"):
                name = kind.__name__.removesuffix("Backward")
                raise UserError(
                    f"{name}, whose result is used at {self.line()}, has a backward of its own, which is not traced; "
                    f"call what nnscaler.register_op('<inputs> -> <outputs>')({name}.apply) returns, not {name}.apply"
                )


@dataclass(eq=False)
class Record:
    """The calls of one run of a module. In them, tensors have names.

    own      id of a tensor that the module was given, or holds -> its name
    ops      digest of the calls
    outline  digest of the same calls, as `Outline` makes it
    outside  why the module depends on more than its arguments and its own tensors; empty: it does not
    """

    own: dict[int, str]
    ops: Any = field(default_factory=hashlib.sha1)
    outline: Any = field(default_factory=hashlib.sha1)
    outside: str = ""
    made: int = 0


class Recorder(Outline):
    """Records calls in the innermost record that is open."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._records: list[Record] = []
        self._home: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (record that made it, its name there)
        self._values: dict[int, tuple[Tensor, str]] = {}  # of constants, which are kept alive, by id
        self._fixed: dict[int | None, str] = {}  # what forward must not change, by id of its storage
        self.loops = Loops(model)
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            self._fixed.update({_storage(tensor): f"{kind} '{name}'" for name, tensor in named})

    @contextmanager
    def record(self, module: nn.Module, given: Mapping[str, Tensor]) -> Iterator[Record]:
        """Inside, calls go to a new record. `given`: the tensors with which the module is called"""
        own = {id(tensor): name for name, tensor in given.items()}
        for named in (module.named_buffers(), module.named_parameters()):
            own.update({id(tensor): name for name, tensor in named})
        record = Record(own)
        self._records.append(record)
        try:
            yield record
        finally:
            self._records.pop()

    def write(self, text: str, tensors: tuple[Any, ...] = ()) -> None:
        """Adds a line to the open record. `tensors` are written by their names."""
        record = self._records[-1]
        record.ops.update(f"{text} {self._text(tensors, record)}\n".encode())

    def outline(self, text: str) -> None:
        self._records[-1].outline.update(f"{text}\n".encode())

    def results(self, results: Any) -> None:
        """Names the tensors that the last call made."""
        record = self._records[-1]
        for tensor in _tensors(results):
            if id(tensor) in record.own or self._home.get(tensor, (None,))[0] is record:
                record.ops.update(self._name(tensor, record).encode())
            else:
                self._home[tensor] = record, f"t{record.made}"
                record.made += 1
            record.ops.update(_type(tensor).encode())

    def close(self, results: Any) -> None:
        """Records what the module of the open record returns."""
        tensors = tuple(_tensors(results))
        self.check("", tensors)
        self.write(f"return {[_type(tensor) for tensor in tensors]}", tensors)

    @property
    def depth(self) -> int:
        """How many records are open."""
        return len(self._records)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self._name_of(func)
        if name in _FACTS:
            return func(*args, **(kwargs or {}))
        record = self._records[-1]
        self._check_written(name.rsplit(".", 1)[-1], args, kwargs or {})
        text = self._text((args, kwargs or {}), record)  # before the call, which may write into its arguments
        result = super().__torch_function__(func, types, args, kwargs)
        if self.matters(name, result):
            line = self.line()
            self.loops.count(line)
            self.write(f"{name} {line} {torch.is_grad_enabled()} {text}")
            self.results(result)
        return result

    def _check_written(self, short: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        in_place = (short.endswith("_") and not short.startswith("__")) or short in _IN_PLACE
        written = [*args[:1]] if in_place and short != "requires_grad_" else []
        for tensor in _tensors((written, kwargs.get("out"))):
            name = self._fixed.get(_storage(tensor))
            if name is None and not self._is_made(tensor):
                name = "a tensor that it keeps from one call to the next"
            if name is not None:
                raise UserError(
                    f"forward changes {name} at {self.line()}; what a step changes are trained parameters alone"
                )

    def _text(self, value: Any, record: Record) -> str:
        if isinstance(value, Tensor):
            return self._name(value, record)
        if isinstance(value, (list, tuple)):
            return f"({' '.join([self._text(item, record) for item in value])})"
        if isinstance(value, dict):
            return f"{{{' '.join([f'{key}={self._text(item, record)}' for key, item in value.items()])}}}"
        if isinstance(value, slice):
            return self._text((value.start, value.stop, value.step), record)
        return _constant(value)

    def _name(self, tensor: Tensor, record: Record) -> str:
        """A tensor's name in a record. One that comes from elsewhere is a constant, or ties the record to where it is
        from."""
        own = record.own.get(id(tensor))
        if own is not None:
            return own
        home, name = self._home.get(tensor, (None, ""))
        if home is record:
            return name
        if home is not None:
            home.outside = home.outside or f"its tensor is used at {self.line()}"
        of_model = self._fixed.get(_storage(tensor))
        if home is not None or of_model:
            record.outside = record.outside or f"it uses a tensor from elsewhere at {self.line()}"
            return f"{name} elsewhere {_type(tensor)}"
        return self._value(tensor)

    def _is_made(self, tensor: Tensor) -> bool:
        """Whether this run of the model made a tensor, or was given it."""
        return tensor in self._home or any(id(tensor) in record.own for record in self._records)

    def _value(self, tensor: Tensor) -> str:
        known = self._values.get(id(tensor))
        if known is None:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                raise UserError(f"torch.func (vmap, grad, jvp) at {self.line()} is not traced; write it out")
            if tensor.is_meta:
                raise UserError(
                    f"a tensor that is used at {self.line()} ({_type(tensor)}) is neither a parameter nor a buffer of "
                    "the model, and has no fixed value; register it, or the module that it belongs to"
                )
            text = f"constant {len(self._values)}"
            if not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
                with torch._C.DisableTorchFunction():
                    text = digest(tensor)
            known = self._values[id(tensor)] = tensor, f"{text} {_type(tensor)}"
        return known[1]


_TRACING = os.path.dirname(__file__)
_files: dict[str, str] = {}  # what a file is: "own" (the model's), "tracing", or nothing of these
_SETTERS = {"__setitem__", "__set__", "_set_grad_enabled"}
_IN_PLACE = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
# Asked often, and no call of interest.
_FACTS = {f".{name}.__get__" for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")}
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, range, type,
)  # fmt: skip


def _full_name(func: Any) -> str:
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(func)
    owner = getattr(func, "__self__", None)  # of a property's getter: the property
    return f"{getattr(func, '__module__', '')}.{getattr(owner, '__name__', '')}.{getattr(func, '__name__', repr(func))}"


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # of a sparse tensor
        return None


def _type(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}"


def _constant(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    try:
        return constant_text(value)  # the same in each process
    except UserError:
        return f"{type(value).__qualname__} {id(value)}"


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return _type(value)
    if isinstance(value, (list, tuple)):
        return f"({' '.join(map(_outline, value))})"
    if isinstance(value, dict):
        return f"{{{' '.join([f'{key}={_outline(item)}' for key, item in value.items()])}}}"
    if isinstance(value, slice):
        return _outline((value.start, value.stop, value.step))
    return _constant(value) if isinstance(value, (*_PLAIN, Enum)) else type(value).__qualname__


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
