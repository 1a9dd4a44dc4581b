"""The language of annotations: which dimensions of an operator's tensors belong together, and which may be split.

    b l d^, n^ d^, b l -> b l

Tensors are separated by commas, and `->` stands between inputs and outputs. Each dimension of a tensor is one of

    name       an identifier; the same name has the same size everywhere. It may be split over devices.
    name^      is never split; one `^` holds for the name wherever it occurs
    name+      may be split although some output lacks it: each device then computes a term of a sum
    (a b)      is made of several names, the first the outermost; only the outermost can be split
    12         has exactly this size, and is never split
    *          any number of dimensions, the same in each tensor that has a `*`; `*^` is never split

A tensor without dimensions is `()`. A tensor that is `?` is never split: each device gets all of it.

To split a name over devices means: tensors that have the name are sharded along that dimension; inputs without it are
whole on each device; outputs without it (allowed for `name+` only) are partial sums. In the example, splitting `b`
shards the first input, the third, and the output; the second input, a weight, is whole on each device.

After a `|` may stand names that can also be split together, even frozen ones: `... -> t d^ | t n`. No tensor has two of
them; each is sharded along the one that it has. Only a function of the operator's own can compute that, for its devices
need each other's parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import NoReturn

from nnscaler.errors import UserError
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Placement, Shard

Shape = tuple[int, ...]

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<number>\d+)|(?P<mark>->|[,()?*^+|]))")


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: the product of its names, the first the outermost; or a fixed size, without names."""

    names: tuple[str, ...]
    size: int | None = None

    def __str__(self) -> str:
        if self.size is not None:
            return str(self.size)
        return self.names[0] if len(self.names) == 1 else f"({' '.join(self.names)})"


Tensor = tuple[Dim, ...] | None  # None is `?`


@dataclass(frozen=True)
class Split:
    """One way to run an operator on the devices of a mesh axis.

    name             the annotated name that is split; None: nothing is. Names split together have spaces between
    inputs, outputs  the placement of each tensor that follows
    """

    name: str | None
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]

    @property
    def names(self) -> list[str]:
        return (self.name or "").split()


@dataclass(frozen=True)
class Annotation:
    """A parsed annotation; `bind` matches it to shapes.

    frozen  names that are never split (`^`)
    summed  names that may be split although an output lacks them (`+`)
    """

    text: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    frozen: frozenset[str]
    summed: frozenset[str]
    together: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Annotation:
        """Parses `text`. Raises UserError, with the position, for a syntax error."""
        return _parse(text)

    def bind(self, input_shapes: Sequence[Shape | None], output_shapes: Sequence[Shape]) -> Bound:
        """Matches the annotation to concrete shapes.

        input_shapes   a shape for each tensor input, in the order of the arguments; None: the argument is absent
        output_shapes  a shape for each output

        Raises UserError, with the tensor and the dimension, where a shape does not fit.
        """
        if len(input_shapes) != len(self.inputs) or len(output_shapes) != len(self.outputs):
            raise UserError(
                f"annotation '{self.text}' describes {len(self.inputs)} inputs and {len(self.outputs)} outputs; "
                f"the operator has {len(input_shapes)} and {len(output_shapes)}"
            )
        where = [f"input {i}" for i in range(len(input_shapes))] + [f"output {i}" for i in range(len(output_shapes))]
        shapes = [*input_shapes, *output_shapes]
        stars = self._star_length(shapes, where)
        tensors = [self._expand(tensor, stars) for tensor in (*self.inputs, *self.outputs)]
        sizes: dict[str, int] = {}
        frozen = set(self.frozen)
        if "*" in frozen:
            frozen.update(_star_names(stars))
        for tensor, shape, place in zip(tensors, shapes, where):
            if tensor is not None and shape is not None and len(tensor) != len(shape):
                raise UserError(
                    f"annotation '{self.text}': {place} has {len(shape)} dimensions {list(shape)}, "
                    f"annotated are {len(tensor)}: '{' '.join(map(str, tensor))}'"
                )
        dims = [
            (dim, size, f"dimension {i} of {place}")
            for tensor, shape, place in zip(tensors, shapes, where)
            if tensor is not None and shape is not None
            for i, (dim, size) in enumerate(zip(tensor, shape))
        ]
        self._solve(dims, sizes)
        n = len(self.inputs)
        return Bound(self, tuple(tensors[:n]), tuple(tensors[n:]), sizes, frozenset(frozen))

    def _star_length(self, shapes: list[Shape | None], where: list[str]) -> int:
        for tensor, shape, place in zip((*self.inputs, *self.outputs), shapes, where):
            if tensor is not None and shape is not None and _STAR in tensor:
                length = len(shape) - len(tensor) + 1
                if length < 0:
                    raise UserError(
                        f"annotation '{self.text}': {place} has {len(shape)} dimensions {list(shape)}, "
                        f"annotated are at least {len(tensor) - 1}"
                    )
                return length
        return 0

    @staticmethod
    def _expand(tensor: Tensor, stars: int) -> Tensor:
        if tensor is None or _STAR not in tensor:
            return tensor
        at = tensor.index(_STAR)
        return (*tensor[:at], *(Dim((name,)) for name in _star_names(stars)), *tensor[at + 1 :])

    def _solve(self, dims: list[tuple[Dim, int, str]], sizes: dict[str, int]) -> None:
        """Finds the size of each name. A group `(a b)` gives the size of its one unknown name."""
        pending = dims
        while pending:
            later = []
            for dim, size, place in pending:
                if dim.size is not None:
                    if dim.size != size:
                        raise UserError(f"annotation '{self.text}': {place} is {size}, annotated is {dim.size}")
                    continue
                unknown = [name for name in dim.names if name not in sizes]
                known = prod(sizes[name] for name in dim.names if name in sizes)
                if len(unknown) > 1:
                    later.append((dim, size, place))
                elif len(unknown) == 1 and known and size % known == 0:
                    sizes[unknown[0]] = size // known
                elif unknown or known != size:
                    raise UserError(f"annotation '{self.text}': {place} is {size}, but '{dim}' is {known} elsewhere")
            if len(later) == len(pending):
                # Nothing tells the names of these groups apart: the outermost takes all of it.
                dim, size, _ = later[0]
                unknown = [name for name in dim.names if name not in sizes]
                for name in unknown[1:]:
                    sizes[name] = 1
            pending = later


_STAR = Dim(("*",))


def _star_names(count: int) -> list[str]:
    return [f"*{i}" for i in range(count)]


@dataclass(frozen=True)
class Bound:
    """An annotation that is matched to the shapes of one operator call.

    sizes   name -> its size
    frozen  names that are never split, those behind a `*` included
    """

    annotation: Annotation
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sizes: dict[str, int]
    frozen: frozenset[str]

    def split(self, name: str | None) -> Split | None:
        """The way to run the operator with `name` split over an axis (None: nothing is). None where it cannot be
        split."""
        if name is None:
            return Split(None, (REPLICATE,) * len(self.inputs), (REPLICATE,) * len(self.outputs))
        if name in self.frozen or self.sizes[name] == 1:
            return None
        inputs = [self._place(tensor, name, SHARED) for tensor in self.inputs]
        outputs = [self._place(tensor, name, PARTIAL) for tensor in self.outputs]
        if not any(isinstance(placement, Shard) for placement in inputs) or None in inputs or None in outputs:
            return None
        if PARTIAL in outputs and name not in self.annotation.summed:
            return None
        return Split(name, tuple(inputs), tuple(outputs))  # type: ignore[arg-type]

    def split_together(self) -> Split | None:
        """The placements when all names after `|` are split, each where it stands; None if they cannot be."""
        names = self.annotation.together
        if not names or any(self.sizes[name] == 1 for name in names):
            return None

        def place(tensor: Tensor, absent: Placement) -> Placement | None:
            own = next((name for name in names for dim in tensor or () if name in dim.names), None)
            return absent if own is None else self._place(tensor, own, absent)

        inputs = [place(tensor, SHARED) for tensor in self.inputs]
        outputs = [place(tensor, PARTIAL) for tensor in self.outputs]
        if None in inputs or not all(isinstance(placement, Shard) for placement in outputs):
            return None
        return Split(" ".join(names), tuple(inputs), tuple(outputs))  # type: ignore[arg-type]

    def splits(self, devices: int) -> list[Split]:
        """All ways to run the operator on an axis of `devices` devices.

        The first splits nothing. The others split one name each, in the order in which names are written, if its size
        is a multiple of `devices`; the last splits the names after `|`. With `devices` = 1, every name that may be
        split is there.
        """
        ways = [self.split(None)]
        ways += [self.split(name) for name, size in self.sizes.items() if size % devices == 0]
        if all(self.sizes[name] % devices == 0 for name in self.annotation.together):
            ways.append(self.split_together())
        return [way for way in ways if way is not None]

    def _place(self, tensor: Tensor, name: str, absent: Placement) -> Placement | None:
        """Shard(dim) where `name` is outermost in dimension `dim`; `absent` where no dimension has it; None where it
        is further in."""
        for dim, parts in enumerate(tensor or ()):
            if name in parts.names:
                outer = parts.names[: parts.names.index(name)]
                return Shard(dim) if all(self.sizes[part] == 1 for part in outer) else None
        return absent


@cache
def _parse(text: str) -> Annotation:
    parser = _Parser(text)
    inputs = parser.tensors()
    parser.expect("->", "'->' between inputs and outputs")
    outputs = parser.tensors()
    together = parser.together()
    parser.expect("", "the end")
    return _checked(Annotation(text, inputs, outputs, frozenset(parser.frozen), frozenset(parser.summed), together))


def _checked(annotation: Annotation) -> Annotation:
    text = annotation.text
    names = [[name for dim in tensor or () for name in dim.names] for tensor in annotation.inputs]
    out_names = [[name for dim in tensor or () for name in dim.names] for tensor in annotation.outputs]
    for tensor_names in (*names, *out_names):
        repeated = next((name for name in tensor_names if tensor_names.count(name) > 1), None)
        if repeated is not None:
            raise UserError(f"annotation '{text}': '{repeated}' stands twice in one tensor; names must differ there")
    for name in dict.fromkeys(name for tensor_names in names for name in tensor_names):
        everywhere = all(name in tensor_names for tensor_names in out_names)
        marked = name in annotation.frozen or name in annotation.summed
        if not everywhere and not marked and None not in annotation.outputs:
            raise UserError(
                f"annotation '{text}': '{name}' is missing in an output; "
                f"mark it '{name}^' (never split) or '{name}+' (devices compute terms of a sum)"
            )
    # A name of outputs alone (a new tensor's size) cannot be split: no input says which part is a device's own.
    inputs_have = {name for tensor_names in names for name in tensor_names}
    made = {name for tensor_names in out_names for name in tensor_names} - inputs_have
    for name in annotation.together:
        if name not in inputs_have:
            raise UserError(f"annotation '{text}': '{name}' stands after '|', but in no input")
    for tensor_names in (*names, *out_names):
        several = [name for name in annotation.together if name in tensor_names]
        if len(several) > 1:
            raise UserError(f"annotation '{text}': {' and '.join(several)} stand after '|', and in one tensor")
    return replace(annotation, frozen=annotation.frozen | made)


class _Parser:
    """Recursive descent over the tokens of one annotation."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.frozen: set[str] = set()
        self.summed: set[str] = set()
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        end = len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                at = len(text) - len(text[at:].lstrip())
                self.fail(f"unexpected {text[at]!r}", at)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.tokens.append(("mark", "", len(text)))
        self.index = 0

    def fail(self, message: str, at: int) -> NoReturn:
        raise UserError(f"annotation '{self.text}': {message} at position {at}")

    def expect(self, value: str, description: str) -> None:
        _, found, at = self.tokens[self.index]
        if found != value:
            self.fail(f"expected {description}, found {found!r}" if found else f"expected {description}", at)
        self.index += 1

    def tensors(self) -> tuple[Tensor, ...]:
        if self.tokens[self.index][1] == "->":
            return ()  # an operator without tensor inputs
        found = [self.tensor()]
        while self.tokens[self.index][1] == ",":
            self.index += 1
            found.append(self.tensor())
        return tuple(found)

    def together(self) -> tuple[str, ...]:
        """The names after `|`, if there are any."""
        if self.tokens[self.index][1] != "|":
            return ()
        self.index += 1
        names = []
        while self.tokens[self.index][0] == "name":
            names.append(self.name())
        if len(names) < 2:
            self.fail("expected two names or more after '|'", self.tokens[self.index][2])
        return tuple(names)

    def tensor(self) -> Tensor:
        if self.tokens[self.index][1] == "?":
            self.index += 1
            return None
        if [token[1] for token in self.tokens[self.index : self.index + 2]] == ["(", ")"]:
            self.index += 2
            return ()
        dims: list[Dim] = []
        while True:
            kind, value, at = self.tokens[self.index]
            if kind == "number":
                self.index += 1
                dims.append(Dim((), int(value)))
            elif kind == "name" or value == "*":
                if value == "*" and _STAR in dims:
                    self.fail("a second '*' in one tensor", at)
                dims.append(Dim((self.name(),)))
            elif value == "(":
                dims.append(self.group())
            else:
                break
        if not dims:
            kind, value, at = self.tokens[self.index]
            self.fail(f"expected a tensor ('()' has no dimensions), found {value!r}", at)
        return tuple(dims)

    def group(self) -> Dim:
        start = self.tokens[self.index][2]
        self.index += 1
        names = []
        while self.tokens[self.index][0] == "name":
            names.append(self.name())
        if not names:
            self.fail("expected a name inside '('", start + 1)
        self.expect(")", "a name or ')'")
        return Dim(tuple(names))

    def name(self) -> str:
        _, name, at = self.tokens[self.index]
        self.index += 1
        mark = self.tokens[self.index][1]
        if mark in ("^", "+"):
            if mark == "+" and name == "*":
                self.fail("'*' cannot be summed", at)
            (self.frozen if mark == "^" else self.summed).add(name)
            self.index += 1
        return name
