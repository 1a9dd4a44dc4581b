"""What is compiled: a model, and examples of its inputs."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler.graph import Graph, short_dtype
from nnscaler.hardware import Hardware
from nnscaler.report.arithmetic import model_flops
from nnscaler.report.values import Work
from nnscaler.trace.meta import FirstValues, build_with_first_values


@dataclass(frozen=True)
class Source:
    """What is compiled: a model, and examples of its inputs.

    make     builds the model
    inputs   name of an argument of its forward -> an example. Values matter only to a trace strategy that executes.
    dtype    of the parameters in computation
    fp8      whether products may be computed in fp8, where that is faster (see `nnscaler.trace.fp8`); and
    fp8_keep_bf16  which layers stay as they are
    seed     of the weights with which such a strategy executes the model
    tokens   of a micro-batch, for figures of speed; 0: none
    name     of the model, for people; empty: that of its class
    length   tokens of a sequence, where inputs are sequences of tokens; else 0
    document_length  tokens of the document in which a token stands, on average; None: documents are not kept apart
    command  that compiles the same, for people
    instead  flag -> a model that needs less memory, to be suggested where this one does not fit
    """

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    tokens: int = 0
    name: str = ""
    length: int = 0
    document_length: int | None = None
    command: str = ""
    instead: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    fp8: bool = False
    fp8_keep_bf16: tuple[str, ...] = ()

    def shortened(self, parts: int) -> Source | None:
        """The same with sequences that are cut to 1 / `parts` of their length.

        None where the inputs are not sequences of one length, or the length does not divide.
        """
        lengths = {tensor.shape[1] if tensor.dim() == 2 else 0 for tensor in self.inputs.values()}
        if len(lengths) != 1 or 0 in lengths or lengths.pop() % parts:
            return None
        inputs = {name: tensor[:, : tensor.shape[1] // parts].contiguous() for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, length=self.length // parts, tokens=self.tokens // parts)

    def with_sequences(self, count: int) -> Source:
        """The same with micro-batches of `count` sequences, all like the first one here."""
        inputs = {
            name: tensor[:1].expand(count, *tensor.shape[1:]).contiguous() for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs, tokens=count * self.length)

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model on the meta device (without values), and name -> value of its buffers."""
        model, buffers, _ = self.build_with_first_values()
        return model, buffers

    def build_with_first_values(self) -> tuple[nn.Module, dict[str, Tensor], FirstValues]:
        """The same, and what making the model says of its parameters' first values."""
        model, buffers, first = build_with_first_values(self.make, self.seed)
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.to(self.dtype)
        return model, buffers, first

    def about(self) -> dict[str, Any]:
        """What a plan is made for, as plain values. They do not depend on the time or the place."""
        precision = {"bfloat16": "bf16", "float32": "fp32"}
        dtype = str(self.dtype).removeprefix("torch.")
        facts: dict[str, Any] = {"model": self.name, "command": self.command}
        if self.length:
            facts |= {"sequence_length": self.length, "sequences_per_micro_batch": self.tokens // self.length}
        if self.document_length is not None:
            facts["document_length"] = self.document_length
        return {
            **{what: value for what, value in facts.items() if value},
            "inputs": {name: f"{short_dtype(one.dtype)}{list(one.shape)}" for name, one in self.inputs.items()},
            "precision": "fp8" if self.fp8 else precision.get(dtype, dtype),
            "versions": versions(),
        }

    def work(self, graph: Graph, hardware: Hardware) -> Work | None:
        """What a micro-batch is, for figures of speed; None where that is not known."""
        return Work(self.tokens, model_flops(graph, self.tokens), hardware.peak(self.dtype)) if self.tokens else None


def versions() -> dict[str, str | None]:
    """Library -> version, for the libraries on which a trace and generated code depend."""
    return {"torch": torch.__version__.split("+")[0], "transformers": _version("transformers")}


def _version(package: str) -> str | None:
    loaded = getattr(sys.modules.get(package), "__version__", None)
    try:
        return loaded or importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
