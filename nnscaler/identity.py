"""What a compiled directory was compiled for, so that it is used for nothing else."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.batch import Batch
from nnscaler.config import ComputeConfig
from nnscaler.operators.arguments import written_by_user
from nnscaler.operators.registry import all_registered
from nnscaler.source import Source, versions
from nnscaler.trace import find_strategy, observed
from nnscaler.trace.digest import digest

DONE = "compiled.json"
UNKNOWN = "known only when it is executed"


def identity(
    source: Source,
    built: tuple[nn.Module, Mapping[str, Tensor]],
    config: ComputeConfig,
    record: str | None = None,
    batch: Batch | None = None,
) -> dict[str, Any]:
    """Everything that a compiled directory depends on, as plain values. Equal identities compile to equal files.

    built   what `source.build()` gives: the model, and the values of its buffers
    record  that of a run of the model (see `nnscaler.trace.observed`), where it is known already. It holds whatever an
            attribute, code, closure or environment variable makes the model compute. A strategy that executes the
            model has none; then the model is compiled again each time.
    batch   where the planner has chosen how a step is divided: what it was to divide
    """
    model, buffers = built
    executes = find_strategy(config.trace_strategy).executes
    if record is None:
        record = UNKNOWN if executes else observed(model, source.inputs)
    return {
        "model": record,
        "parameters": _parameters(model),
        "buffers": _digest(repr(sorted((name, digest(value)) for name, value in buffers.items()))),
        "sources": _sources(model, config),
        "inputs": {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in source.inputs.items()},
        "dtype": str(source.dtype),
        "fp8": [source.fp8, *source.fp8_keep_bf16],
        "config": {
            **asdict(config),
            "recompute_modules": None if config.recompute_modules is None else list(config.recompute_modules),
            "pipeline_pivots": list(config.pipeline_pivots),
            "pas_policy": _content(config.pas_policy),
        },
        "batch": None if batch is None else asdict(batch),
        "hardware": config.find_hardware().identity(),
        "operators": {operator.name: _digest(_content(operator)) for operator in all_registered()},
        "nnscaler": _package_digest(),
        **versions(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(directory: Path, wanted: Mapping[str, Any]) -> list[str] | None:
    """What a compiled directory was compiled for that differs from `wanted`, in lines. None where nothing complete is
    there."""
    try:
        found: dict[str, Any] = json.loads((directory / DONE).read_text())
    except (OSError, ValueError):
        return None
    found_flat, wanted_flat = _flatten(found), _flatten(wanted)
    return [
        _difference(key, found_flat.get(key), wanted_flat.get(key))
        for key in sorted({*found_flat, *wanted_flat})
        if found_flat.get(key) != wanted_flat.get(key) or UNKNOWN in (found_flat.get(key), wanted_flat.get(key))
    ]


def _difference(what: str, found: Any, wanted: Any) -> str:
    """Digests, which tell a person nothing, are left out."""
    told = [re.sub(r"\b[0-9a-f]{16,}\b", "", str(value)) for value in (found, wanted)]
    if found != wanted and told[0] == told[1]:
        return f"{what}: changed"
    return f"{what}: compiled {found}, wanted {wanted}"


def _sources(model: nn.Module, config: ComputeConfig) -> dict[str, str]:
    """Name of a module -> digest of its file, for all modules that define the model's classes, registered operators, or
    the policy."""
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    names.update(written_by_user(operator.function).__module__ for operator in all_registered() if operator.function)
    names.add(getattr(config.pas_policy, "__module__", "builtins"))
    outside = {"builtins", "abc", "typing", "collections"}
    names = {name for name in names if name not in outside and name.split(".")[0] not in ("torch", "nnscaler")}
    found = {}
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        found[name] = _digest(Path(file).read_bytes()) if file and Path(file).is_file() else "no file"
    return found


def _parameters(model: nn.Module) -> str:
    """A digest of what the record does not tell of parameters and buffers: their shapes, which are trained, and which
    are one."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return _digest(
        repr(
            [
                (name, first.setdefault(id(tensor), name), tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                for name, tensor in named
            ]
        )
    )


def _content(value: Any) -> str:
    """A fact about an operator as text, the same in each process: of a function, its code and what it was made with."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{[f'{key}: {_content(item)}' for key, item in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{[_content(item) for item in value]}"
    if isinstance(value, functools.partial):
        return _content([value.func, value.args, value.keywords])
    if isinstance(value, MethodType) and written_by_user(value) is not value:  # an apply
        parts = {name: getattr(part, "__func__", part) for name, part in vars(written_by_user(value)).items()}
        return _content({name: part for name, part in parts.items() if isinstance(part, FunctionType)})
    if isinstance(value, MethodType):
        return _content(value.__func__)
    if isinstance(value, FunctionType):
        made_with = [cell.cell_contents for cell in value.__closure__ or ()]
        made_with += [value.__defaults__, value.__kwdefaults__]
        return f"{value.__module__}.{value.__qualname__} {_code(value.__code__)} {_content(made_with)}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__} {[_content(getattr(value, field.name)) for field in fields(value)]}"
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _code(code: CodeType) -> str:
    constants = [_code(item) if isinstance(item, CodeType) else _content(item) for item in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _package_digest() -> str:
    """A digest of this package's own source: another version of the compiler may plan and write otherwise."""
    root = Path(__file__).parent
    files = sorted(path for kind in ("*.py", "*.json") for path in root.rglob(kind))
    return _digest("\n".join(f"{path.relative_to(root)}\n{path.read_text()}" for path in files))
