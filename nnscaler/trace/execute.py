"""Executing a model before it is traced, for models whose Python reads values of tensors, and decides by them.

The weights are those from which training starts without a checkpoint. No gradients are computed.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.first_values import initial_parameters
from nnscaler.operators.registry import Operator
from nnscaler.trace.observe import Observation
from nnscaler.trace.offload import Offload, OffloadAttention, run_on
from nnscaler.trace.reads import ValueReads
from nnscaler.trace.recorder import Recorder

logger = logging.getLogger(__name__)

GB = 1e9


@dataclass
class Execution(Observation):
    """An observation of a run with real values.

    device   where the model runs
    offload  see `nnscaler.trace.strategies.Strategy`
    reads    the values that the model's Python read, by calls of modules
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False
    reads: ValueReads = field(default_factory=ValueReads)

    def scope(self, name: str) -> AbstractContextManager[Any]:
        return self.reads.record(name)

    def compute(self, operator: Operator, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert operator.function is not None
        if self.offload:
            return run_on(self.device, operator.function, args, kwargs)
        return operator.function(*args, **kwargs)


def execute(
    model: nn.Module,
    paths: Sequence[str],
    inputs: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    device: torch.device,
    offload: bool,
    seed: int,
) -> Execution:
    """Runs copies of a model, and returns what was observed.

    model     on the meta device
    paths     of the modules that may repeat
    inputs    name of an argument of `forward` -> a tensor with values
    buffers   name -> value of the model's buffers
    device    where it runs
    offload   see `nnscaler.trace.strategies.Strategy`
    seed      of the weights, see `nnscaler.first_values.initial_parameters`

    Raises UserError where an input has no values, a module cannot be initialised, or memory is too small for the
    weights.
    """
    for name, tensor in inputs.items():
        if tensor.is_meta:
            raise UserError(f"input '{name}' is on the meta device; a trace strategy that executes needs values")
    home = torch.device("cpu") if offload else device
    _check_memory(model, home)
    while True:
        real = copy.deepcopy(model)
        _fill(real, buffers, seed, home)
        execution = Execution(Recorder(real), device=device, offload=offload)
        with ExitStack() as stack:
            if offload:
                stack.enter_context(Offload(device))
                stack.enter_context(OffloadAttention(device))
            execution.run(real, paths, {name: tensor.to(home) for name, tensor in inputs.items()})
        if not execution.entwined:
            break
        paths = [path for path in paths if path not in execution.entwined]
    if execution.reads:
        logger.warning(
            "the model read %d values of tensors (first at %s): what is compiled follows the path that they chose",
            len(execution.reads), execution.reads.first,
        )  # fmt: skip
    return execution


def _fill(model: nn.Module, buffers: Mapping[str, Tensor], seed: int, device: torch.device) -> None:
    """Gives parameters their first values, and buffers theirs. A buffer without a value gets zeros."""
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
