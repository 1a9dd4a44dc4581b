"""Gradients summed over ranks and micro-batches in buckets that cut parameters anywhere, against plain sums."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
import torch.distributed as dist

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime import buckets, gradients
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import Bucket, GradientReducer, make_buckets, norms
from nnscaler.runtime.host import HostPool
from nnscaler.shards import ParameterSpec
from nnscaler.sums import IN_FP32, GradientSum, gradient_sum
from tests.launch import run

IN_BF16 = gradient_sum("bf16", 2, 8), gradient_sum("bf16", 2, 1)
SHAPES = {"a": (40, 30), "norm": (7,), "b": (3, 100), "c": (300,), "d": (64, 11)}


def sums_of_gradients(
    elements: int, world: int, once: bool, on_host: float = 0.0, sums: GradientSum = IN_FP32
) -> tuple[list[float], list[torch.Tensor]]:
    """Three steps of three micro-batches of random gradients, of which `b` gets one in the first micro-batch alone, in
    the second step none; `d`'s come in two parts. All sums are exact in bf16.

    on_host  bytes of gradients that are to lie on the host
    Returns the differences from plain sums, that of the whole gradient's norm included: what lies between parameters
    counts in it; and the gradients and norms of all buckets.
    """
    torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with NaN
    rank = dist.get_rank() if world > 1 else 0
    axes = Axes(Mesh((1,), world), torch.device("cpu"))
    specs = {name: ParameterSpec(shape, torch.float32, (SHARED,), True, once) for name, shape in SHAPES.items()}
    decays = {name: len(shape) > 1 for name, shape in SHAPES.items()}
    made, parameters = make_buckets(specs, axes, decays, elements, gradients_on_host=on_host)
    away = sum(bucket.gradient_bytes for bucket in made if bucket.on_host is not None)
    assert (away >= on_host) if on_host < 1e9 else all(bucket.on_host or not bucket.may_be_on_host for bucket in made)
    reducer = GradientReducer(made, parameters, 3, sums)
    differences, found = [], []
    for step in range(3):
        wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for micro_batch in range(3):
            generator = torch.Generator().manual_seed(3 * step + micro_batch)
            given = {
                name: torch.randint(-8, 9, (world, *shape), generator=generator) / 8 for name, shape in SHAPES.items()
            }
            if micro_batch or step == 1:
                del given["b"]
            loss = torch.stack([(parameters[name] * values[rank]).sum() for name, values in given.items()]).sum()
            loss.backward()
            reducer.defer(parameters["d"], None, 2 * given["d"][rank])
            reducer.end_micro_batch()
            for name, values in given.items():
                wanted[name] += values.sum(0) * (3 if name == "d" else 1)
        reducer.finish()
        differences.append(difference_from(wanted, made, world))
        found += [*(bucket.gradient.clone() for bucket in made), *norms(made)]
    return differences, found


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
    """The differences; those of gradients on the host are equal to the last bit."""
    gradients.GRADIENT_SLOTS = 2
    found = []
    for elements, once in product((128, 700, 10**6), (False, True)):
        differences, here = sums_of_gradients(elements, world, once)
        for on_host in (1500.0, 1e9) if world == 1 or not once else (1e9,):
            assert all(map(torch.equal, sums_of_gradients(elements, world, once, on_host)[1], here))
        for sums in IN_BF16 if world > 1 else ():
            buckets.MOST_IN_FLIGHT = 2
            assert all(map(torch.equal, sums_of_gradients(elements, world, once, 0.0, sums)[1], here))
        found += differences
    return found


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
    found, exchange, place = [], buckets.start_gradient_sum, (0, 0, False)

    def record(*args, **options):
        found.append(place)
        return exchange(*args, **options)

    buckets.start_gradient_sum = record
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


def test_gradients_on_the_host_come_and_go_once_a_micro_batch(monkeypatch):
    """In a step's first micro-batch none come; for the update they come once more. Buckets begin and end within
    parameters."""
    monkeypatch.setattr(gradients, "GRADIENT_SLOTS", 3)
    specs = {name: ParameterSpec((100,), torch.float32, (SHARED,), True, False) for name in "abcdefghij"}
    axes = Axes(Mesh((1,), 1), torch.device("cpu"))
    made, parameters = make_buckets(specs, axes, dict.fromkeys(specs, True), 128, gradients_on_host=1e9)
    reducer = GradientReducer(made, parameters, micro_batches=3)
    copies: Counter[str] = Counter()

    def counted(name, copy):
        def copying(*args, **options):
            copies[name] += 1
            copy(*args, **options)

        return copying

    for name in ("read", "write"):
        monkeypatch.setattr(HostPool, name, counted(name, getattr(HostPool, name)))
    for step, micro_batch in product(range(3), range(3)):
        for parameter in reversed(parameters.values()):
            parameter.sum().backward()
        reducer.end_micro_batch()
        if micro_batch == 2:
            reducer.finish()
            for bucket in made:
                bucket.gradient_here()
                bucket.on_host.leave()
            assert step == 0 or copies == {"read": 3 * len(made), "write": 3 * len(made)}
            copies.clear()
