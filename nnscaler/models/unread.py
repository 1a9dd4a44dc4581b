"""Tensors that are somewhere else, and what torch's functions make of them, without reading more than is asked for.

transformers describes how files become parameters by functions of whole tensors: it stacks the experts' weights, joins
gate and rest, transposes. Here the same functions get `Unread` tensors, and make other ones, of which a rank reads its
own box. Functions that are not known here are computed of whole tensors, when their result is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnscaler.shards import Box

Read = Callable[[Box], Tensor]


class Unread:
    """A tensor of `shape` whose parts `read(box)` gives. `dtype` is its type, as its source spells it."""

    def __init__(self, shape: Sequence[int], dtype: Any, read: Read) -> None:
        self.shape, self.dtype, self.read = torch.Size(shape), dtype, read
        self.ndim = len(self.shape)

    def whole(self) -> Tensor:
        return self.read(Box((0,) * self.ndim, tuple(self.shape)))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def shaped(self, shape: Sequence[int]) -> Unread:
        """The same elements in the same order, in another shape."""
        return self if self.shape == torch.Size(shape) else _shaped(self, tuple(shape))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return partial(_call, getattr(torch.Tensor, name), self)

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else _call(torch.Tensor.__getitem__, self, index)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, *args, **(kwargs or {}))


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of torch gives for arguments of which some are unread."""
    name = getattr(function, "__name__", "")
    on_meta = pytree.tree_map(lambda x: torch.empty(x.shape, device="meta") if isinstance(x, Unread) else x, args)
    keywords = pytree.tree_map(lambda x: torch.empty(x.shape, device="meta") if isinstance(x, Unread) else x, kwargs)
    results = function(*on_meta, **keywords)
    if not isinstance(results, (Tensor, tuple, list)):
        return results
    several = [results] if isinstance(results, Tensor) else results
    dtype = next(x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Unread))
    reads = _KNOWN.get(name, _of_wholes)(function, args, kwargs, several)
    found = [Unread(result.shape, dtype, read) for result, read in zip(several, reads)]
    return found[0] if isinstance(results, Tensor) else type(results)(found)


def _of_wholes(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    def read(index: int, box: Box) -> Tensor:
        wholes, keywords = pytree.tree_map(lambda x: x.whole() if isinstance(x, Unread) else x, (args, kwargs))
        found = function(*wholes, **keywords)
        return (found if isinstance(found, Tensor) else found[index])[box.slices]

    return [partial(read, index) for index in range(len(results))]


def _same(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    return [args[0].read]


def _stacked(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    parts, dim = args[0], _dim(args, kwargs, results[0].dim())

    def read(box: Box) -> Tensor:
        inner = _without(box, dim)
        return torch.stack([part.read(inner) for part in parts[box.slices[dim]]], dim)

    return [read]


def _joined(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    parts, dim = args[0], _dim(args, kwargs, results[0].dim())

    def read(box: Box) -> Tensor:
        found, at = [], 0
        for part in parts:
            begin = max(box.offsets[dim], at)
            end = min(box.offsets[dim] + box.sizes[dim], at + part.shape[dim])
            if begin < end:
                found.append(part.read(_along(box, dim, begin - at, end - begin)))
            at += part.shape[dim]
        return torch.cat(found, dim)

    return [read]


def _divided(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    source, dim = args[0], _dim(args, kwargs, results[0].dim(), 2)
    begins = [sum(result.shape[dim] for result in results[:index]) for index in range(len(results))]

    def read(begin: int, box: Box) -> Tensor:
        return source.read(_along(box, dim, box.offsets[dim] + begin, box.sizes[dim]))

    return [partial(read, begin) for begin in begins]


def _transposed(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    source, rank = args[0], results[0].dim()
    one, other = (_dim(args, kwargs, rank, place, name) for place, name in ((1, "dim0"), (2, "dim1")))

    def read(box: Box) -> Tensor:
        order = list(range(rank))
        order[one], order[other] = other, one
        inner = Box(tuple(box.offsets[dim] for dim in order), tuple(box.sizes[dim] for dim in order))
        return source.read(inner).transpose(one, other)

    return [read]


def _squeezed(function: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Read]:
    source = args[0]
    dim = _dim(args, kwargs, source.ndim)
    if source.shape[dim] != 1:
        return [source.read]

    def read(box: Box) -> Tensor:
        inner = Box((*box.offsets[:dim], 0, *box.offsets[dim:]), (*box.sizes[:dim], 1, *box.sizes[dim:]))
        return source.read(inner).squeeze(dim)

    return [read]


_KNOWN: dict[str, Callable[[Any, Any, Any, Sequence[Tensor]], list[Read]]] = {
    "contiguous": _same, "stack": _stacked, "cat": _joined, "chunk": _divided, "split": _divided,
    "transpose": _transposed, "squeeze": _squeezed,
}  # fmt: skip


def _shaped(source: Unread, shape: tuple[int, ...]) -> Unread:
    """Where one dimension becomes two, boxes are read one slice of the outer after the other."""
    same = next((i for i, (a, b) in enumerate(zip(source.shape, shape)) if a != b), source.ndim - 1)
    two = 0 < source.ndim == len(shape) - 1 and shape[same + 2 :] == tuple(source.shape[same + 1 :])

    def read(box: Box) -> Tensor:
        if not two:
            return source.whole().reshape(shape)[box.slices]
        inner = _without(box, same)
        begin, length = inner.offsets[same], inner.sizes[same]
        outer = range(box.offsets[same], box.offsets[same] + box.sizes[same])
        rows = [source.read(_along(inner, same, number * shape[same + 1] + begin, length)) for number in outer]
        return torch.stack(rows, same)

    assert prod(shape) == source.shape.numel(), (source.shape, shape)
    return Unread(shape, source.dtype, read)


def _dim(args: Any, kwargs: Any, rank: int, place: int = 1, name: str = "dim") -> int:
    """The dimension that a call names by its place or keyword; the first by default."""
    return int(kwargs.get(name, args[place] if len(args) > place else 0)) % rank


def _along(box: Box, dim: int, offset: int, size: int) -> Box:
    """The box with another range along a dimension."""
    return Box(
        (*box.offsets[:dim], offset, *box.offsets[dim + 1 :]),
        (*box.sizes[:dim], size, *box.sizes[dim + 1 :]),
    )


def _without(box: Box, dim: int) -> Box:
    return Box((*box.offsets[:dim], *box.offsets[dim + 1 :]), (*box.sizes[:dim], *box.sizes[dim + 1 :]))
