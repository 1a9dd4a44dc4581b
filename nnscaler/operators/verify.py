"""Trying whether an annotation is true: every split that it allows is computed as devices would, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnscaler.annotation import Bound, Split
from nnscaler.errors import UserError, told_briefly
from nnscaler.graph import Block, Node, Ref, TensorMeta, map_refs
from nnscaler.operators.registry import Operator, bind
from nnscaler.placement import PARTIAL, Placement, Replicate, Shard, local_shape

# How far from the whole a split's results may be, as a part of the whole's largest element: sums in another order.
# Among tensors of several types, all are as exact as the least exact of them.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Compute = Callable[[Split, int, Sequence[Tensor]], list[Tensor]]  # (split, devices, a device's inputs) -> its results


@told_briefly
def verify_op(
    function: Callable[..., Any], example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Tries every split that a registered operator's annotation allows, forward and backward, in this process.

        @nnscaler.register_op("row column^ -> row column^")
        def softmax(x): return x.softmax(-1)

        assert nnscaler.verify_op(softmax, (torch.randn(4, 6),)) == ["row"]

    For each split, the example is divided as it would be among devices: as many as the smallest number that divides
    the name's size. The function is called with each part, and its results and gradients are put together as the
    annotation says: shards are joined, and terms added. That must be what the function makes of the whole example, but
    for rounding.

    function      what `register_op` returned
    example_args  an example of its arguments, and `example_kwargs` of those by keyword. Tensors have values, best
                  random ones, on any device. Every name that may be split has a size of 2 or more in them

    Returns the names along which splits were tried; all of them are right. Not tried are names in `along` of
    `register_op`, whose function talks to other devices.

    Raises UserError, a ValueError, with a line for each split that fails; where a name that may be split has size 1 in
    the example; and where the function is not registered, its annotation does not fit the example, it writes into its
    arguments, or it gives something else when it is called again.
    """
    operator = getattr(function, "operator", None)
    if not isinstance(operator, Operator):
        raise UserError(
            f"{getattr(function, '__name__', function)} is no registered operator; see nnscaler.register_op"
        )
    called: Callable[..., Any] = operator.function  # type: ignore[assignment]
    node, tensors = node_of(operator.name, example_args, example_kwargs or {})
    what = f"operator '{operator.name}'"

    def compute(split: Split | None, devices: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        return _results(what, called, node, inputs)

    versions = [tensor._version for tensor in tensors]
    example = Example(node, tensors, compute(None, 1, tensors), compute)
    written = [index for index, tensor in enumerate(tensors) if tensor._version != versions[index]]
    if written:
        raise UserError(f"{what} writes into its input {written[0]}; it must leave its arguments as they are")
    if any(example.wrong(example.whole, 1)):
        raise UserError(f"{what} gives something else when it is called again with the same arguments")
    tried, wrong = [], []
    for name in example.bound.sizes:
        split, devices = _split_of(example.bound, name)
        if split is None or name in operator.along:
            continue
        if devices == 1:
            wrong.append(f"{what}: '{name}' has size 1 in the example, and cannot be tried; take an example with more")
            continue
        tried.append(name)
        wrong += [f"{what} split along '{name}' over {devices} devices: {one}" for one in example.wrong(split, devices)]
    if wrong:
        raise UserError("\n".join(wrong))
    return tried


def can_have_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def node_of(
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    needs_gradient: Callable[[Tensor], bool] = can_have_gradient,
) -> tuple[Node, list[Tensor]]:
    """A call of an operator as a node without results, and copies of its tensors, in order."""
    tensors: list[Tensor] = []

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.detach().clone().requires_grad_(needs_gradient(value)))
            return Ref(f"t{len(tensors) - 1}")
        if isinstance(value, Mapping):
            return {key: take(item) for key, item in value.items()}
        return type(value)(map(take, value)) if type(value) in (list, tuple) else value

    return Node("out", op, take(tuple(args)), take(dict(kwargs)), ()), tensors


class Example:
    """A call of an operator with values, and what it gives where nothing is split.

    node, block  the call, with the shapes and types of its tensors
    bound        its annotation, matched to them; `whole`: the split that splits nothing
    """

    def __init__(self, node: Node, tensors: Sequence[Tensor], results: Sequence[Tensor], compute: Compute) -> None:
        self.node = replace(node, outputs=tuple(f"out{i}" for i in range(len(results))))
        named = [*zip(self.node.inputs, tensors), *zip(self.node.outputs, results)]
        self.block = Block("example", "Example", {name: meta_of(tensor) for name, tensor in named})
        self.bound = bind(self.node, self.block)
        self.whole = Split(None, (Replicate(),) * len(tensors), (Replicate(),) * len(results))
        self._tensors, self._results, self._compute = tensors, results, compute
        self._incoming = [torch.randn_like(one) if one.requires_grad else one for one in results]
        self._gradients = gradients(results, tensors, self._incoming)
        self._tolerance = max(_TOLERANCE.get(one.dtype, 0.0) for one in (*tensors, *results))

    def wrong(self, split: Split, devices: int) -> Iterator[str]:
        """What is not as the split says, in lines."""
        given = [_shards(tensor.detach(), place, devices) for tensor, place in zip(self._tensors, split.inputs)]
        incoming = [_shards(tensor, place, devices) for tensor, place in zip(self._incoming, split.outputs)]
        shapes = [local_shape(one.shape, (place,), (devices,)) for one, place in zip(self._results, split.outputs)]
        made: list[list[Tensor]] = []
        found: list[list[Tensor | None]] = []
        for device in range(devices):
            inputs = [part[device].requires_grad_(one.requires_grad) for part, one in zip(given, self._tensors)]
            try:
                results = self._compute(split, devices, inputs)
                if [tuple(result.shape) for result in results] != shapes:
                    shown = ", ".join(str(list(result.shape)) for result in results)
                    wanted = ", ".join(str(list(shape)) for shape in shapes)
                    yield f"device {device} gives {shown}; by the annotation it is {wanted}"
                    return
                found.append(gradients(results, inputs, [parts[device] for parts in incoming]))
            except Exception as error:
                first = (str(error).strip() or "no message").splitlines()[0]
                yield f"device {device} raises {type(error).__name__}: {first}"
                return
            made.append([result.detach() for result in results])
        for index, (place, whole) in enumerate(zip(split.outputs, self._results)):
            yield from _compared(
                f"output {index}", [parts[index] for parts in made], place, whole.detach(), self._tolerance
            )
        able = [index for index, tensor in enumerate(self._tensors) if tensor.requires_grad]
        for index, whole_gradient, *parts in zip(able, self._gradients, *found):
            yield from _compared(
                f"the gradient of input {index}", parts, split.inputs[index], whole_gradient, self._tolerance
            )


def _results(what: str, function: Callable[..., Any], node: Node, tensors: Sequence[Tensor]) -> list[Tensor]:
    remaining = iter(tensors)
    args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(remaining))
    value = function(*args, **kwargs)
    results = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(one, Tensor) for one in results):
        kind, within = type(value).__name__, isinstance(value, (list, tuple))
        kind = f"a {kind} with something else than tensors" if within else f"a {kind}"
        raise UserError(f"{what} returns {kind}; it must return a tensor, or a tuple or list of tensors")
    return results


def _split_of(bound: Bound, name: str) -> tuple[Split | None, int]:
    """The split along a name, and over how many devices: the smallest number that divides its size. Where that is 1:
    the split that there would be with a larger size."""
    size = bound.sizes[name]
    if size == 1:
        return replace(bound, sizes={**bound.sizes, name: 2}).split(name), 1
    return bound.split(name), next((count for count in range(2, size + 1) if size % count == 0), 1)


def meta_of(tensor: Tensor) -> TensorMeta:
    """The shape and type of a tensor."""
    return TensorMeta(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def gradients(results: Sequence[Tensor], tensors: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of the tensors that need one, for `given` gradients of the results that have one."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    ends = [(result, gradient) for result, gradient in zip(results, given) if result.requires_grad]
    if not wanted or not ends:
        return [None] * len(wanted)
    return list(torch.autograd.grad([r for r, _ in ends], wanted, [g for _, g in ends], allow_unused=True))


def _shards(whole: Tensor, placement: Placement, devices: int) -> list[Tensor]:
    """What each device has of a tensor, contiguous and of its own."""
    parts = whole.chunk(devices, placement.dim) if isinstance(placement, Shard) else [whole] * devices
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _compared(
    what: str, parts: Sequence[Tensor | None], place: Placement, whole: Tensor | None, tolerance: float
) -> Iterator[str]:
    present = [part for part in parts if part is not None]
    if len(present) not in ((0,) if whole is None else (len(parts),)):
        yield f"{what} is missing {'on a device' if whole is not None else 'for the whole'}"
    elif whole is not None:
        distance = _distance(present, place, whole)
        if distance > (tolerance if whole.dtype in _TOLERANCE else 0.0):
            yield f"{what} differs from that of the whole by {distance:.2g} of its largest element"


def _distance(parts: Sequence[Tensor], place: Placement, whole: Tensor) -> float:
    """By how much the parts, put together as a placement says, differ from the whole, as a part of its largest
    element."""
    if isinstance(place, Shard):
        together = [torch.cat(list(parts), place.dim)]
    elif place == PARTIAL or place == Replicate(partial_grad=True):
        together = [torch.stack(list(parts)).sum(0, dtype=whole.dtype)]
    else:
        together = list(parts)  # each is the whole
    return max(_relative(one, whole) for one in together)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if bool(same.all()):
        return 0.0
    exact = torch.complex128 if wanted.is_complex() else torch.float64
    difference = torch.where(same, 0.0, (found.to(exact) - wanted.to(exact)).abs())
    largest = wanted.to(exact).abs().nan_to_num(0.0, 0.0, 0.0).max()
    return float((difference / largest if largest > 0 else difference).nan_to_num(float("inf")).max())
