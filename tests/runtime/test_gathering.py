"""Gradients of weights that are gathered from shards travel in fp32, whatever the weights' type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.kernels import fp8
from nnscaler.mesh import Mesh
from nnscaler.runtime import collectives, gathering
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.gathering import Gathers
from tests.launch import run


def gradients_of_a_shard() -> list[list[float]]:
    """The gradient that arrives at this rank's half of a bf16 weight, along each dimension."""
    axes, found = Axes(Mesh((2,)), torch.device("cpu")), []

    def arrived(parameter, work, gradient):
        if work is not None:
            work.wait()
        found.append(gradient.flatten().tolist())

    for dim in (0, 1):
        gathers = Gathers(arrived)
        shape = (2, 4) if dim == 0 else (4, 2)
        shard = torch.full(shape, float(axes.rank), dtype=torch.bfloat16, requires_grad=True)
        whole = gathers.weight(shard, (axes[0], dim))
        assert [part.float().mean().item() for part in whole.chunk(2, dim)] == [0.0, 1.0]
        (whole * (1.0 if axes.rank == 0 else 2.0**-9)).sum().backward()
    return found


def test_a_term_that_bf16_would_round_away_arrives():
    for found in run(2, gradients_of_a_shard):
        assert found == [[1 + 2.0**-9] * 8] * 2


def gathered_masters() -> list[bool]:
    """Of fp32 shards, along each dimension: whether the weight is in bf16 and rounded, whether what is sent lies in the
    buffer that is received into, and whether the shard keeps what rounding takes."""
    axes, found, sent = Axes(Mesh((2,)), torch.device("cpu")), [], []
    gather = collectives.all_gather_single

    def record(result, shard, **options):
        sent.append(result.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr())
        return gather(result, shard, **options)

    collectives.all_gather_single = record
    for dim in (0, 1):
        parts = torch.rand((2, 2, 4), generator=torch.Generator().manual_seed(dim))
        shard = parts[axes.rank].clone().requires_grad_()
        whole = Gathers(lambda *gradient: None).weight(shard, (axes[0], dim), dtype=torch.bfloat16)
        wanted = torch.cat(list(parts.bfloat16()), dim)
        found += [whole.dtype == torch.bfloat16 and torch.equal(whole, wanted), torch.equal(shard, parts[axes.rank])]
    return found + sent


def test_a_master_weight_is_cast_into_the_buffer_of_its_gather():
    for found in run(2, gathered_masters):
        assert found == [True] * 6


class Rounding:
    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole

    def scale(self, parameter: torch.Tensor) -> torch.Tensor:
        return fp8.scale_of(self.whole)

    def rounded(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return fp8.round_by(parameter.detach().to(dtype), self.scale(parameter))


def gathered_in_fp8(dtype: torch.dtype) -> list[bool]:
    """Of shards in this type, along each dimension: whether bytes are sent, whether what is gathered is the whole
    weight rounded, whether backward finds the same again, and whether the gradient of this rank's shard arrives."""
    axes, found, sent = Axes(Mesh((2,)), torch.device("cpu")), [], []
    gather = collectives.all_gather_single

    def record(result, shard, **options):
        sent.append((shard.dtype, shard.numel()))
        return gather(result, shard, **options)

    def arrived(parameter, work, gradient):
        work.wait()
        found.append(torch.equal(gradient, 2 * (numbers.chunk(2, dim)[axes.rank] + 1.0)))

    collectives.all_gather_single = record
    for dim in (0, 1):
        numbers = torch.arange(32.0).view(4, 8)
        whole = (numbers - 9).bfloat16()
        shard = whole.chunk(2, dim)[axes.rank].to(dtype, copy=True).requires_grad_()
        gathers = Gathers(arrived, rounding=Rounding(whole))
        weight = gathers.weight_in_fp8(shard, (axes[0], dim), dtype=torch.bfloat16, again=True)
        wanted = fp8.round_by(whole, fp8.scale_of(whole)).float()
        found += [weight.rows.is_contiguous(), torch.equal(weight.rows.float(), wanted)]
        found += [weight.scale == 22 / 448, weight.value.dtype == torch.bfloat16, gathers.holds(weight.value)]
        packed = gathers.pack(weight.rows.t())
        found += [not isinstance(packed, torch.Tensor), torch.equal(gathers.unpack(packed).float(), wanted.t())]
        (weight.value * (numbers + 1)).sum().backward()
    return [*found, sent == [(torch.uint8, 16)] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_gathered_in_fp8_as_it_would_be_rounded_whole(dtype):
    for found in run(2, gathered_in_fp8, dtype):
        assert found == [True] * 17


def test_no_weight_is_gathered_before_its_update(monkeypatch):
    """In the first micro-batch one after the other, then early, and once more in backward."""
    happened = []

    def start_gather(shard, axis, dtype=None):
        happened.append(("gather", names[shard.data_ptr()]))
        return torch.cat([shard, shard]), None

    monkeypatch.setattr(gathering, "start_gather", start_gather)
    monkeypatch.setattr(gathering, "finish_gather", lambda whole, work, dim: whole)
    monkeypatch.setattr(
        gathering, "start_gradient_scatter", lambda gradient, axis, dim, sums: (gradient.chunk(2)[0], None)
    )
    shards = [torch.ones(2, 4, requires_grad=True) for _ in range(3)]
    names = {shard.data_ptr(): index for index, shard in enumerate(shards)}
    gathers = Gathers(lambda *given: None, lambda shard: happened.append(("wait", names[shard.data_ptr()])))
    axis = SimpleNamespace(size=2)
    for _ in range(2):
        gathers.begin()
        with gathers.hooks():
            x = torch.ones(4, 4, requires_grad=True)
            for shard in shards:
                x = x * gathers.weight(shard, (axis, 0), again=True)
        x.sum().backward()
    gathered = [name for what, name in happened if what == "gather"]
    assert sorted(gathered) == sorted([0, 1, 2] * 4)
    assert happened == [(what, name) for name in gathered for what in ("wait", "gather")]


def test_as_many_weights_are_gathered_early_as_there_is_room_for(monkeypatch):
    """Each takes 64 bytes whole, and in bf16 32. Once the order is another one, it is learned anew."""
    happened = []

    def start_gather(shard, axis, dtype=None):
        happened.append(f"gather {shard[0, 0].item():.0f}")
        return torch.cat([shard, shard]), None

    monkeypatch.setattr(gathering, "start_gather", start_gather)
    monkeypatch.setattr(gathering, "finish_gather", lambda whole, work, dim: whole)
    monkeypatch.setattr(gathering, "PREFETCH_BYTES", 2 * 64)
    shards = [torch.full((2, 4), float(index)) for index in range(4)]
    axis = SimpleNamespace(size=2)

    def micro_batch(order: list[int], dtype: torch.dtype = torch.float32) -> list[str]:
        happened.clear()
        gathers.begin()
        for index in order:
            whole = gathers.weight(shards[index], (axis, 0), dtype=dtype)
            assert whole.eq(index).all()
            happened.append(f"use {index}")
        return [step.replace("gather ", "") for step in happened]

    one_by_one = ["0", "use 0", "1", "use 1", "2", "use 2", "3", "use 3"]
    gathers = Gathers(lambda *given: None)
    assert micro_batch([0, 1, 2, 3]) == one_by_one
    assert micro_batch([0, 1, 2, 3]) == ["0", "1", "2", "use 0", "3", "use 1", "use 2", "use 3"]
    assert micro_batch([0, 2, 1, 3]) == ["0", "1", "2", "use 0", "2", "use 2", "1", "use 1", "3", "use 3"]
    assert micro_batch([0, 2]) == ["0", "2", "1", "use 0", "3", "use 2"]
    assert micro_batch([0, 2]) == ["0", "2", "use 0", "use 2"], "what was not used is not gathered again"
    gathers = Gathers(lambda *given: None)
    micro_batch([0, 1, 2, 3], torch.bfloat16)
    assert micro_batch([0, 1, 2, 3], torch.bfloat16)[:5] == ["0", "1", "2", "3", "use 0"]


def test_a_gathered_weight_has_the_shards_of_every_axis():
    shard = torch.zeros(2, 3, requires_grad=True)
    along = ((Axis(2, 0, None), 0), (Axis(3, 1, None), 1))
    assert gathering._Sharded(shard, along, torch.bfloat16).bytes == 6 * (2 * 3) * 2
    assert gathering._Sharded(shard, along, torch.bfloat16, Rounding(shard)).bytes == 6 * (2 * 3)


@pytest.mark.parametrize("again", [False, True])
def test_what_autograd_keeps_of_a_gathered_weight(again, monkeypatch):
    """The weight, or how it is gathered once more: once for all that lies in it, while that lives."""
    gathered = []

    def start_gather(shard, axis, dtype=None):
        gathered.append(shard)
        return torch.cat([shard, shard]), None

    monkeypatch.setattr(gathering, "start_gather", start_gather)
    monkeypatch.setattr(gathering, "finish_gather", lambda whole, work, dim: whole)
    gathers = Gathers(lambda *given: None)
    gathers.begin()
    way = {"again": True} if again else {}
    whole = gathers.weight(torch.arange(8.0).view(2, 4), (SimpleNamespace(size=2), 0), **way)
    views, other = [whole, whole[1:3], whole.t()], torch.zeros(3)
    assert gathers.holds(whole[1:])
    assert not gathers.holds(other)
    assert gathers.pack(other) is other
    kept = [gathers.pack(view) for view in views]
    assert [isinstance(packed, torch.Tensor) for packed in kept] == [not again] * 3
    found = [gathers.unpack(packed) for packed in kept]
    assert all(torch.equal(mine, view) for mine, view in zip(found, views))
    assert len({view.untyped_storage().data_ptr() for view in found}) == 1
    assert len(gathered) == (2 if again else 1)
    del whole, views, found
    if again:
        assert gathers.unpack(kept[0]).sum() == 56
        assert len(gathered) == 3
