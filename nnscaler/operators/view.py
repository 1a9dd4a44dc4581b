"""Operators that move or rename elements without computing: views, permutations, slices, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.pointwise import broadcast
from nnscaler.operators.registry import Annotate, family, save_nothing
from nnscaler.operators.text import dim_names, write


def regroup(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A reshape: both shapes written over their common factors, `(a b) c -> a (b c)`."""
    source, target = inputs[0], outputs[0]
    atoms = _common_factors(source, target)
    if atoms is None:
        return write([[f"i{k}^" for k in range(len(source))]], [[f"o{k}^" for k in range(len(target))]])
    return write([_over_atoms(source, atoms)], [_over_atoms(target, atoms)])


def _common_factors(source: Shape, target: Shape) -> list[int] | None:
    """Sizes whose running products, from the right, pass through those of both shapes; None if there are none."""
    if 0 in source:
        return None
    cuts = set()
    for shape in (source, target):
        running = 1
        for size in reversed(shape):
            running *= size
            cuts.add(running)
    atoms, previous = [], 1
    for cut in sorted(cuts):
        if cut % previous:
            return None
        if cut > previous:
            atoms.append(cut // previous)
        previous = cut
    return atoms[::-1]


def _over_atoms(shape: Shape, atoms: list[int]) -> list[str]:
    dims, at = [], 0
    for size in shape:
        names = []
        while size > 1:
            names.append(f"d{at}")
            size //= atoms[at]
            at += 1
        dims.append("1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})")
    return dims


def to_local_shape(
    node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The sizes argument of a reshape or expand, as the device's own shape."""
    return (node.args[0], list(outputs[0])), {}


def transpose(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    swapped = list(names)
    if names:
        a, b = node.args[1:3] if len(node.args) > 1 else (0, -1)
        swapped[a], swapped[b] = names[b], names[a]
    return write([names], [swapped])


def permute(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    return write([names], [[names[dim] for dim in node.args[1]]])


def unsqueeze(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    at = node.args[1] % (len(names) + 1)
    return write([names], [[*names[:at], "1", *names[at:]]])


def squeeze(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    shape = inputs[0]
    given = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    dims = {dim % len(shape) for dim in (given if isinstance(given, (list, tuple)) else [given])} if shape else set()
    names = ["1" if size == 1 else f"d{i}" for i, size in enumerate(shape)]
    return write([names], [[name for i, name in enumerate(names) if not (i in dims and shape[i] == 1)]])


def _dim_argument(node: Node, index: int, rank: int) -> int:
    value = node.args[index] if len(node.args) > index else node.kwargs.get("dim", 0)
    return int(value) % rank


def whole_along(index: int) -> Annotate:
    """Same dimensions in and out, but the one named by argument `index` is never split and may change its size."""

    def annotate(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
        names = dim_names(inputs[0])
        dim = _dim_argument(node, index, len(names))
        return write(
            [[*names[:dim], f"i{i}^", *names[dim + 1 :]] for i in range(len(inputs))],
            [[*names[:dim], f"o{i}^", *names[dim + 1 :]] for i in range(len(outputs))],
        )

    return annotate


def select(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """One place of a dimension (`select`), or each in an output of its own (`unbind`)."""
    names = dim_names(inputs[0])
    dim = _dim_argument(node, 1, len(names))
    rest = [*names[:dim], *names[dim + 1 :]]
    return write([[*names[:dim], names[dim] + "^", *names[dim + 1 :]]], [rest] * len(outputs))


def stack(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = _dim_argument(node, 1, len(names) + 1)
    return write([names] * len(inputs), [[*names[:dim], str(len(inputs)), *names[dim:]]])


def pad(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`constant_pad_nd` pads the last dimensions: those stay whole."""
    names = dim_names(inputs[0])
    keep = len(names) - len(node.args[1]) // 2
    source, target = ([f"{side}{k}^" for k in range(keep, len(names))] for side in "io")
    return write([[*names[:keep], *source]], [[*names[:keep], *target]])


def repeat(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A dimension that is new or repeated more than once stays whole."""
    times = node.args[1]
    new = len(times) - len(inputs[0])
    names = dim_names(inputs[0])
    source = [name if count == 1 else f"{name}^" for name, count in zip(names, times[new:])]
    target = [f"o{k}^" if k < new or times[k] != 1 else names[k - new] for k in range(len(times))]
    return write([source], [target])


def repeat_interleave(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = _dim_argument(node, 2, len(names))
    return write([names], [[*names[:dim], f"({names[dim]} r^)", *names[dim + 1 :]]])


def whole(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Never split."""
    return write([["*^"]] * len(inputs), [["*^"]] * len(outputs))


family(
    "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int",
    regroup,
    saves=save_nothing,
    alias=True,
    localize=to_local_shape,
)
family("expand.default", broadcast, saves=save_nothing, alias=True, localize=to_local_shape)
family("transpose.int t.default", transpose, saves=save_nothing, alias=True)
family("permute.default", permute, saves=save_nothing, alias=True)
family("unsqueeze.default", unsqueeze, saves=save_nothing, alias=True)
# A dimension of which a device holds one element must not be squeezed there: sizes are given instead.
family("squeeze.default squeeze.dim squeeze.dims", squeeze, saves=save_nothing, alias=True, localize=to_local_shape)
family("alias.default detach.default", broadcast, saves=save_nothing, alias=True)
family("slice.Tensor narrow.default", whole_along(1), saves=save_nothing, alias=True)
family(
    "split.Tensor split_with_sizes.default split.sizes chunk.default", whole_along(2), saves=save_nothing, alias=True
)
family("select.int unbind.int", select, saves=save_nothing, alias=True)
family("cat.default", whole_along(1), saves=save_nothing)
family("stack.default", stack, saves=save_nothing)
family("constant_pad_nd.default", pad, saves=save_nothing)
family("repeat.default", repeat, saves=save_nothing)
family("repeat_interleave.self_int", repeat_interleave, saves=save_nothing)
family("flip.default roll.default", whole, saves=save_nothing)
