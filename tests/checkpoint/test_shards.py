"""Flat ranges as boxes: every element once, in order, and few boxes."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.shards import Box, ParameterSpec, flat_range_boxes


@given(shape=st.lists(st.integers(1, 5), max_size=4), ends=st.tuples(st.integers(0, 700), st.integers(0, 700)))
def test_boxes_cover_a_flat_range_exactly_once_and_in_order(shape, ends):
    total = prod(shape)
    start, stop = sorted(end % (total + 1) for end in ends)
    whole = torch.arange(total).view(shape)
    covered, boxes = [], list(flat_range_boxes(tuple(shape), start, stop))
    for at, box in boxes:
        elements = whole[box.slices].flatten().tolist()
        assert elements[0] == at
        covered += elements
    assert covered == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_nested_shards_count_the_earlier_axis_outermost():
    spec = ParameterSpec((8, 6), torch.float32, (Shard(0), Shard(0)), True)
    boxes = [spec.box(Mesh((2, 2)), (i, j)).offsets for i in (0, 1) for j in (0, 1)]
    assert boxes == [(0, 0), (2, 0), (4, 0), (6, 0)]
    mixed = ParameterSpec((8, 6), torch.float32, (Shard(1), SHARED), True)
    assert mixed.box(Mesh((2, 2)), (1, 0)).offsets == (0, 3)
    assert ParameterSpec((8,), torch.float32, (REPLICATE,), False).box(Mesh((2,)), (1,)).sizes == (8,)
    uneven = ParameterSpec((12, 5), torch.float32, (Shard(0), Shard(0)), True)
    boxes = [uneven.box(Mesh((2, 3)), (i, j)) for i in range(2) for j in range(3)]
    assert boxes == [Box((at, 0), (2, 5)) for at in range(0, 12, 2)]
    crossed = ParameterSpec((12, 6), torch.float32, (Shard(1), REPLICATE, Shard(0)), True)
    assert crossed.box(Mesh((3, 5, 2)), (2, 4, 1)) == Box((6, 4), (6, 2))


def test_a_parameter_is_as_plan_json_says():
    """Its layout has a placement for each axis; each way to train it counts."""
    said = {"shape": [12, 5], "dtype": "bfloat16", "layout": "S(1),R*,S(0)", "trained": True}
    names = ("exchanged_once", "master_only", "gathered_in_fp8")
    for once, master, narrow in ((True, False, False), (False, True, False), (False, False, True)):
        found = ParameterSpec.from_json({**said, **dict(zip(names, (once, master, narrow)))})
        assert found == ParameterSpec((12, 5), torch.bfloat16, (Shard(1), SHARED, Shard(0)), True, once, master, narrow)
        assert found.stored_dtype == (torch.float32 if master else torch.bfloat16)
