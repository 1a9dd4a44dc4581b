"""Finding the modules of a model that repeat, so that each distinct one is traced once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def find_repeated(model: nn.Module) -> dict[str, str]:
    """Path -> fingerprint of each module that stands with an equal one in the same list, outermost lists only.

    Modules are equal when their classes, parameter shapes and types, and plain attributes are, all the way down;
    an integer attribute that is the module's own index in the list (HF's `layer_idx`) does not tell them apart.
    """
    found: dict[str, str] = {}
    _search(model, "", found)
    return found


def _search(module: nn.Module, path: str, found: dict[str, str]) -> None:
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        prints = {name: fingerprint(child, index) for index, (name, child) in enumerate(module.named_children())}
        counts = list(prints.values())
        repeated = {f"{path}{name}": text for name, text in prints.items() if counts.count(text) > 1}
        if repeated and any(True for _ in module.parameters()):
            found.update(repeated)
            return
    for name, child in module.named_children():
        _search(child, f"{path}{name}.", found)


def fingerprint(module: nn.Module, index: int) -> str:
    """Everything that decides what a module's forward computes, but for the values of its parameters."""
    lines = []
    for name, part in module.named_modules():
        tensors = [
            (key, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
            for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        ]
        attributes = {key: _plain(value, index) for key, value in vars(part).items() if not key.startswith("_")}
        attributes.pop("forward", None)
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {tensors} {attributes}")
    return "\n".join(lines)


def _plain(value: Any, index: int) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return repr(value)
    if isinstance(value, int):
        return "index" if value == index else repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(item, index) for item in value)}]"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    # A shared object (a config, a function) is the same one; objects of a module's own count by their type.
    return getattr(value, "__qualname__", None) or type(value).__qualname__
