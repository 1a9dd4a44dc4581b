"""Gradients summed over ranks in buckets that cut parameters anywhere, against plain sums."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import GradientReducer, make_buckets
from nnscaler.runtime.shards import ParameterSpec
from tests.launch import run

SHAPES = {"a": (40, 30), "norm": (7,), "b": (3, 5), "c": (300,), "d": (64, 11)}


def sums_of_gradients(elements: int) -> float:
    """Two micro-batches of random gradients, of which `b` gets one in the first alone; `d`'s come in two parts.

    The largest difference, that of the whole gradient's norm included: what lies between parameters counts in it.
    """
    torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with NaN
    rank, world = dist.get_rank(), dist.get_world_size()
    axes = Axes(Mesh((1,), world), torch.device("cpu"))
    specs = {name: ParameterSpec(shape, torch.float32, (SHARED,), True) for name, shape in SHAPES.items()}
    buckets, parameters = make_buckets(specs, axes, {name: len(shape) > 1 for name, shape in SHAPES.items()}, elements)
    reducer = GradientReducer(buckets, parameters)
    wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for micro_batch in range(2):
        generator = torch.Generator().manual_seed(micro_batch)
        given = {name: torch.randn(world, *shape, generator=generator) for name, shape in SHAPES.items()}
        if micro_batch:
            del given["b"]
        loss = torch.stack([(parameters[name] * values[rank]).sum() for name, values in given.items()]).sum()
        loss.backward()
        reducer.defer(parameters["d"], None, 2 * given["d"][rank])
        reducer.end_micro_batch()
        for name, values in given.items():
            wanted[name] += values.sum(0) * (3 if name == "d" else 1)
    reducer.finish()
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for bucket in buckets:
        for part in bucket.owned_parts():
            found[part.name][part.box.slices] = bucket.gradient[part.start : part.stop].view(part.box.sizes)
    for value in found.values():
        dist.all_reduce(value)
    squares = torch.stack([bucket.gradient.square().sum() for bucket in buckets]).sum()
    dist.all_reduce(squares)
    norm = torch.cat([value.flatten() for value in wanted.values()]).norm()
    differences = [(found[name] - wanted[name]).abs().max() for name in SHAPES]
    return float(torch.stack([*differences, (squares.sqrt() - norm).abs()]).max())


@pytest.mark.parametrize("elements", [128, 700, 10**6])
def test_every_gradient_arrives_once(elements):
    assert all(difference < 1e-4 for difference in run(2, sums_of_gradients, elements))
