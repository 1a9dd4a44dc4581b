"""State-space layers and linear attention of Hugging Face models: what runs over tokens is one operator.

transformers has a function for each kernel of the packages mamba-ssm and flash-linear-attention. It calls the kernel
where that is installed, and else loops over tokens, or chunks of them, in plain PyTorch. In a traced model each round
of such a loop would be operators of its own. So the call of the function is one operator, which is split over samples,
and over heads or channels.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from nnscaler.operators.registry import leaf_tracer
from nnscaler.operators.scans import scan

# Name of a kernel -> the annotation of each argument, and, last, of the result. b: samples, l: tokens, n: size of the
# state for each channel d, or each channel p of a head. Heads come in k groups of r, which share what has no r.
_DELTA_RULE = {"query": "b l^ k n^", "key": "b l^ k n^", "value": "b l^ (k r) p^"}
SCANS = {
    "selective_scan_fn": {
        "hidden_states": "b d l^", "dt": "b d l^", "A": "d n^", "B": "b n^ l^", "C": "b n^ l^", "D": "d",
        "z": "b d l^", "delta_bias": "d", "": "b d l^",
    },
    "mamba_chunk_scan_combined": {
        "hidden_states": "b l^ (k r) p^", "dt": "b l^ (k r)", "A": "(k r)", "B": "b l^ k n^", "C": "b l^ k n^",
        "D": "(k r)", "dt_bias": "(k r)", "": "b l^ (k r) p^",
    },
    "chunk_gated_delta_rule": _DELTA_RULE | {"g": "b l^ (k r)", "beta": "b l^ (k r)", "": "b l^ (k r) p^"},
    "chunk_kda": _DELTA_RULE | {"g": "b l^ (k r) n^", "beta": "b l^ (k r)", "": "b l^ (k r) p^"},
}  # fmt: skip
_LAST_STATE = {"return_last_state", "return_final_states", "output_final_state"}  # what asks for it


def make_scans_operators(model: nn.Module) -> None:
    """Lets what of a model runs over tokens be called as an operator, wherever operators are traced."""
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and _kernel(function) in SCANS:
                setattr(module, name, _as_operator(f"{module.__name__}:{name}", function))


def _kernel(function: FunctionType) -> str | None:
    """The name of the kernel that a function of transformers stands for. None: it is another function."""
    is_wrapper = "func_name" in function.__code__.co_freevars and hasattr(function, "__wrapped__")
    return inspect.getclosurevars(function).nonlocals["func_name"] if is_wrapper else None


def _as_operator(path: str, function: FunctionType) -> Callable[..., Any]:
    names = SCANS[_kernel(function) or ""]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given = {name: value for name, value in given.items() if name != "kwargs" and value is not None}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        asked = {name for name in _LAST_STATE.intersection(given) if given[name]}
        if leaf_tracer.get() is None or asked or not tensors.keys() <= names.keys():
            return function(*args, **kwargs)
        options = {name: value for name, value in given.items() if name not in tensors and name not in _LAST_STATE}
        annotation = f"{', '.join(names[name] for name in tensors)} -> {names['']}"
        result = scan(path, annotation, tensors, options)
        return (result, None) if "output_final_state" in signature.parameters else result

    return call
