"""Values that a model's Python reads from tensors: `.item()`, `if x.sum() > 0`, `range(count)`.

They are recorded where the model is executed, and given again where it is traced with fake tensors, which have no
values. A read is recognised by its place: the lines of the model's own code that lead to it, and how often they did so
before.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnscaler.errors import UserError
from nnscaler.trace.own_code import is_own_code, line_of

_READS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__,
    Tensor.__contains__, Tensor.is_nonzero, torch.is_nonzero, Tensor.equal, torch.equal, Tensor.allclose,
    torch.allclose,
}  # fmt: skip

Place = tuple[Any, ...]


@dataclass
class ValueReads:
    """The values that were read in one execution, by scope. A scope is the call of a module that is traced on its
    own."""

    values: defaultdict[Place, list[Any]] = field(default_factory=lambda: defaultdict(list))
    first: str = ""  # line of the first read

    def __len__(self) -> int:
        return sum(map(len, self.values.values()))

    def record(self, scope: str) -> TorchFunctionMode:
        """Inside, reads get their tensor's value, and it is recorded."""
        return _Record(self, scope)

    def replay(self, scope: str) -> TorchFunctionMode:
        """Inside, reads get the values that they got in the same scope of the execution."""
        return _Replay(self, scope)


class _Scope(TorchFunctionMode):
    def __init__(self, reads: ValueReads, scope: str) -> None:
        super().__init__()
        self._reads, self._scope = reads, scope
        self._outside: FrameType | None = None

    def __enter__(self) -> _Scope:
        """To be entered by a `with` statement, whose own frame and those outside do not belong to a read's place."""
        self._outside = sys._getframe(1)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._outside = None
        super().__exit__(*error)

    def _place(self, func: Any, tensor: Tensor, *others: object) -> Place:
        lines = []
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self._outside:
            if is_own_code(frame.f_code.co_filename):
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        # A fake tensor's `tolist` calls `item` of each element, so that to both it is a read of items.
        func, shape = (Tensor.item, ()) if func is Tensor.tolist else (func, tuple(tensor.shape))
        return self._scope, func, tuple(lines), shape, tensor.dtype


def _nest(shape: Sequence[int], item: Callable[[], Any]) -> Any:
    return [_nest(shape[1:], item) for _ in range(shape[0])] if shape else item()


def _line(place: Place) -> str:
    lines = place[2]
    return line_of(*lines[0]) if lines else "an unknown line"


class _Record(_Scope):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _READS:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # the scope around this one takes no part in it
            value = func(*args, **(kwargs or {}))
        place = self._place(func, *args, *(kwargs or {}).values())
        self._reads.first = self._reads.first or _line(place)
        self._reads.values[place].extend(pytree.tree_leaves(value))
        return value


class _Replay(_Scope):
    def __init__(self, reads: ValueReads, scope: str) -> None:
        super().__init__(reads, scope)
        self._seen: Counter[Place] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _READS:
            return func(*args, **(kwargs or {}))
        place = self._place(func, *args, *(kwargs or {}).values())
        return _nest(args[0].shape, lambda: self._next(place)) if func is Tensor.tolist else self._next(place)

    def _next(self, place: Place) -> Any:
        known = self._reads.values.get(place, [])
        self._seen[place] += 1
        if self._seen[place] > len(known):
            raise UserError(
                f"the model reads a tensor's value at {_line(place)} while it is traced that it did not read while it "
                "was executed; what it reads must not depend on whether it is compiled"
            )
        return known[self._seen[place] - 1]
