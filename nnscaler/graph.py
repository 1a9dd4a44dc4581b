"""The traced model, as plain dataclasses that can be printed.

A `Graph` has a root `Block`, and the repeated blocks that it calls. A block is a straight line of `Node`s over named
tensors: it takes inputs and parameters, gives outputs, and reads nothing else. A `Call` is a node that runs a block
with its own parameters. So a model of any depth has one block for each distinct layer. When printed, calls of equal
layers one after the other are a loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import torch

from nnscaler.constants import constant_text
from nnscaler.errors import UserError
from nnscaler.folding import folded


@dataclass(frozen=True)
class TensorMeta:
    """The whole shape of a tensor, its type, and whether training needs its gradient."""

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
    """A tensor of the block, by its name, as an argument of a node."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass
class Node:
    """One call of an operator.

    op             an ATen overload such as `aten.linear.default`, or the name of a registered operator
    args, kwargs   constants, `Ref`s, and lists or tuples of these
    outputs        names of the tensors that it makes
    returns_tuple  whether the operator returns a tuple of them
    module         path, below the block's own module, of the module that called the operator
    module_types   class names from the block's own module inwards to that one
    source         the line of the user's code
    no_grad        whether it was called under `torch.no_grad`
    pinned         the annotated names along which alone it may be split, see `pin`; None: the planner chooses
    may_be_fp8     whether it may be computed in fp8, see `nnscaler.trace.fp8`
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
    no_grad: bool = False
    pinned: tuple[str | None, ...] | None = None
    may_be_fp8: bool = False

    def pin(self, *names: str | None) -> None:
        """On each axis of devices, it is split along one of these names of its annotation; None: or not at all."""
        self.pinned = names

    @property
    def inputs(self) -> list[str]:
        """Names of the tensor arguments, in order; a tensor that is passed twice is there twice."""
        return refs((self.args, self.kwargs))


@dataclass
class Call(Node):
    """A node that runs a block. Its `args` are the block's inputs.

    block       the name of the block
    parameters  name of a tensor in the block -> full name of the parameter that this call uses for it
    """

    block: str = ""
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass
class Block:
    """A function of named tensors.

    name         by which calls name it
    module_type  the class of the module that it is
    tensors      name -> shape and type of every tensor in it: inputs, parameters, results
    inputs       names of the tensors that it takes
    parameters   name of a tensor -> name, below the module, of the parameter or buffer that it is
    nodes        in the order in which they run
    outputs      names of the tensors that it gives
    """

    name: str
    module_type: str
    tensors: dict[str, TensorMeta] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
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
    """A model's forward pass.

    root        the block that is the whole model
    blocks      name -> block that the root calls
    parameters  full name -> shape and type of every parameter and buffer; tied ones are there once
    buffers     full name -> value of the tensors that are not trained
    tied        another name of a parameter -> its name in `parameters`
    record      equal for models that would be traced to an equal graph; empty where the model was executed
    stored      name of a parameter -> the dimensions along which alone it may be sharded, see `store`
    """

    root: Block
    blocks: dict[str, Block]
    parameters: dict[str, TensorMeta]
    buffers: dict[str, torch.Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    record: str = ""
    stored: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def store(self, parameter: str, *dims: int | None) -> None:
        """On each axis of devices, a parameter or buffer is sharded along one of these dimensions; None: or whole.

        Parameters of calls of one block are stored alike. Raises UserError where the model has no such parameter.
        """
        name = self.tied.get(parameter, parameter)
        if name not in self.parameters:
            raise UserError(f"the model uses no parameter '{parameter}'; it has {', '.join(self.parameters)}")
        self.stored[name] = dims

    def all_blocks(self) -> list[Block]:
        """The root, and the blocks that it calls."""
        return [self.root, *self.blocks.values()]

    def calls(self, block: str) -> list[Call]:
        """The calls of the block of this name, in order."""
        return [node for node in self.root.nodes if isinstance(node, Call) and node.block == block]

    def count(self, block: Block) -> int:
        """How often a block runs in one forward pass."""
        return 1 if block is self.root else len(self.calls(block.name))

    def parameter_uses(self) -> Iterator[tuple[Block, str, str]]:
        """(block, name of a tensor in it, full name of the parameter), for every use of a parameter by a call of a
        block."""
        for name, path in self.root.parameters.items():
            yield self.root, name, path
        for block in self.blocks.values():
            for call in self.calls(block.name):
                for name, path in call.parameters.items():
                    yield block, name, path

    def __str__(self) -> str:
        return "\n\n".join(str(block) for block in self.all_blocks()) + "\n"


def map_refs(value: Any, function: Any) -> Any:
    """`value`, in which each `Ref`, however nested, is replaced by `function(ref)`."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_refs(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_refs(item, function) for key, item in value.items()}
    return value


def refs(value: Any) -> list[str]:
    """The names of the tensors in an argument, however nested."""
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, dict):
        value = list(value.values())
    return [name for item in value for name in refs(item)] if isinstance(value, (list, tuple)) else []


def format_argument(value: Any) -> str:
    """A node's argument as Python source. Raises UserError for one that cannot be written so."""
    if isinstance(value, Ref):
        return str(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(format_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{format_argument(key)}: {format_argument(item)}' for key, item in value.items())}}}"
    return constant_text(value)


def format_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The arguments of a call as Python source, without the parentheses."""
    given = [format_argument(arg) for arg in args]
    return ", ".join([*given, *(f"{key}={format_argument(arg)}" for key, arg in kwargs.items())])


def short_dtype(dtype: torch.dtype) -> str:
    """A type in short, such as `bf16`, `f32` or `i64`."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
