"""For every operator in the tables: its text on the shards that its annotation names, put together, is the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnscaler.annotation import Split
from nnscaler.graph import TensorMeta
from nnscaler.operators import bind, operator_of
from nnscaler.operators.verify import Example
from nnscaler.placement import Placement, local_shape
from tests.operators.calls import node_of, run, run_text
from tests.operators.samples import known, samples

# Sizes of the samples' dimensions, all even, and how many devices divide them.
SETTINGS = [((4, 2, 6, 4), 2), ((2, 6, 4, 6), 2), ((6, 4, 2, 6), 3)]


def check(op: str, args: tuple, kwargs: dict, devices: int) -> int:
    """Compares every split with the whole run; returns how many there were."""
    node, block, tensors = node_of(op, args, kwargs)

    def compute(split: Split, devices: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        metas = [_local(block.tensors[name], place, devices) for name, place in zip(node.outputs, split.outputs)]
        return run_text(node, inputs, metas, {split.name: devices} if split.name else None)

    example = Example(node, tensors, run(node, tensors), compute)
    # Along some names a function of its own is called, with the other devices (see test_collectives).
    ways = [way for way in example.bound.splits(devices) if way.name not in operator_of(node).along]
    for way in ways:
        wrong = [
            f"{op}({node.args}, {node.kwargs}) split along {way.name} ({way.inputs} -> {way.outputs}): {one}"
            for one in example.wrong(way, devices)
        ]
        assert not wrong, wrong
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
