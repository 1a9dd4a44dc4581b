"""The traced model: plain dataclasses, printable. Printed, calls of equal layers one after the other are a loop.

A `Graph` is a root `Block` and the repeated blocks it calls. A block is a straight line of `Node`s over named tensors;
it takes inputs and parameters and gives outputs, and never reads anything else. A `Call` runs a block with its own
parameters, so that a model of any depth has one block a distinct layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import torch

from nnscaler.folding import folded


@dataclass(frozen=True)
class TensorMeta:
    """Global shape and type of a tensor, and whether training needs its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Ref:
    """A tensor of the block, by name, as an argument of a node."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass
class Node:
    """One operator call. `args` and `kwargs` hold constants, `Ref`s, and lists or tuples of these.

    `op` is an ATen overload (`aten.linear.default`) or the name of a registered operator. `module` is the path of the
    module that called it below the block's own, `module_types` the class names from the block's module inwards,
    `source` the line of user code.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    returns_tuple: bool = False
    module: str = ""
    module_types: tuple[str, ...] = ()
    source: str = ""
    no_grad: bool = False  # called under torch.no_grad

    @property
    def inputs(self) -> list[str]:
        """Names of the tensor arguments, in order, a name twice where it is passed twice."""
        return list(refs((self.args, self.kwargs)))


@dataclass
class Call(Node):
    """A node that runs a block: `args` are the block's inputs, `parameters` binds the block's parameter tensors."""

    block: str = ""
    parameters: dict[str, str] = field(default_factory=dict)  # tensor name in the block -> parameter's full name


@dataclass
class Block:
    """A function of named tensors. `tensors` has the meta of every tensor in it: inputs, parameters, results."""

    name: str
    module_type: str
    tensors: dict[str, TensorMeta] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)  # tensor name -> parameter or buffer name below the module
    nodes: list[Node] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"block {self.name} ({self.module_type})"]
        lines += [f"    input      {name}: {self.tensors[name]}" for name in self.inputs]
        lines += [f"    parameter  {name}: {self.tensors[name]}  {path}" for name, path in self.parameters.items()]
        module = None
        for are_calls, nodes in groupby(self.nodes, lambda node: isinstance(node, Call)):
            texts = []
            for node in nodes:
                comment = f"# {node.module or '.'}  {node.source}".rstrip() + "\n" if node.module != module else ""
                module = node.module
                texts.append(f"{comment}  {self._statement(node)}")
            text = "\n".join(folded(texts) if are_calls else texts)
            lines += [f"  {line}" for line in text.splitlines()]
        lines.append(f"    return {', '.join(self.outputs)}")
        return "\n".join(lines)

    def _statement(self, node: Node) -> str:
        results = ", ".join(f"{name}: {self.tensors[name]}" for name in node.outputs)
        callee = node.block if isinstance(node, Call) else node.op
        return f"{results} = {callee}({format_arguments(node.args, node.kwargs)})"


@dataclass
class Graph:
    """A model's forward pass. `parameters` has every parameter and buffer by full name; tied ones appear once.

    `record` is equal for models that would be traced to an equal graph; empty where the model was executed.
    """

    root: Block
    blocks: dict[str, Block]
    parameters: dict[str, TensorMeta]
    buffers: dict[str, torch.Tensor]  # values, by full name; not trained
    tied: dict[str, str] = field(default_factory=dict)  # other name of a parameter -> its name in `parameters`
    record: str = ""

    def all_blocks(self) -> list[Block]:
        return [self.root, *self.blocks.values()]

    def calls(self, block: str) -> list[Call]:
        return [node for node in self.root.nodes if isinstance(node, Call) and node.block == block]

    def count(self, block: Block) -> int:
        """How many times a block runs in one forward pass."""
        return 1 if block is self.root else len(self.calls(block.name))

    def parameter_uses(self) -> Iterator[tuple[Block, str, str]]:
        """(block, tensor name in it, parameter's full name) of every use of a parameter by a block call."""
        for name, path in self.root.parameters.items():
            yield self.root, name, path
        for block in self.blocks.values():
            for call in self.calls(block.name):
                for name, path in call.parameters.items():
                    yield block, name, path

    def __str__(self) -> str:
        return "\n\n".join(str(block) for block in self.all_blocks()) + "\n"


def map_refs(value: Any, function: Any) -> Any:
    """`value` with each `Ref` in it, however nested, replaced by `function(ref)`."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_refs(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_refs(item, function) for key, item in value.items()}
    return value


def refs(value: Any) -> Iterator[str]:
    """The names of the tensors in an argument, however nested."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


def format_argument(value: Any) -> str:
    """A node's argument as Python source."""
    if isinstance(value, (Ref, torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return repr(value.type)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(format_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def format_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call's arguments as Python source, without the parentheses."""
    given = [format_argument(arg) for arg in args]
    return ", ".join([*given, *(f"{key}={format_argument(arg)}" for key, arg in kwargs.items())])


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
