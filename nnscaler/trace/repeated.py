"""Finding the modules of a model that may repeat, and intercepting their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

# Takes a call: the module's path, the module, the call itself, arguments.
TakesCalls = Callable[[str, nn.Module, Callable[..., Any], Any, Any], Any]


def find_repeated(model: nn.Module) -> list[str]:
    """Paths of the modules that are in one list with a similar module. Of nested lists, the outermost counts.

    Similar modules have the same classes, parameters and buffers, down to the last module inside. They may still
    compute different things.
    """
    found: list[str] = []
    _search(model, "", found)
    return found


@contextmanager
def intercepted(model: nn.Module, paths: Sequence[str], take: TakesCalls) -> Iterator[None]:
    """Inside, `take` is called in place of the modules at `paths`, hooks included."""
    modules = {id(module): (path, module) for path in paths for module in [model.get_submodule(path)]}
    before = {key: vars(module).get("_compiled_call_impl") for key, (_, module) in modules.items()}
    for path, module in modules.values():
        module._compiled_call_impl = _taken(take, path, module)
    try:
        yield
    finally:
        for key, (_, module) in modules.items():
            vars(module).pop("_compiled_call_impl", None)
            if before[key] is not None:
                module._compiled_call_impl = before[key]


def _taken(take: TakesCalls, path: str, module: nn.Module) -> Callable[..., Any]:
    original = partial(module._call_impl)
    return lambda *args, **kwargs: take(path, module, original, args, kwargs)


def _search(module: nn.Module, path: str, found: list[str]) -> None:
    children = dict(module.named_children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and any(True for _ in module.parameters()):
        kinds = {name: _kind(child) for name, child in children.items()}
        kinds_in_order = list(kinds.values())
        repeated = [f"{path}{name}" for name, kind in kinds.items() if kinds_in_order.count(kind) > 1]
        if repeated:
            found.extend(repeated)
            return
    for name, child in children.items():
        _search(child, f"{path}{name}.", found)


def _kind(module: nn.Module) -> list[tuple[object, ...]]:
    parts: list[tuple[object, ...]] = [(path, type(part)) for path, part in module.named_modules()]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [*parts, *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)]
