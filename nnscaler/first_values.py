"""The first values of parameters, made from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.trace.meta import FirstValues


def initial_parameters(
    model: nn.Module,
    seed: int,
    device: torch.device,
    names: Collection[str] | None = None,
    first: FirstValues | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, value in fp32) of the parameters of a model on the meta device, one module after the other: of those that
    are named, or of all.

    The values depend on the seed and the module's path only: not on the plan, nor on other modules. They are what the
    `_init_weights` of the surrounding Hugging Face models makes of them. For what that leaves untouched, and for other
    models, the module's own `reset_parameters` makes them. `first` is what else is known of them. Tied parameters come
    once, under their first name.

    Raises UserError for a parameter to which neither gives a value, or something else gives one that is lost.
    """
    first = first or FirstValues()
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in seen and (names is None or f"{path}.{name}".lstrip(".") in names)
        }
        if not own:
            continue
        seen.update(map(id, own.values()))
        kept = dict(module._parameters)
        values = {
            # Not a number, so that what is left untouched is seen.
            name: nn.Parameter(torch.full(parameter.shape, nan, device=device), requires_grad=parameter.requires_grad)
            for name, parameter in own.items()
        }
        module._parameters.update(values)
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            _initialise(model, path, module, values)
        module._parameters.update(kept)
        for name, value in values.items():
            full = f"{path}.{name}".lstrip(".")
            if full in first.known:
                yield full, first.known[full].to(device, torch.float32)
                continue
            if full in first.lost:
                raise UserError(
                    f"parameter '{full}' of {type(module).__name__} gets its first value at {first.lost[full]}, and "
                    "not in the model's _init_weights() or the module's reset_parameters(), which alone are called "
                    "again; move it there, or give the module itself"
                )
            if value.isnan().any():
                raise UserError(
                    f"parameter '{full}' of {type(module).__name__} has no first value: neither the model's "
                    "_init_weights() nor the module's reset_parameters() gives it one"
                )
            yield full, value.detach()


def _initialise(model: nn.Module, path: str, module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the parameters of one module, which are `values`, their first values."""
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    owner = next((index for index, part in enumerate(around) if hasattr(part, "_init_weights")), None)
    if owner is not None:
        initialise: Any = around[owner]._init_weights
        # Parts may set what lies in them, as GPT-2 does with the projections that end a block; all else is on the meta
        # device, where nothing happens. The model's own classes begin with the outermost that has `_init_weights`.
        last = max(index for index, part in enumerate(around) if hasattr(part, "_init_weights"))
        for part in around[: last + 1]:
            initialise(part)
    untouched = [name for name, value in values.items() if value.isnan().any()]
    reset: Any = getattr(module, "reset_parameters", None)
    if untouched and reset is not None:
        made = {name: value.clone() for name, value in values.items() if name not in untouched}
        reset()
        for name, value in made.items():
            values[name].copy_(value)
