"""For every operator in the tables: running it on the shards that its annotation names equals running it whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.operators import bind, operator_of
from nnscaler.placement import PARTIAL, Placement, Replicate, Shard, local_shape
from tests.operators.samples import known, samples

SIZES = st.sampled_from([2, 4, 6])


def _function(op: str):
    if not op.startswith("aten."):
        return operator_of(Node("", op, (), {}, ())).function
    _, name, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def _node(op: str, args: tuple, kwargs: dict) -> tuple[Node, Block, list[Tensor]]:
    """The call as a node of a block, and its tensor arguments in order."""
    block, tensors = Block("test", "Test"), []

    def take(value):
        if isinstance(value, Tensor):
            name = f"t{len(tensors)}"
            block.tensors[name] = TensorMeta(tuple(value.shape), value.dtype, value.is_floating_point())
            tensors.append(value)
            return Ref(name)
        return [take(item) for item in value] if isinstance(value, list) else value

    node = Node("out", op, tuple(take(arg) for arg in args), {key: take(arg) for key, arg in kwargs.items()}, ())
    return node, block, tensors


def _fill(value, tensors):
    """Arguments with tensors, taken in order, for refs."""
    if isinstance(value, Ref):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, tensors) for item in value)
    return value


def _run(node: Node, tensors: list[Tensor]) -> list[Tensor]:
    remaining = iter(tensors)
    args = _fill(node.args, remaining)
    kwargs = {key: _fill(value, remaining) for key, value in node.kwargs.items()}
    function = _function(node.op)
    if node.name == "localized" and not node.op.startswith("aten.expand"):
        function = torch.ops.aten.reshape.default  # what these are written as
    results = function(*args, **kwargs)
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _shards(whole: Tensor, placement: Placement, devices: int) -> list[Tensor]:
    return list(whole.chunk(devices, placement.dim)) if isinstance(placement, Shard) else [whole] * devices


def _together(parts: list[Tensor], placement: Placement) -> Tensor:
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    if placement == PARTIAL or placement == Replicate(partial_grad=True):
        return torch.stack(parts).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0])
    return parts[0]


def check(op: str, args: tuple, kwargs: dict, devices: int) -> int:
    """Compares every split with the whole run; returns how many there were."""
    torch.manual_seed(0)
    node, block, tensors = _node(op, args, kwargs)
    tensors = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    wholes = _run(node, tensors)
    node.outputs = tuple(f"out{i}" for i in range(len(wholes)))
    for name, whole in zip(node.outputs, wholes):
        block.tensors[name] = TensorMeta(tuple(whole.shape), whole.dtype, whole.requires_grad)
    differentiable = [i for i, whole in enumerate(wholes) if whole.requires_grad]
    incoming = {i: torch.randn_like(wholes[i]) for i in differentiable}
    sources = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = None
    if differentiable and sources:
        gradients = torch.autograd.grad(
            [wholes[i] for i in differentiable], sources, [incoming[i] for i in differentiable]
        )
    # Along some names a function of its own is called, with the other devices (see test_collectives).
    ways = [way for way in bind(node, block).splits(devices) if way.name not in operator_of(node).along]
    for way in ways:
        shards = [_shards(tensor.detach(), place, devices) for tensor, place in zip(tensors, way.inputs)]
        outputs, found = [], []
        for device in range(devices):
            local = [part[device].clone().requires_grad_(part[device].is_floating_point()) for part in shards]
            results = _run(_localized(node, way, block, devices), local)
            for name, place, result in zip(node.outputs, way.outputs, results):
                assert tuple(result.shape) == local_shape(block.tensors[name].shape, (place,), (devices,))
            outputs.append([result.detach() for result in results])
            if gradients is not None:
                given_back = [
                    _shards(incoming[i], way.outputs[i], devices)[device].to(results[i].dtype) for i in differentiable
                ]
                wanted = [tensor for tensor in local if tensor.requires_grad]
                found.append(torch.autograd.grad([results[i] for i in differentiable], wanted, given_back))
        for whole, place, parts in zip(wholes, way.outputs, zip(*outputs)):
            torch.testing.assert_close(_together(list(parts), place), whole.detach(), msg=_message(op, way))
        if gradients is not None:
            places = [place for place, tensor in zip(way.inputs, tensors) if tensor.requires_grad]
            for whole, place, parts in zip(gradients, places, zip(*found)):
                torch.testing.assert_close(_together(list(parts), place), whole, msg=_message(op, way))
    return len(ways) - 1


def _localized(node: Node, way, block: Block, devices: int) -> Node:
    localize = operator_of(node).localize
    if localize is None:
        return node
    inputs, outputs = (
        [local_shape(block.tensors[name].shape, (place,), (devices,)) for name, place in zip(names, places)]
        for names, places in ((node.inputs, way.inputs), (node.outputs, way.outputs))
    )
    args, kwargs = localize(node, inputs, outputs)
    return Node("localized", node.op, args, kwargs, node.outputs)


def _message(op, way):
    return lambda text: f"{op} split along {way.name} ({way.inputs} -> {way.outputs}): {text}"


@pytest.mark.parametrize("op", known())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(sizes=st.tuples(SIZES, SIZES, SIZES, SIZES), devices=st.sampled_from([2, 3]))
def test_shards_put_together_equal_the_whole(op, sizes, devices):
    for args, kwargs in samples(*sizes)[op]:
        check(op, args, kwargs, devices)


def test_every_operator_has_a_sample():
    assert [name for name in known() if name not in samples(2, 2, 2, 2)] == []


SPLIT_SOMEHOW = [
    "aten.linear.default",
    "aten.add.Tensor",
    "aten.view.default",
    "attention",
    "aten.cross_entropy_loss.default",
]


@pytest.mark.parametrize("op", SPLIT_SOMEHOW)
def test_operators_that_matter_can_be_split(op):
    assert max(check(op, args, kwargs, 2) for args, kwargs in samples(4, 4, 4, 4)[op]) >= 1
