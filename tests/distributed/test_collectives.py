"""Every collective, forward and backward, against the dense result on one process."""

from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nnscaler.kernels.random import draws_of, numbers_of, place_of
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard
from nnscaler.reshard import reshards
from nnscaler.runtime import collectives
from nnscaler.runtime.attention import attention_along_l
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.axis import Axis
from tests.kernels.attention import written_out
from tests.launch import run

SHAPE = (4, 8, 12)
PLACES = [Shard(0), Shard(1), Shard(2), REPLICATE, SHARED, PARTIAL]


def _whole(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _terms(whole: torch.Tensor, size: int, seed: int) -> list[torch.Tensor]:
    """Random tensors that add up to `whole`."""
    generator = torch.Generator().manual_seed(seed)
    terms = [torch.randn(whole.shape, generator=generator, dtype=whole.dtype) for _ in range(size - 1)]
    return [*terms, whole - sum(terms)]


def _local(whole: torch.Tensor, layout, axes: Axes, seed: int) -> torch.Tensor:
    """This rank's part of `whole` in a layout; terms of sums are random."""
    for number, place in enumerate(layout):
        axis = axes[number]
        if isinstance(place, Shard):
            whole = whole.chunk(axis.size, place.dim)[axis.rank]
        elif place == PARTIAL:
            whole = _terms(whole, axis.size, seed + number)[axis.rank]
    return whole.clone()


def _gradient_layout(layout):
    """How a tensor's gradient lies: partial where the tensor is shared, whole where the tensor is a term of a sum."""
    return tuple(PARTIAL if place == SHARED else REPLICATE if place == PARTIAL else place for place in layout)


def _sum_of_terms(local: torch.Tensor, layout, axes: Axes) -> torch.Tensor:
    """Adds up the terms of the partial axes."""
    for number, place in enumerate(layout):
        if place == PARTIAL and axes[number].group is not None:
            local = local.clone()
            dist.all_reduce(local, group=axes[number].group)
    return local


def _call(x: torch.Tensor, step, axes: Axes) -> torch.Tensor:
    forward, backward = step.collectives
    axis = axes[step.axis]
    dim = step.source.dim if isinstance(step.source, Shard) else getattr(step.target, "dim", None)
    if forward == "identity":
        return collectives.share(x, axis) if backward == "all_reduce" else collectives.divide(x, axis)
    if forward == "all_reduce":
        return collectives.all_reduce(x, axis, backward)
    if forward == "all_to_all":
        return collectives.all_to_all(x, axis, step.source.dim, step.target.dim)
    if forward == "reduce_scatter":
        return collectives.reduce_scatter(x, axis, dim)
    return {"slice": collectives.slice_, "all_gather": collectives.all_gather}[forward](x, axis, dim, backward)


def check_all_pairs(sizes: tuple[int, ...]) -> int:
    """Reshards between every two layouts and compares values and gradients with slices of the whole tensor."""
    axes = Axes(Mesh(sizes), torch.device("cpu"))
    checked = 0
    layouts = [()]
    for _ in sizes:
        layouts = [(*layout, place) for layout in layouts for place in PLACES]
    for source in layouts:
        for target in layouts:
            steps = reshards(source, target)
            if steps is None:
                continue
            try:
                x = _local(_whole(0), source, axes, seed=1).requires_grad_()
            except (IndexError, RuntimeError):
                continue
            y = x
            for step in steps:
                y = _call(y, step, axes)
            found = _sum_of_terms(y.detach(), target, axes)
            wanted = _local(_whole(0), tuple(REPLICATE if place == PARTIAL else place for place in target), axes, 0)
            where = f"{source} -> {target}"
            assert found.shape == wanted.shape, where
            assert (found - wanted).abs().max() < 1e-9, where
            gradient = _gradient_layout(target)
            y.backward(_local(_whole(5), gradient, axes, seed=6))
            found = _sum_of_terms(x.grad, _gradient_layout(source), axes)
            expected = tuple(REPLICATE if place == PARTIAL else place for place in _gradient_layout(source))
            wanted = _local(_whole(5), expected, axes, 0)
            assert (found - wanted).abs().max() < 1e-9, f"gradient of {where}"
            checked += 1
    return checked


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
def test_resharding_between_all_layouts(sizes):
    world = 1
    for size in sizes:
        world *= size
    counts = run(world, check_all_pairs, sizes)
    assert min(counts) >= 25 ** len(sizes)


OPTIONS = [
    {},
    {"is_causal": False},
    {"window": (5, None)},
    {"window": (20, None), "softcap": 0.8, "sinks": True},
    {"window": (3, 6), "is_causal": False, "slopes": True},
    {"documents": True, "window": (9, None), "slopes": True, "sinks": True, "scale": 0.3},
    {"dropout": 0.3},
    {"dropout": 0.3, "documents": True, "window": (9, None)},
]


def attention_of_shards(length: int, sizes: tuple[int, ...]) -> None:
    """Attention split along the sequence over the mesh's first axis, and over heads over the second; or along the
    sequence over both: values and gradients are slices of the whole's."""
    axes = Axes(Mesh(sizes), torch.device("cpu"))
    check_attention_of_shards(length, axes[0], axes[1] if len(sizes) > 1 else Axis(1, 0, None))
    if len(sizes) > 1:
        assert axes.devices.rank == dist.get_rank()
        check_attention_of_shards(length, axes.devices, Axis(1, 0, None))


def check_attention_of_shards(length: int, axis: Axis, over_heads: Axis) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 6), (2, 2, length, 6), (2, 2, length, 5), (4,), (4,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    gradient = torch.randn(2, length, 4, 5, generator=generator, dtype=torch.float64)
    numbers = numbers_of((2, 4, length, length))
    documents = torch.stack([(torch.arange(length) // 5), torch.arange(length).mul(3).sub(1).clamp(0, length)])

    def rows(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(axis.size, dim)[axis.rank]

    def heads(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(over_heads.size, dim)[over_heads.rank]

    for options in OPTIONS:
        given: dict[str, Any] = dict(options)
        own = {"sinks": tensors[3], "slopes": tensors[4], "documents": documents}
        given.update({name: tensor for name, tensor in own.items() if name in given})
        if "dropout" in given:
            given |= {"draws": draws_of(1, 2, 3), "place": place_of("attention", 0)}
        names = [name for name in ("sinks", "slopes") if name in given]
        whole = [*tensors[:3], *(given[name] for name in names)]
        wanted = written_out(*tensors[:3], **given)
        expected = torch.autograd.grad(wanted, whole, gradient)

        mine = [heads(x, 0 if x.dim() == 1 else 1).detach() for x in whole]
        mine = [x.requires_grad_() for x in [rows(mine[0], 2), *mine[1:]]]
        if "dropout" in given:
            given |= {"batches": numbers[0], "heads": heads(numbers[1], 0)}
        found = attention_along_l(axis, *mine[:3], **{**given, **dict(zip(names, mine[3:]))})
        torch.testing.assert_close(found, heads(rows(wanted, 1), 2))
        gradients = torch.autograd.grad(found, mine, heads(rows(gradient, 1), 2).contiguous())
        torch.testing.assert_close(gradients[0], heads(rows(expected[0], 2), 1))
        for part, right in zip((x.contiguous() for x in gradients[1:]), expected[1:]):
            dist.all_reduce(part, group=axis.group)
            torch.testing.assert_close(part, heads(right, 0 if right.dim() == 1 else 1))


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
def test_attention_along_the_sequence_and_over_heads(sizes):
    devices = prod(sizes)
    run(devices, attention_of_shards, 32 * devices, sizes)
    run(devices, attention_of_shards, 3 * devices, (devices,))  # an odd number of rows is not dealt out


OWNERS = [(0, 1, 2, 3, 3, 2, 1, 0), (3, 3, 2, 2, 1, 0, 1, 0), (0, 0, 0, 1, 2, 3, 3, 3, 1, 2, 1, 2)]


def pieces_there_and_back(owners: tuple[int, ...]) -> list[int]:
    """The places of a sequence of 48 that a rank gets."""
    axis = Axes(Mesh((4,)), torch.device("cpu"))[0]
    position = torch.arange(48, dtype=torch.float64).view(1, 48).chunk(4, 1)[axis.rank].contiguous().requires_grad_()
    mine = collectives.deal(position, axis, 1, owners)
    back = collectives.collect(mine, axis, 1, owners)
    assert torch.equal(back, position)
    (gradient,) = torch.autograd.grad(mine, position, mine.detach())
    assert torch.equal(gradient, position)
    return mine.int().flatten().tolist()


@pytest.mark.parametrize("owners", OWNERS, ids=str)
def test_pieces_travel_to_their_owners_and_back(owners):
    size = 48 // len(owners)
    for rank, places in enumerate(run(4, pieces_there_and_back, owners)):
        pieces = [piece for piece, owner in enumerate(owners) if owner == rank]
        assert places == [piece * size + i for piece in pieces for i in range(size)]
