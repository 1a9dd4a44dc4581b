"""How parameters lie in buckets, and what each of many owners has of them; without other processes."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED, Shard
from nnscaler.runtime import buckets as module
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.buckets import Bucket, GradientReducer, Slot, make_buckets, needed_last, norm_of, norms
from nnscaler.shards import Box, ParameterSpec

COPIES, DEVICES = 11, 2
SPECS = {
    "norm": ParameterSpec((7,), torch.float32, (SHARED,), True),
    "frozen": ParameterSpec((500,), torch.float32, (SHARED,), False),
    "rows": ParameterSpec((6, 45), torch.bfloat16, (Shard(0),), True),
    "table": ParameterSpec((3, 5, 14), torch.float32, (Shard(2),), True),
    "whole": ParameterSpec((13, 29), torch.float32, (SHARED,), True),
    "scalar": ParameterSpec((), torch.float32, (SHARED,), True),
}
DECAYS = {name: len(spec.shape) > 1 for name, spec in SPECS.items()}
COPIES_GROUP, ALL_GROUP = object(), object()


def axes_of(place: int, copy: int) -> Any:
    """Those of one rank of two devices in each of eleven copies."""

    def owners(layout: Any) -> Axis:
        if isinstance(layout[0], Shard):
            return Axis(COPIES, copy, COPIES_GROUP)  # type: ignore[arg-type]
        return Axis(COPIES * DEVICES, DEVICES * copy + place, ALL_GROUP)  # type: ignore[arg-type]

    mesh = Mesh((DEVICES,), COPIES)
    return SimpleNamespace(owners=owners, mesh=mesh, place=(place,), device=torch.device("cpu"))


@pytest.mark.parametrize("elements", [1, 200, 10**6])
def test_twenty_two_ranks_own_every_element_once(elements):
    wholes = {name: (torch.arange(1.0, 1 + prod(spec.shape)) % 251).view(spec.shape) for name, spec in SPECS.items()}
    owned = {name: torch.zeros(spec.shape) for name, spec in SPECS.items()}
    for place in range(DEVICES):
        for copy in range(COPIES):
            axes = axes_of(place, copy)
            made, parameters = make_buckets(SPECS, axes, DECAYS, elements)
            assert list(parameters) == ["norm", "rows", "table", "whole", "scalar"], "in the model's order"
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(wholes[name][SPECS[name].box(axes.mesh, axes.place).slices])
                    assert parameter.storage_offset() * parameter.itemsize % 256 == 0
            for bucket in made:
                assert len(bucket.flat) == bucket.owners.size * len(bucket.owned)
                assert torch.equal(bucket.flat[bucket.owned_range.start : bucket.owned_range.stop], bucket.owned)
                assert bucket.gradient.shape == bucket.owned.shape
                assert (bucket.gradient.dtype, bucket.on_host) == (torch.float32, None)
                for part in bucket.owned_parts():
                    part_of_whole = wholes[part.name][part.box.slices]
                    assert torch.equal(bucket.owned[part.start : part.stop], part_of_whole.flatten())
                    owned[part.name][part.box.slices] += 1
    trained = [name for name, spec in SPECS.items() if spec.trained]
    assert all(owned[name].eq(1).all() for name in trained)
    assert not owned["frozen"].any()


def test_what_lies_in_which_bucket():
    """Each kind in a buffer of its own, what decays first; of two that begin in a bucket, the earlier one counts."""
    specs = {
        "b": ParameterSpec((100,), torch.float32, (SHARED,), True),
        "m": ParameterSpec((5, 40), torch.float32, (SHARED,), True),
        "n": ParameterSpec((5, 40), torch.bfloat16, (SHARED,), True),
        "once": ParameterSpec((3, 3), torch.float32, (SHARED,), True, exchanged_once=True),
        "alone": ParameterSpec((2, 2), torch.bfloat16, (SHARED,), True),
        "master": ParameterSpec((3, 50), torch.bfloat16, (SHARED,), True, master_only=True),
        "sharded": ParameterSpec((4, 4), torch.float32, (Shard(1),), True),
    }
    decays = {name: len(spec.shape) > 1 for name, spec in specs.items()}
    axes = SimpleNamespace(
        owners=lambda layout: Axis(1, 0, None) if layout == (SHARED,) else Axis(3, 2, ALL_GROUP),  # type: ignore[arg-type]
        mesh=Mesh((2,), 1), place=(1,), device=torch.device("cpu"),
    )  # fmt: skip
    found = {}
    for summed in (True, False):
        made, _ = make_buckets(specs, axes, decays, 300, alone=("alone",), summed=summed)
        found[summed] = [
            ([(slot.name, slot.start) for slot in one.slots], len(one.flat), one.flat.dtype, one.gradient_dtype)
            for one in made
        ]
        assert [one.first for one in made] == [1, 0, 2, 3, 4, 6]
    fp32, bf16 = torch.float32, torch.bfloat16
    assert found[True] == [
        ([("m", 0), ("master", 256)], 320, fp32, fp32), ([("master", -64), ("b", 128)], 256, fp32, fp32),
        ([("n", 0)], 256, bf16, fp32), ([("once", 0)], 64, fp32, fp32), ([("alone", 0)], 64, bf16, fp32),
        ([("sharded", 0)], 192, fp32, fp32),
    ]  # fmt: skip
    assert [kinds[3] for kinds in found[False]] == [fp32, fp32, bf16, fp32, fp32, fp32]
    assert [kinds[:3] for kinds in found[False]] == [kinds[:3] for kinds in found[True]]


def spec(once: bool = False) -> ParameterSpec:
    return ParameterSpec((3, 8), torch.bfloat16, (SHARED,), True, once)


def bucket_of(slots: list[Slot], size: int, owners: Axis, dtype: torch.dtype = torch.float32, first: int = 0) -> Bucket:
    return Bucket(torch.zeros(size, dtype=torch.bfloat16), slots, owners, first, dtype)


def slot_at(start: int, name: str = "a", once: bool = False) -> Slot:
    return Slot(name, spec(once), Box((0, 0), (3, 8)), start)


@pytest.mark.parametrize(
    ("start", "size", "there", "here"),
    [
        (0, 64, slice(0, 24), slice(0, 24)),
        (5, 64, slice(5, 29), slice(0, 24)),
        (-10, 64, slice(0, 14), slice(10, 24)),
        (5, 9, slice(5, 9), slice(0, 4)),
        (-10, 8, slice(0, 8), slice(10, 18)),
    ],
)
def test_where_a_parameter_and_a_bucket_overlap(start, size, there, here):
    assert slot_at(start).within(size) == (there, here)


def test_what_lies_between_some_parameters():
    bucket = bucket_of([slot_at(-10, "a"), slot_at(30, "b"), slot_at(54, "c"), slot_at(80, "d")], 90, Axis(1, 0, None))
    for names, ranges in {
        "": [(0, 90)], "a": [(14, 90)], "b": [(0, 30), (54, 90)], "bc": [(0, 30), (78, 90)], "d": [(0, 80)],
        "abcd": [(14, 30), (78, 80)],
    }.items():  # fmt: skip
        assert bucket.without(set(names)) == [slice(*one) for one in ranges], names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_gradients_may_lie_on_the_host_and_what_they_take(dtype):
    """One that is exchanged at the end of the step is kept whole, and waits here; any other as the part that is
    owned."""
    several, alone = Axis(4, 3, ALL_GROUP), Axis(1, 0, None)  # type: ignore[arg-type]
    for owners, once, may, kept in (
        (several, False, True, 16), (several, True, False, 64), (alone, False, True, 64), (alone, True, True, 64)
    ):  # fmt: skip
        bucket = bucket_of([slot_at(0, once=once)], 64, owners, dtype)
        assert (bucket.may_be_on_host, bucket.gradient_bytes) == (may, kept * dtype.itemsize)
        bucket.place_gradient(None)
        assert bucket.gradient.dtype == dtype
        assert len(bucket.gradient) == 64 // owners.size
        if kept == 64:
            assert bucket.summed is not None
            bucket.summed.copy_(torch.arange(64))
            assert bucket.gradient.tolist() == list(range(64))[-len(bucket.gradient) :], "it is the owner's part"
            assert bucket.gradient_here() is bucket.summed
        else:
            assert bucket.summed is None
            assert bucket.gradient_here() is bucket.gradient


def test_the_buckets_that_forward_needs_last():
    made = [bucket_of([slot_at(0)], 64, Axis(1, 0, None), first=first) for first in (5, 0, 9, 2)]
    sizes = dict(zip(map(id, made), (10, 20, 30, 40)))
    for size, wanted in {0: [], 1: [2], 30: [2], 31: [2, 0], 40: [2, 0], 41: [2, 0, 3], 81: [2, 0, 3, 1]}.items():
        assert needed_last(made, size, lambda bucket: sizes[id(bucket)]) == wanted
    assert needed_last(made, 1e9, lambda bucket: 1) == [2, 0, 3, 1]


def test_as_many_gradients_go_to_the_host_as_are_asked_for():
    """Those that forward needs last, and never those that are to stay on the device."""
    specs = {name: ParameterSpec((64,), torch.float32, (SHARED,), True) for name in "abcd"}
    axes = SimpleNamespace(
        owners=lambda layout: Axis(1, 0, None), mesh=Mesh((1,), 1), place=(0,), device=torch.device("cpu")
    )
    for asked, away in ((0.0, ""), (1.0, "c"), (256.0, "c"), (257.0, "bc"), (1e9, "abc")):
        made, _ = make_buckets(specs, axes, dict.fromkeys(specs, False), 64, ("d",), gradients_on_host=asked)
        assert "".join(one.slots[0].name for one in made if one.on_host is not None) == away


def test_owners_are_sent_what_was_updated_and_wait_for_it(monkeypatch):
    asked, waited = [], []
    work = SimpleNamespace(wait=lambda: waited.append(1))
    monkeypatch.setattr(module, "all_gather_single", lambda *given, **named: asked.append((given, named)) or work)
    alone = bucket_of([slot_at(0)], 64, Axis(1, 0, None))
    alone.publish()
    alone.wait()
    assert not asked
    bucket = bucket_of([slot_at(0)], 64, Axis(4, 2, ALL_GROUP))  # type: ignore[arg-type]
    bucket.wait()
    assert not waited
    bucket.publish()
    (((flat, owned), named),) = asked
    assert flat is bucket.flat
    assert owned.data_ptr() == bucket.flat[32:].data_ptr()
    assert named == {"group": ALL_GROUP, "async_op": True}
    for _ in range(2):
        bucket.wait()
    assert waited == [1], "once"


def test_norms_are_of_every_bucket_in_order_wherever_it_lies():
    made = [bucket_of([slot_at(0)], size, Axis(1, 0, None)) for size in (4, 9, 16)]
    for bucket in made:
        bucket.place_gradient(None)
        bucket.gradient.fill_(2)
    assert norms(made).tolist() == [4, 6, 8]
    made[1].on_host = SimpleNamespace(norm=torch.tensor(5.0))  # type: ignore[assignment]
    assert norms(made).tolist() == [4, 5, 8]
    assert norms(made[1:2]).tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_large_buckets_are_exact(dtype):
    """A million elements of 0.1: torch adds up their squares one by one in fp32, which is off by 4e-4."""
    gradient = torch.full((2**20 + 1,), 0.1, dtype=dtype)
    assert norm_of(gradient).item() == pytest.approx((2**20 + 1) ** 0.5 * gradient[0].item(), rel=1e-7)


def reducer_of(names: str) -> tuple[GradientReducer, dict[str, torch.nn.Parameter]]:
    """Of one micro-batch, and of parameters with a bucket each, which two ranks own."""
    specs = {name: ParameterSpec((128,), torch.float32, (SHARED,), True) for name in names}
    axis = Axis(2, 0, ALL_GROUP)  # type: ignore[arg-type]
    axes = SimpleNamespace(owners=lambda layout: axis, mesh=Mesh((1,), 2), place=(0,), device=torch.device("cpu"))
    made, parameters = make_buckets(specs, axes, dict.fromkeys(specs, False), 128)  # type: ignore[arg-type]
    assert len(made) == len(names)
    return GradientReducer(made, parameters, 1), parameters


def test_no_more_exchanges_go_on_at_once_than_are_meant_to(monkeypatch):
    seen = []
    work = SimpleNamespace(wait=lambda: seen.append("end"))
    monkeypatch.setattr(module, "MOST_IN_FLIGHT", 2)
    monkeypatch.setattr(module, "start_gradient_sum", lambda *given: seen.append("begin") or work)
    reducer, parameters = reducer_of("abcd")
    for parameter in parameters.values():
        reducer.take(parameter, torch.ones(128))
    assert seen == ["begin", "begin", "end", "begin", "end", "begin"]
    reducer.end_micro_batch()
    reducer.finish()
    assert seen[6:] == ["end", "end"]


def test_settled_gradients_are_waited_for_at_once(monkeypatch):
    waited = []
    monkeypatch.setattr(module, "start_gradient_sum", lambda *given: None)
    reducer, parameters = reducer_of("ab")
    for name in "ab":
        work = SimpleNamespace(wait=lambda name=name: waited.append(name))
        reducer.defer(parameters[name], work, torch.ones(128))  # type: ignore[arg-type]
    assert waited == []
    reducer.settle()
    assert waited == ["a", "b"]
    assert not reducer._deferred


def test_no_more_gradients_are_waited_for_later_than_are_meant_to(monkeypatch):
    waited = []
    monkeypatch.setattr(module, "MOST_DEFERRED", 2)
    monkeypatch.setattr(module, "start_gradient_sum", lambda *given: None)
    reducer, parameters = reducer_of("abcd")
    for name, wanted in {"a": "", "b": "", "c": "a", "d": "ab"}.items():
        work = SimpleNamespace(wait=lambda name=name: waited.append(name))
        reducer.defer(parameters[name], work, torch.ones(128))  # type: ignore[arg-type]
        assert "".join(waited) == wanted
    reducer.end_micro_batch()
    assert "".join(waited) == "abcd"
