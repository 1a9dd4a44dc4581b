"""Operators that look elements up, and those that make tensors from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.registry import family, save_nothing
from nnscaler.operators.text import dim_names, write


def embedding(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    tokens = dim_names(inputs[1])
    return write([["n^", "h"], tokens], [[*tokens, "h"]])


def save_indices(node: Node, inputs: Sequence[object], outputs: Sequence[object]) -> list[str]:
    return node.inputs[1:]


def gather(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    dim = int(node.args[1]) % len(inputs[0])
    same = [a == b for a, b in zip(*inputs)]
    source = [f"d{k}" if ok and k != dim else f"s{k}^" for k, ok in enumerate(same)]
    index = [f"d{k}" if ok and k != dim else f"i{k}^" for k, ok in enumerate(same)]
    return write([source, index], [index])


def index_select(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = int(node.args[1]) % len(names)
    return write(
        [[*names[:dim], "n^", *names[dim + 1 :]], ["i"]],
        [[*names[:dim], "i", *names[dim + 1 :]]],
    )


def constant(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A new tensor, the same on each device."""
    made = write([], [[f"{name}^" for name in dim_names(shape)] for shape in outputs])
    return ", ".join("?" for _ in inputs) + made


def triangle(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dims = [*names[:-2], *(f"{name}^" for name in names[-2:])]
    return write([dims], [dims])


family("embedding.default", embedding, saves=save_indices)
family("gather.default", gather, saves=save_indices)
family("index_select.default", index_select, saves=save_indices)
family("tril.default triu.default", triangle, saves=save_nothing)
family(
    "arange.default arange.start arange.start_step zeros.default ones.default full.default empty.memory_format "
    "scalar_tensor.default lift_fresh_copy.default",
    constant,
    saves=save_nothing,
)
