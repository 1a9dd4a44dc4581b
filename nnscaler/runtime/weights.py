"""First values of parameters, from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.errors import UserError


def initial_parameters(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 value) of every parameter of a model on the meta device, one module's at a time.

    A module's parameters depend on `seed` and the module's path alone: not on the plan, nor on other modules. They are
    what the module's own `reset_parameters` makes, or `_init_weights` of the Hugging Face model around it. Tied
    parameters come once, under their first name. Raises UserError for a module that has neither.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {
            name: parameter for name, parameter in module.named_parameters(recurse=False) if id(parameter) not in seen
        }
        if not own:
            continue
        seen.update(map(id, own.values()))
        initialise = _initialiser(model, path, module)
        kept = dict(module._parameters)
        for name, parameter in own.items():
            real = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            module._parameters[name] = nn.Parameter(real, requires_grad=parameter.requires_grad)
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            initialise()
        values = {name: module._parameters[name] for name in own}
        module._parameters.update(kept)
        for name, value in values.items():
            assert value is not None
            yield f"{path}.{name}".lstrip("."), value.detach()


def _initialiser(model: nn.Module, path: str, module: nn.Module) -> Callable[[], object]:
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:length]))
        initialise: Any = getattr(around, "_init_weights", None)
        if initialise is not None:
            return lambda: initialise(module)
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        return reset
    raise UserError(f"module '{path}' ({type(module).__name__}) cannot be initialised: it has no reset_parameters()")
