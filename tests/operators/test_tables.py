"""For every operator in the tables: its text on the shards that its annotation names, put together, is the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnscaler.annotation import Split
from nnscaler.graph import TensorMeta
from nnscaler.operators import bind, operator_of
from nnscaler.placement import PARTIAL, Placement, Replicate, Shard, local_shape
from tests.operators.calls import gradients, node_of, run, run_text
from tests.operators.samples import known, samples

# Sizes of the samples' dimensions, all even, and how many devices divide them.
SETTINGS = [((4, 2, 6, 4), 2), ((2, 6, 4, 6), 2), ((6, 4, 2, 6), 3)]


def _shards(whole: Tensor, placement: Placement, devices: int) -> list[Tensor]:
    return list(whole.chunk(devices, placement.dim)) if isinstance(placement, Shard) else [whole] * devices


def _together(parts: list[Tensor], placement: Placement) -> Tensor:
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    if placement == PARTIAL or placement == Replicate(partial_grad=True):
        return torch.stack(parts).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], equal_nan=True)
    return parts[0]


def check(op: str, args: tuple, kwargs: dict, devices: int) -> int:
    """Compares every split with the whole run; returns how many there were."""
    node, block, tensors = node_of(op, args, kwargs)
    wholes = run(node, tensors)
    incoming = [torch.randn_like(whole) if whole.requires_grad else whole for whole in wholes]
    wanted = gradients(wholes, tensors, incoming)
    # Along some names a function of its own is called, with the other devices (see test_collectives).
    ways = [way for way in bind(node, block).splits(devices) if way.name not in operator_of(node).along]

    def message(way: Split):
        call = f"{op}({node.args}, {node.kwargs}) split along {way.name} ({way.inputs} -> {way.outputs})"
        return lambda why: f"{call}: {why}"

    for way in ways:
        shards = [_shards(tensor.detach(), place, devices) for tensor, place in zip(tensors, way.inputs)]
        metas = [_local(block.tensors[name], place, devices) for name, place in zip(node.outputs, way.outputs)]
        given = [_shards(gradient, place, devices) for gradient, place in zip(incoming, way.outputs)]
        outputs, found = [], []
        for device in range(devices):
            local = [part[device].clone().requires_grad_(t.requires_grad) for part, t in zip(shards, tensors)]
            results = run_text(node, local, metas, {way.name: devices} if way.name else None)
            assert [tuple(result.shape) for result in results] == [meta.shape for meta in metas]
            outputs.append([result.detach() for result in results])
            found.append(gradients(results, local, [parts[device] for parts in given]))

        def same(parts: list[Tensor], place: Placement, whole: Tensor, way=way) -> None:
            torch.testing.assert_close(
                _together(parts, place), whole.detach(), rtol=1e-6, atol=1e-6, equal_nan=True, msg=message(way)
            )

        for whole, place, parts in zip(wholes, way.outputs, zip(*outputs)):
            same(list(parts), place, whole)
        places = [place for place, tensor in zip(way.inputs, tensors) if tensor.requires_grad]
        for whole, place, parts in zip(wanted, places, zip(*found)):
            assert all((part is None) == (whole is None) for part in parts)
            if whole is not None:
                same(list(parts), place, whole)
    return len(ways) - 1


def _local(meta: TensorMeta, place: Placement, devices: int) -> TensorMeta:
    return replace(meta, shape=local_shape(meta.shape, (place,), (devices,)))


@pytest.mark.parametrize("op", known())
def test_shards_put_together_equal_the_whole(op):
    torch.manual_seed(0)
    for sizes, devices in SETTINGS:
        for args, kwargs in samples(*sizes)[op]:
            check(op, args, kwargs, devices)


def test_every_operator_has_a_sample():
    without = [op for op in known() if not samples(2, 2, 2, 2).get(op)]
    assert without == [
        "aten.empty.memory_format",
        "aten.empty_like.default",
        "aten.new_empty.default",
    ]  # whose values are anything


SPLIT_SOMEHOW = [
    "aten.linear.default", "aten.add.Tensor", "aten.view.default", "attention", "aten.cross_entropy_loss.default",
    "aten.embedding.default", "aten.layer_norm.default", "aten.index.Tensor", "aten.where.ScalarOther", "experts",
]  # fmt: skip


@pytest.mark.parametrize("op", ["linear", "addmm", "baddbmm"])
def test_a_product_with_a_bias_can_be_split_along_what_is_summed(op):
    for args, kwargs in samples(4, 4, 4, 4)[f"aten.{op}.default"]:
        node, block, _ = node_of(f"aten.{op}.default", args, kwargs)
        assert bind(node, block).split("k") is not None


@pytest.mark.parametrize("op", SPLIT_SOMEHOW)
def test_operators_that_matter_can_be_split(op):
    assert max(check(op, args, kwargs, 2) for args, kwargs in samples(4, 4, 4, 4)[op]) >= 1
