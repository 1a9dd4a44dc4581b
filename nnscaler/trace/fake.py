"""Fake tensors: they have a shape and a type but no memory, and, except for constants, no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnscaler.errors import UserError


def fake_mode() -> FakeTensorMode:
    """Inside, operators give fake tensors. Real tensors that they meet are constants."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake(mode: FakeTensorMode, like: Any, requires_grad: bool = False) -> Tensor:
    """A tensor of the shape and dtype of `like`. It claims to be on the CPU, where the constants of a model are."""
    with mode:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu").requires_grad_(requires_grad)


@contextmanager
def fake_weights(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, the parameters and buffers of a model are fake; tied ones are the same object.

    Whatever its forward does to attributes of modules is undone afterwards.
    """
    scripted = next((name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise UserError(f"'{scripted}' is a module of torch.jit, which is not traced; give the one that it was made of")
    before = Attributes(model)
    known: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            made = fake(mode, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
        return known[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = of(tensor)  # type: ignore[assignment]
    try:
        yield
    finally:
        before.restore()


@contextmanager
def as_if_exporting() -> Iterator[None]:
    """Inside, `torch.compiler.is_exporting()` says yes, so that a model takes the path that export sees."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {name: getattr(torch.compiler, name) for name in flags}
    for name in flags:
        setattr(torch.compiler, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


class Attributes:
    """The attributes of all modules of a model, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._of = {path: (module, _copied(module)) for path, module in model.named_modules()}

    def changed(self) -> list[str]:
        """Names of the attributes that were set to something else since."""
        names = []
        for path, (module, before) in self._of.items():
            now = _copied(module)
            for name in sorted(before.keys() | now.keys()):
                if _differs(before.get(name), now.get(name)):
                    names.append(f"{path}.{name}".lstrip("."))
        return names

    def restore(self) -> None:
        for module, before in self._of.values():
            now = vars(module)
            holders = {name: now[name] for name in _HOLDERS}
            now.clear()
            now.update({**before, **holders})
            for name, held in holders.items():
                held.clear()
                held.update(before[name])


_HOLDERS = ("_parameters", "_buffers", "_modules")


def _copied(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if name in _HOLDERS else value for name, value in vars(module).items()}


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() != now.keys() or any(before[key] is not now[key] for key in before)
    return before is not now
