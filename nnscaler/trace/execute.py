"""Executing a model before it is traced, so that values which its Python reads, and the paths they choose, are known.

Its weights are those that training starts from without a checkpoint; it computes no gradients.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.operators.registry import Operator
from nnscaler.runtime.weights import initial_parameters
from nnscaler.trace.leaf import EmptyTensor, Structure, call_key, operators_call
from nnscaler.trace.offload import Offload, OffloadAttention, run_on
from nnscaler.trace.reads import ValueReads
from nnscaler.trace.repeated import as_leaves

logger = logging.getLogger(__name__)

ROOT = "root"
GB = 1e9


@dataclass
class Execution:
    """What one execution of a model tells its tracing.

    reads    values that its Python read, in a scope a call of a repeated module
    results  of each distinct call of a registered operator: its results' nest, and their shapes and types
    """

    device: torch.device
    offload: bool = False
    reads: ValueReads = field(default_factory=ValueReads)
    results: dict[Any, tuple[Structure, list[EmptyTensor]]] = field(default_factory=dict)
    modules: int = 0

    def call_module(self, key: str | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        scope, self.modules = str(self.modules), self.modules + 1
        with self.reads.record(scope):
            return function(*args, **kwargs)

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator's body is its own business: what it reads is not taken down."""
        assert operator.function is not None
        arguments, tensors = Structure.take((args, kwargs))
        with operators_call(None), torch._C.DisableTorchFunction():
            if self.offload:
                value = run_on(self.device, operator.function, args, kwargs)
            else:
                value = operator.function(*args, **kwargs)
        nest, results = Structure.take(value)
        meta = torch.device("meta")
        empty = [EmptyTensor(result.shape, result.dtype, meta) for result in results]
        self.results[call_key(operator.name, arguments, tensors)] = nest, empty
        return value


def execute(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    repeated: Mapping[str, str],
    execution: Execution,
    seed: int,
) -> None:
    """Runs a copy of `model`, which is on the meta device, on `execution.device`, and notes there what it learns.

    inputs    tensors with values, by parameter name of `forward`
    buffers   the values of the model's buffers
    repeated  paths of the modules that are traced on their own
    seed      of the weights, see `initial_parameters`

    Raises UserError where an input has no values, a module cannot be initialised, or memory is too small for weights.
    """
    for name, tensor in inputs.items():
        if tensor.is_meta:
            raise UserError(f"input '{name}' is on the meta device; a trace strategy that executes needs values")
    home = torch.device("cpu") if execution.offload else execution.device
    _check_memory(model, home)
    model = copy.deepcopy(model)
    _fill(model, buffers, seed, home)
    real = {name: tensor.to(home) for name, tensor in inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(operators_call(execution))
        stack.enter_context(as_leaves(model, repeated, execution, reuse=False))
        if execution.offload:
            stack.enter_context(Offload(execution.device))
            stack.enter_context(OffloadAttention(execution.device))
        with execution.reads.record(ROOT):
            model(**real)
    if execution.reads:
        logger.warning(
            "the model read %d values of tensors (first at %s): what is compiled follows the path that they chose",
            len(execution.reads), execution.reads.first,
        )  # fmt: skip


def _fill(model: nn.Module, buffers: Mapping[str, Tensor], seed: int, device: torch.device) -> None:
    """Gives parameters their first values, and buffers theirs; a buffer without a value gets zeros."""
    names = dict(model.named_parameters())
    real: dict[int, nn.Parameter] = {}
    for name, value in initial_parameters(model, seed, device):
        real[id(names[name])] = nn.Parameter(value.to(names[name].dtype), requires_grad=False)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = real[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            known = buffers.get(f"{path}.{name}".lstrip("."))
            module._buffers[name] = (
                torch.zeros_like(buffer, device=device) if known is None else known.to(device, copy=True)
            )


def _check_memory(model: nn.Module, device: torch.device) -> None:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"executing the model takes {needed / GB:.0f} GB for its weights alone, and the {device.type} has "
            f"{there / GB:.0f} GB; trace strategies that execute nothing take none"
        )
