"""Values that are no tensors, as Python source: what an operator is called with must be written into generated code."""

from __future__ import annotations

import functools
import importlib
import numbers
import pickle
from enum import Enum
from typing import Any

import torch

from nnscaler.errors import UserError

_AS_THEY_ARE = (bool, str, bytes, complex, type(None), type(...), range)


def constant_text(value: Any) -> str:
    """A value as Python source. Functions, classes and members of enumerations are imported where the source runs.

    Raises UserError for any other object, and for what cannot be imported: a lambda, or what a function defines.
    """
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return repr(value.type)
    if isinstance(value, Enum):
        return f"{_import(type(value))}[{value.name!r}]"
    if type(value) in _AS_THEY_ARE:
        return repr(value)
    if isinstance(value, numbers.Integral):  # of numpy too, which prints otherwise
        return repr(int(value))
    if isinstance(value, numbers.Real):
        number = float(value)
        return f'float("{number}")' if number != number or number in (float("inf"), float("-inf")) else repr(number)
    if isinstance(value, slice):
        return f"slice({', '.join(map(constant_text, (value.start, value.stop, value.step)))})"
    if isinstance(value, functools.partial):
        texts = [constant_text(one) for one in (value.func, *value.args)]
        texts += [f"{name}={constant_text(one)}" for name, one in value.keywords.items()]
        return f"{_import(functools.partial)}({', '.join(texts)})"
    if isinstance(value, type) or callable(value):
        return _import(value)
    raise UserError(
        f"a constant is a {type(value).__name__}, which cannot be written into generated code; allowed are numbers, "
        "texts, types of tensors, functions that can be imported, and lists, tuples and dicts of these"
    )


def imported(module: str, name: str) -> Any:
    """What `module` calls `name`, which may have dots."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _import(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if name is not None:
        # Some of torch's functions have the name of a class that nobody imports.
        for known in dict.fromkeys((name, name.rsplit(".", 1)[-1])):
            try:
                module = pickle.whichmodule(value, known)  # type: ignore[attr-defined]
                if imported(module, known) is value:
                    return f"imported({module!r}, {known!r})"
            except (ImportError, AttributeError):
                continue
    raise UserError(
        f"a constant is {name or f'an object of class {type(value).__name__}'}, which cannot be imported; define the "
        "function at the top level of a module"
    )
