"""Operators that rearrange or rename elements and compute nothing: views, permutations, slices, concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node, TensorMeta
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.pointwise import broadcast
from nnscaler.operators.reduce import along_dim, dims_of
from nnscaler.operators.registry import Annotate, arguments, family, save_nothing
from nnscaler.operators.spelling import FUNCTION, METHOD, WHOLE_SIZE, Text, WrittenCall, sizes


def regroup(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A reshape: both shapes are written by their common factors, such as `(a b) c -> a (b c)`."""
    source, target = inputs[0], outputs[0]
    atoms = _common_factors(source, target)
    if atoms is None:
        return write([[f"i{k}^" for k in range(len(source))]], [[f"o{k}^" for k in range(len(target))]])
    return write([_over_atoms(source, atoms)], [_over_atoms(target, atoms)])


def _common_factors(source: Shape, target: Shape) -> list[int] | None:
    """Sizes whose running products, from the right, include those of both shapes. None where there are none."""
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


def transpose(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    swapped = list(names)
    if names:
        given = arguments(node)
        a, b = given.get("dim0", 0), given.get("dim1", -1)
        swapped[a], swapped[b] = names[b], names[a]
    return write([names], [swapped])


def permute(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    return write([names], [[names[dim] for dim in arguments(node)["dims"]]])


def movedim(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    given = arguments(node)
    ends = [given[name] for name in ("source", "destination")]
    source, target = ([d % len(names) for d in (end if isinstance(end, (list, tuple)) else [end])] for end in ends)
    moved = {to: names[at] for at, to in zip(source, target)}
    others = iter([name for i, name in enumerate(names) if i not in source])
    return write([names], [[moved[i] if i in moved else next(others) for i in range(len(names))]])


def unsqueeze(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    at = arguments(node)["dim"] % (len(names) + 1)
    return write([names], [[*names[:at], "1", *names[at:]]])


def squeeze(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    shape = inputs[0]
    dims = dims_of(node, len(shape))
    names = ["1" if size == 1 else f"d{i}" for i, size in enumerate(shape)]
    return write([names], [[name for i, name in enumerate(names) if not (i in dims and shape[i] == 1)]])


def select(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """One place of a dimension (`select`), or each place in an output of its own (`unbind`)."""
    names = dim_names(inputs[0])
    dim = arguments(node)["dim"] % len(names)
    rest = [*names[:dim], *names[dim + 1 :]]
    return write([[*names[:dim], names[dim] + "^", *names[dim + 1 :]]], [rest] * len(outputs))


def stack(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = arguments(node)["dim"] % (len(names) + 1)
    return write([names] * len(inputs), [[*names[:dim], str(len(inputs)), *names[dim:]]])


def pad(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Padding: a dimension that is padded stays whole. `pad` has two numbers for each dimension, the last dimension
    first."""
    names = dim_names(inputs[0])
    given = arguments(node)["pad"]
    padded = {len(names) - 1 - i // 2 for i, count in enumerate(given) if count}
    source, target = ([f"{side}{k}^" if k in padded else names[k] for k in range(len(names))] for side in "io")
    return write([source], [target])


def saves_padded(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    return [] if arguments(node)["mode"] == "constant" else node.inputs


def select_scatter(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`self`, in which one place of a dimension is `src`."""
    names = dim_names(inputs[0])
    dim = arguments(node)["dim"] % len(names)
    whole = [*names[:dim], f"{names[dim]}^", *names[dim + 1 :]]
    return write([whole, [*names[:dim], *names[dim + 1 :]]], [whole])


def repeat(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A dimension that is new, or repeated more than once, stays whole."""
    times = arguments(node)["repeats"]
    new = len(times) - len(inputs[0])
    names = dim_names(inputs[0])
    source = [name if count == 1 else f"{name}^" for name, count in zip(names, times[new:])]
    target = [f"o{k}^" if k < new or times[k] != 1 else names[k - new] for k in range(len(times))]
    return write([source], [target])


def repeat_interleave(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dim = arguments(node)["dim"]
    if dim is None:  # of all elements in one row
        return write([names], [[f"({' '.join(names)} r^)"]])
    dim %= len(names)
    return write([names], [[*names[:dim], f"({names[dim]} r^)", *names[dim + 1 :]]])


def along_dims(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """The same dimensions in and out. Those that the argument `dims` names stay whole; all, where it is not given."""
    names = dim_names(inputs[0])
    given = arguments(node)["dims"]
    whole = {dim % len(names) for dim in given} if given else set(range(len(names)))
    dims = [f"{name}^" if i in whole else name for i, name in enumerate(names)]
    return write([dims], [dims])


def joined(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """As `along_dim`. Among tensors of any rank may be some of shape [0], which PyTorch passes over."""
    names = dim_names(outputs[0])
    (whole,) = dims_of(node, len(names))

    def tensor(own: str) -> list[str]:
        return [f"{own}^" if i == whole else name for i, name in enumerate(names)]

    empty = [len(shape) != len(names) for shape in inputs]
    return write([["?"] if none else tensor(f"i{k}") for k, none in enumerate(empty)], [tensor("o")])


def triangle(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(inputs[0])
    dims = [*names[:-2], *(f"{name}^" for name in names[-2:])]
    return write([dims], [dims])


def permute_text(call: WrittenCall) -> str:
    return f"{call['self']}.permute({', '.join(map(str, call.value('dims')))})"


def slice_text(call: WrittenCall) -> str:
    dim, start, end, step = (call.value(name) for name in ("dim", "start", "end", "step"))
    begin = "" if not start else str(start)
    stop = "" if end is None or end == WHOLE_SIZE else str(end)
    stride = "" if step == 1 else f":{step}"
    lead = ":, " * dim if dim >= 0 else "..., "
    trail = ", :" * (-dim - 1) if dim < 0 else ""
    return f"{call['self']}[{lead}{begin}:{stop}{stride}{trail}]"


def complex_view(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """The real tensor has one more dimension, of real and imaginary parts."""
    names = dim_names(min(inputs[0], outputs[0], key=len))
    texts = [[*names, "2"] if len(shape) > len(names) else names for shape in (inputs[0], outputs[0])]
    return write(texts[:1], texts[1:])


def views(names: str, annotate: Annotate, text: Text = METHOD) -> None:
    """Adds operators that show the elements of their input in another way, without a copy."""
    family(names, annotate, text, saves=save_nothing, alias=True)


views("view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int", regroup, sizes("reshape"))
views("expand.default expand_as.default", broadcast, sizes("expand"))
views("transpose.int t.default", transpose)
views("permute.default", permute, permute_text)
views("movedim.int movedim.intlist", movedim)
views("unsqueeze.default", unsqueeze)
# A dimension of which a device holds one element must not be squeezed there: sizes are given instead.
views("squeeze.default squeeze.dim squeeze.dims", squeeze, sizes("reshape"))
views("slice.Tensor", along_dim, slice_text)
views("narrow.default chunk.default", along_dim)
views("split.Tensor split.sizes", along_dim, "{self}.split({split_size}, **)")
views("view_as_complex.default view_as_real.default", complex_view, FUNCTION)
views("split_with_sizes.default", along_dim, "{self}.split({split_sizes}, **)")
views("select.int unbind.int", select)
family("cat.default", joined, FUNCTION, saves=save_nothing)
family("stack.default", stack, FUNCTION, saves=save_nothing)
family("constant_pad_nd.default", pad, "F.pad({self}, {pad}, **)", saves=save_nothing)
family("pad.default", pad, "F.pad(*)", saves=saves_padded)
family("slice_scatter.default", along_dim, FUNCTION, saves=save_nothing)
family("select_scatter.default", select_scatter, FUNCTION, saves=save_nothing)
family("repeat.default", repeat, saves=save_nothing)
family("repeat_interleave.self_int", repeat_interleave, saves=save_nothing)
family("flip.default roll.default", along_dims, saves=save_nothing)
family("tril.default triu.default", triangle, saves=save_nothing)
