"""Operators that look up elements, or write them to places; and operators that make tensors from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nnscaler.annotation import Shape
from nnscaler.graph import Node, Ref
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.registry import arguments, backward_reads, family, save_nothing
from nnscaler.operators.spelling import WrittenCall


def embedding(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Rows of a table. With gradients that are scaled by how often a token occurs, the tokens stay whole."""
    mark = "^" if arguments(node)["scale_grad_by_freq"] else ""
    tokens = [f"{name}{mark}" for name in dim_names(inputs[1])]
    return write([["n^", "h"], tokens], [[*tokens, "h"]])


def embedding_text(call: WrittenCall) -> str:
    options = [f", {name}={call[name]}" for name in ("padding_idx", "scale_grad_by_freq") if name in call.unwritten]
    return f"F.embedding({call['indices']}, {call['weight']}{''.join(options)})"


def one_hot(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    return write([names], [[*names, "n^"]])


def gather(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Takes from each row along `dim`. Another dimension may be split where the index covers all of it."""
    dim = arguments(node)["dim"] % max(len(inputs[0]), 1)
    same = [a == b for a, b in zip(*inputs)]
    source = [f"d{k}" if ok and k != dim else f"s{k}^" for k, ok in enumerate(same)]
    index = [f"d{k}" if ok and k != dim else f"i{k}^" for k, ok in enumerate(same)]
    return write([source, index], [index])


def scatter(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Writes into each row along `dim`. Another dimension may be split where index and source cover all of it."""
    dim = arguments(node)["dim"] % max(len(inputs[0]), 1)
    same = [k != dim and len(set(column)) == 1 for k, column in enumerate(zip(*inputs))]
    sides = ("s", "i", "v")[: len(inputs)]
    tensors = [[f"d{k}" if ok else f"{side}{k}^" for k, ok in enumerate(same)] for side in sides]
    return write(tensors, [tensors[0]])


def index_select(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = arguments(node)["dim"] % len(names)
    return write(
        [[*names[:dim], "n^", *names[dim + 1 :]], ["i"]],
        [[*names[:dim], "i", *names[dim + 1 :]]],
    )


def index(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`x[:, rows, columns]`: dimensions that are looked up stay whole; those of the tensors that say where may be
    split.

    The latter stand where the first looked-up dimension was, or in front if other dimensions lie in between.
    """
    names = dim_names(inputs[0])
    given = arguments(node)["indices"]
    looked_up = [dim for dim, item in enumerate(given) if item is not None]
    source = [f"{name}^" if dim in looked_up else name for dim, name in enumerate(names)]
    where = torch.broadcast_shapes(*inputs[1:])
    new = [f"i{k}" for k in range(len(where))]
    tensors = []
    for shape in inputs[1:]:
        aligned = list(zip(new, where))[len(where) - len(shape) :]
        tensors.append([name if size == full else "1" for size, (name, full) in zip(shape, aligned)])
    together = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    at = looked_up[0] if together else 0
    rest = [name for dim, name in enumerate(names) if dim not in looked_up]
    return write([source, *tensors], [[*rest[:at], *new, *rest[at:]]])


def index_put(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`x[:, rows] = values`: dimensions that are looked up stay whole, and so do those of the tensors that say
    where."""
    names = dim_names(inputs[0])
    given = arguments(node)
    looked_up = [dim for dim, item in enumerate(given["indices"]) if item is not None]
    target = [f"{name}^" if dim in looked_up else name for dim, name in enumerate(names)]
    where = [[f"i{k}_{i}^" for i in range(len(shape))] for k, shape in enumerate(inputs[1:-1])]
    together = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    new = [f"w{i}" for i in range(len(torch.broadcast_shapes(*inputs[1:-1])))]
    at = looked_up[0] if together else 0
    rest = [name for dim, name in enumerate(names) if dim not in looked_up]
    full = [*rest[:at], *new, *rest[at:]]
    values: list[str] = []
    for name, size in list(zip(full[::-1], inputs[-1][::-1]))[::-1]:
        kept = name in rest and size == inputs[0][names.index(name)]
        values.append(name if kept else "1" if size == 1 else f"v{len(values)}^")
    return write([target, *where, values], [target])


def index_text(call: WrittenCall) -> str:
    items = [str(item) if isinstance(item, Ref) else ":" for item in call.value("indices")]
    return f"{call['self']}[{', '.join(items)}]"


def constant(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A new tensor, which is the same on each device."""
    made = write([], [[f"{name}^" for name in dim_names(shape)] for shape in outputs])
    return ", ".join("?" for _ in inputs) + made


def made(template: str) -> Callable[[WrittenCall], str]:
    """The text of a new tensor on the model's device. Its type is written where torch would choose another."""

    def text(call: WrittenCall) -> str:
        given = call.value("dtype")
        usual = given is None and (not call.dtype.is_floating_point or call.dtype == torch.float32)
        written = call.fill(template)
        options = [] if usual else [f"dtype={call.dtype}"]
        return f"{written[:-1]}, {', '.join([*options, 'device=device'])})"

    return text


family("embedding.default", embedding, embedding_text, saves=backward_reads(weight="indices"))
family("one_hot.default", one_hot, "F.one_hot(*)", saves=save_nothing)
family("gather.default", gather, "{self}.gather({dim}, {index})", saves=backward_reads(self="self index"))
family("index_select.default", index_select, saves=backward_reads(self="index"))
family("index.Tensor", index, index_text, saves=backward_reads(self="indices"))
family(
    "index_put.default",
    index_put,
    "torch.ops.aten.index_put(*)",
    saves=backward_reads(self="indices", values="indices"),
)
family("scatter.src", scatter, saves=backward_reads(self="index", src="index"))
family("scatter.value", scatter, saves=backward_reads(self="index"))
family("scatter_add.default", scatter, saves=backward_reads(src="index"))
family(
    "arange.default arange.start arange.start_step zeros.default ones.default full.default empty.memory_format "
    "eye.default eye.m",
    constant,
    made("torch.{op}(*)"),
    saves=save_nothing,
)
family("scalar_tensor.default", constant, made("torch.scalar_tensor({s})"), saves=save_nothing)
family("new_zeros.default new_ones.default new_full.default new_empty.default", constant, saves=save_nothing)
