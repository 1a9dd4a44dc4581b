"""Gradients summed over ranks and micro-batches in buckets that cut parameters anywhere, against plain sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime import buckets
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import Bucket, GradientReducer, make_buckets
from nnscaler.shards import ParameterSpec
from tests.launch import run

SHAPES = {"a": (40, 30), "norm": (7,), "b": (3, 100), "c": (300,), "d": (64, 11)}


def sums_of_gradients(elements: int, world: int, once: bool) -> list[float]:
    """Two steps of three micro-batches of random gradients, of which `b` gets one in the first micro-batch alone, in
    the second step none; `d`'s come in two parts.

    The differences from plain sums, that of the whole gradient's norm included: what lies between parameters counts in
    it.
    """
    torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with NaN
    rank = dist.get_rank() if world > 1 else 0
    axes = Axes(Mesh((1,), world), torch.device("cpu"))
    specs = {name: ParameterSpec(shape, torch.float32, (SHARED,), True, once) for name, shape in SHAPES.items()}
    made, parameters = make_buckets(specs, axes, {name: len(shape) > 1 for name, shape in SHAPES.items()}, elements)
    reducer = GradientReducer(made, parameters, micro_batches=3)
    differences = []
    for step in range(2):
        wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for micro_batch in range(3):
            generator = torch.Generator().manual_seed(3 * step + micro_batch)
            given = {name: torch.randn(world, *shape, generator=generator) for name, shape in SHAPES.items()}
            if micro_batch or step:
                del given["b"]
            loss = torch.stack([(parameters[name] * values[rank]).sum() for name, values in given.items()]).sum()
            loss.backward()
            reducer.defer(parameters["d"], None, 2 * given["d"][rank])
            reducer.end_micro_batch()
            for name, values in given.items():
                wanted[name] += values.sum(0) * (3 if name == "d" else 1)
        reducer.finish()
        differences.append(difference_from(wanted, made, world))
    return differences


def difference_from(wanted: dict[str, torch.Tensor], made: list[Bucket], world: int) -> float:
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for bucket in made:
        for part in bucket.owned_parts():
            found[part.name][part.box.slices] = bucket.gradient[part.start : part.stop].view(part.box.sizes)
    squares = torch.stack([bucket.gradient.square().sum() for bucket in made]).sum()
    if world > 1:
        for value in [*found.values(), squares]:
            dist.all_reduce(value)
    norm = torch.cat([value.flatten() for value in wanted.values()]).norm()
    differences = [(found[name] - wanted[name]).abs().max() for name in SHAPES]
    return float(torch.stack([*differences, (squares.sqrt() - norm).abs()]).max())


def all_sums(world: int) -> list[float]:
    ways = product((128, 700, 10**6), (False, True))
    return [difference for elements, once in ways for difference in sums_of_gradients(elements, world, once)]


@pytest.mark.parametrize("world", [1, 2])
def test_every_gradient_arrives_once(world):
    for differences in run(world, all_sums, world):
        assert all(difference < 1e-4 for difference in differences)


def sends(once: bool) -> list[tuple[int, bool]]:
    """(micro-batch, whether backward still went on) of all that is sent in the second of two steps."""
    axes = Axes(Mesh((1,), dist.get_world_size()), torch.device("cpu"))
    specs = {name: ParameterSpec((128,), torch.float32, (SHARED,), True, once) for name in "ab"}
    made, parameters = make_buckets(specs, axes, dict.fromkeys(specs, True), 128)
    reducer = GradientReducer(made, parameters, micro_batches=3)
    found, exchange, place = [], buckets.reduce_scatter_single, (0, 0, False)

    def record(*args, **options):
        found.append(place)
        return exchange(*args, **options)

    buckets.reduce_scatter_single = record
    for step, micro_batch in product(range(2), range(3)):
        place = step, micro_batch, True
        torch.stack([parameter.sum() for parameter in parameters.values()]).sum().backward()
        place = step, micro_batch, False
        reducer.end_micro_batch()
        if micro_batch == 2:
            reducer.finish()
    return [place[1:] for place in found if place[0] == 1]


def test_gradients_are_sent_while_backward_goes_on():
    for found in run(2, sends, False):
        assert found == [(micro_batch, True) for micro_batch in range(3) for _ in "ab"]
    for found in run(2, sends, True):
        assert found == [(2, True)] * 2, "in the last micro-batch alone"
