"""Finding the modules of a model that repeat, so that each distinct one is traced once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nnscaler.trace.leaf import Callee

Facts = dict[tuple[str, str], str]  # (path of a submodule, fact) -> value, as text


def find_repeated(model: nn.Module) -> dict[str, str]:
    """Path -> fingerprint of each module that stands with an equal one in the same list, outermost lists only.

    Modules are equal when their classes, parameter shapes and types, and plain attributes are, all the way down.
    An attribute that is its module's own index throughout the list (HF's `layer_idx`) does not tell them apart.
    """
    found: dict[str, str] = {}
    _search(model, "", found)
    return found


@contextmanager
def as_leaves(model: nn.Module, repeated: Mapping[str, str], callee: Callee, reuse: bool) -> Iterator[None]:
    """Inside, `callee` takes the calls of repeated modules, by their fingerprint if those that are equal are one."""

    def leaf_forward(module: nn.Module, key: str | None) -> Any:
        original = module.forward
        return lambda *args, **kwargs: callee.call_module(key, original, args, kwargs)

    modules = [model.get_submodule(path) for path in repeated]
    for module, key in zip(modules, repeated.values()):
        module.forward = leaf_forward(module, key if reuse else None)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def describe(model: nn.Module) -> str:
    """Everything that decides what a model computes, but for the values of its parameters."""
    lines = [f"{key}: {value}" for key, value in _facts(model).items()]
    shared = {id(value): value for part in model.modules() for value in vars(part).values()}
    for value in shared.values():
        if hasattr(value, "to_dict"):  # a configuration, such as Hugging Face's
            lines.append(f"{value.to_dict()} {getattr(value, '_attn_implementation', None)}")
    return "\n".join(lines)


def _search(module: nn.Module, path: str, found: dict[str, str]) -> None:
    children = dict(module.named_children())
    if (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(children) > 1
        and any(True for _ in module.parameters())
    ):
        prints = {f"{path}{name}": text for name, text in zip(children, _fingerprints(list(children.values())))}
        texts = list(prints.values())
        repeated = {name: text for name, text in prints.items() if texts.count(text) > 1}
        if repeated:
            found.update(repeated)
            return
    for name, child in children.items():
        _search(child, f"{path}{name}.", found)


def _fingerprints(modules: list[nn.Module]) -> list[str]:
    """For each module, everything that decides what its forward computes, but for the values of its parameters."""
    facts = [_facts(module) for module in modules]
    shared = set(facts[0]).intersection(*facts)
    counters = {key for key in shared if all(fact[key] == repr(index) for index, fact in enumerate(facts))}
    return ["\n".join(f"{key}: {value}" for key, value in fact.items() if key not in counters) for fact in facts]


def _facts(module: nn.Module) -> Facts:
    facts: Facts = {}
    for path, part in module.named_modules():
        facts[path, "class"] = f"{type(part).__module__}.{type(part).__qualname__}"
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            facts[path, name] = f"{_plain(tensor)} {tensor.requires_grad}"
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "forward":
                facts[path, name] = _plain(value)
    return facts


def _plain(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, str, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    # Functions are told apart by name; other objects (a config, shared by all layers) by their class.
    return getattr(value, "__qualname__", None) or type(value).__qualname__
