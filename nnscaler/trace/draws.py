"""Making the calls that draw random numbers ones that draw by counting (see `nnscaler.kernels.random`).

Such a call reads, as tensors, what its micro-batch draws, which is an input of the model; its place in the model; and
the numbers of its elements along each dimension. The last two are buffers: a block has a place for each of its calls,
as it has a weight for each. So what is split, computed in pieces or again, or run in another stage, draws as if it was
not.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from nnscaler.annotation import Shape
from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, Node, Ref, TensorMeta
from nnscaler.kernels.random import DRAWS, caller_of, no_draws, numbers_along, place_of
from nnscaler.operators.registry import find
from nnscaler.trace.convert import unused

_Key = tuple[int, int] | None  # (size, stride) of numbers along a dimension; None: what the micro-batch draws


def count_draws(graph: Graph, model: nn.Module) -> None:
    """Changes the calls that draw random numbers, in all blocks of a model's graph. Those that cannot draw by counting
    stay as they are, and are refused later.

    A module that is called several times draws anew each time: its block becomes one for each time.

    Raises UserError where the model has an input of its own by the name of the one that is needed.
    """
    if not any(_is_to_count(node) for block in graph.all_blocks() for node in block.nodes):
        return
    if DRAWS in graph.root.inputs:
        raise UserError(f"forward has an argument '{DRAWS}', by which a compiled model is told what to drop; rename it")
    _Counting(graph, model).run()


def _is_to_count(node: Node) -> bool:
    operator = None if isinstance(node, Call) else find(node.op)
    return operator is not None and operator.counted is not None and operator.draws(node)


@dataclass
class _Counters:
    """What the drawing calls of one block read (see `nnscaler.operators.registry.Counters`).

    given   what the block is given from outside -> its tensor
    places  its tensors for the places of its calls; and path and class, in the block, of the module that makes the call
    """

    block: Block
    given: dict[_Key, str] = field(default_factory=dict)
    places: list[tuple[str, str, str]] = field(default_factory=list)

    def change(self, node: Node) -> None:
        operator = find(node.op)
        assert operator is not None
        assert operator.counted is not None
        self.places.append((self._tensor(f"{node.name}_place", ()), node.module, ("", *node.module_types)[-1]))
        operator.counted(node, [self.block.tensors[name].shape for name in node.inputs], self)

    @property
    def draws(self) -> Ref:
        return Ref(self.take(None))

    def place(self) -> Ref:
        return Ref(self.places[-1][0])

    def numbers(self, shape: Shape, dim: int) -> Ref:
        return Ref(self.take((shape[dim], prod(shape[dim + 1 :]))))

    def take(self, key: _Key) -> str:
        if key not in self.given:
            name, shape = (DRAWS, tuple(no_draws().shape)) if key is None else (_name(key), (key[0],))
            self.given[key] = self._tensor(name, shape)
        return self.given[key]

    def _tensor(self, name: str, shape: Shape) -> str:
        name = unused(name, set(self.block.tensors))
        self.block.tensors[name] = TensorMeta(shape, torch.int64)
        return name


def _name(key: tuple[int, int]) -> str:
    return "numbers_{}_by_{}".format(*key)


class _Counting:
    """Changes a graph, call by call, in the order in which they run.

    names     another name of a module that has several -> its first
    ordinals  path of a module -> how often it has drawn
    times     path of a module -> how often it has been called
    changed   (block, how often its module had been called before) -> the changed block
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.root = graph, _Counters(graph.root)
        first: dict[int, str] = {}
        modules = model.named_modules(remove_duplicate=False)
        self.names = {name: first.setdefault(id(module), name) for name, module in modules}
        self.ordinals, self.times = Counter[str](), Counter[str]()
        self.changed: dict[tuple[str, int], _Counters] = {}

    def run(self) -> None:
        root = self.graph.root
        for node in root.nodes:
            if isinstance(node, Call):
                self._call(node)
            elif _is_to_count(node):
                self.root.change(node)
                self._set_place(root.parameters, *self.root.places[-1], "", "")
        for key, name in self.root.given.items():
            if key is None:
                root.inputs.append(name)
            else:
                root.parameters[name] = name
                self._add_buffer(name, numbers_along(*key))
        called = {call.block for call in root.nodes if isinstance(call, Call)}
        blocks = {**self.graph.blocks, **{counters.block.name: counters.block for counters in self.changed.values()}}
        self.graph.blocks = {name: block for name, block in blocks.items() if name in called}

    def _call(self, call: Call) -> None:
        block, times = self.graph.blocks[call.block], self.times[call.module]
        if not any(map(_is_to_count, block.nodes)):
            return
        self.times[call.module] += 1
        if (call.block, times) not in self.changed:
            self.changed[call.block, times] = _changed(block, f"{block.name}.{times}")
        counters = self.changed[call.block, times]
        call.block = counters.block.name
        call.args = (*call.args, *(Ref(self.root.take(key)) for key in counters.given))
        for place in counters.places:
            suffix = f"_{times + 1}" if times else ""
            counters.block.parameters[place[0]] = f"{place[0]}{suffix}"
            self._set_place(call.parameters, *place, f"{call.module}.", suffix)

    def _set_place(
        self, parameters: dict[str, str], tensor: str, module: str, kind: str, prefix: str, suffix: str
    ) -> None:
        """Gives a call's place its value, as a buffer that `parameters` names."""
        name = f"{prefix}{module}".removesuffix(".")
        caller = caller_of(self.names.get(name, name), kind)
        path = parameters[tensor] = f"{prefix}{tensor}{suffix}"
        self._add_buffer(path, place_of(caller, self.ordinals[caller]))
        self.ordinals[caller] += 1

    def _add_buffer(self, path: str, value: Tensor) -> None:
        self.graph.buffers[path] = value
        self.graph.parameters[path] = TensorMeta(tuple(value.shape), value.dtype)


def _changed(block: Block, name: str) -> _Counters:
    """A copy of a block, changed."""
    tensors, nodes = dict(block.tensors), copy.deepcopy(block.nodes)
    counters = _Counters(replace(block, name=name, tensors=tensors, nodes=nodes, parameters=dict(block.parameters)))
    for node in nodes:
        if _is_to_count(node):
            counters.change(node)
    counters.block.inputs = [*block.inputs, *counters.given.values()]
    return counters
