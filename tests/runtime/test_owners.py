"""What ranks that own parts of the same parameters make of their gradients: three or more, threads of one process."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnscaler.kernels import fp8
from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime import buckets, collectives, copies
from nnscaler.runtime import gradients as gradients_on_host
from nnscaler.runtime import optimizer as optimizers
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.buckets import GradientReducer, make_buckets
from nnscaler.runtime.gathering import Gathers
from nnscaler.runtime.generated import operators
from nnscaler.runtime.optimizer import OptimizerConfig, ShardedOptimizer
from nnscaler.shards import ParameterSpec
from nnscaler.sums import IN_FP32
from tests import threads
from tests.distributed import test_buckets as of_buckets
from tests.runtime.test_gathering import Rounding
from tests.threads import Ranks

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture
def reproducible() -> Iterator[None]:
    """Which `sums_of_gradients` asks for."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("elements", [192, 900, 10**6])
def test_gradients_of_three_ranks_and_micro_batches_are_summed(once, elements, monkeypatch, reproducible):
    """In fp32, and in bf16 by either way, two at a time; also where they lie on the host."""
    mine, places = threading.local(), SimpleNamespace(mesh=Mesh((1,), 3), place=(0,), device=torch.device("cpu"))

    def axes(*given: Any) -> Any:
        return SimpleNamespace(owners=lambda layout, axis=mine.axis: axis, **vars(places))

    dist = SimpleNamespace(
        get_rank=lambda: mine.axis.rank, all_reduce=lambda value: threads.all_reduce(value, mine.axis.group)
    )
    monkeypatch.setattr(of_buckets, "dist", dist)
    monkeypatch.setattr(of_buckets, "Axes", axes)
    monkeypatch.setattr(buckets, "MOST_IN_FLIGHT", 2)
    monkeypatch.setattr(gradients_on_host, "GRADIENT_SLOTS", 2)

    def sums(axis: Axis) -> None:
        mine.axis = axis
        differences, wanted = of_buckets.sums_of_gradients(elements, 3, once)
        assert max(differences) < 1e-4
        for on_host, how in ((0.0, of_buckets.IN_BF16[0]), (0.0, of_buckets.IN_BF16[1]), (1e9, IN_FP32)):
            _, found = of_buckets.sums_of_gradients(elements, 3, once, on_host, how)
            assert all(map(torch.equal, found, wanted))

    Ranks(3).run(sums)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_a_weight_in_shards_along_two_axes_is_gathered_and_its_gradient_scattered(dims):
    """Over two and three devices; along one dimension, the first axis has the larger parts."""
    whole = torch.arange(72.0).view(6, 12)

    def parts(tensor: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
        for axis, dim in zip(axes, dims):
            tensor = tensor.chunk(axis.size, dim)[axis.rank]
        return tensor.contiguous()

    def gather(axes: list[Axis]) -> list[bool]:
        arrived: list[torch.Tensor] = []

        def take(parameter: torch.Tensor, work: Any, gradient: torch.Tensor) -> None:
            assert parameter is shard
            work.wait()
            arrived.append(gradient)

        shard = parts(whole, axes).requires_grad_()
        gathers = Gathers(take)
        number = 3 * axes[0].rank + axes[1].rank
        order = [(axes[1], dims[1]), (axes[0], dims[0])]  # what was divided last is gathered first
        found = []
        for _ in range(2):
            gathers.begin()
            weight = gathers.weight(shard, *order)
            (weight * (1.0 + number) * (whole + 1)).sum().backward()
            found.append(torch.equal(weight, whole))
        rows = Gathers(take, rounding=Rounding(whole)).weight_in_fp8(shard, *order, dtype=torch.bfloat16).rows
        found.append(torch.equal(rows.float(), fp8.round_by(whole, fp8.scale_of(whole)).float()))
        wanted = parts(21 * (whole + 1), axes)  # 1 + 2 + ... + 6
        return [*found, *(torch.equal(one, wanted) for one in arrived)]

    assert Ranks(6).run_on_grid((2, 3), gather) == [[True] * 5] * 6


def test_what_copies_average_is_the_mean_of_theirs(monkeypatch):
    monkeypatch.setattr(copies, "dist", collectives.dist)

    def average(axis: Axis) -> list[float]:
        own = torch.tensor([float(axis.rank), 9.0])
        found = copies.average_among_copies(axis, own)
        assert own.tolist() == [axis.rank, 9]
        return found.tolist()

    assert Ranks(5).run(average) == [[2.0, 9.0]] * 5
    assert operators("average_over_copies").average_over_copies_among_copies is copies.average_among_copies


SHAPES = {"matrix": (13, 29), "norm": (7,), "table": (3, 100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_owners_update_as_one_would_and_skip_a_step_together(dtype, monkeypatch):
    """Each updates its part by the norm of all; where one has a loss that is no number, nothing changes anywhere."""
    monkeypatch.setattr(buckets, "all_gather_single", threads.all_gather_single)
    config = OptimizerConfig(betas=(0.6, 0.7), eps=0.03, weight_decay=0.4, clip_gnorm=0.5)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    draw = lambda shape: torch.randint(-8, 9, shape, generator=generator) / 8  # noqa: E731  sums are exact in bf16
    terms = [[{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(3)] for _ in range(2)]
    specs = {name: ParameterSpec(shape, dtype, (SHARED,), True, False) for name, shape in SHAPES.items()}
    decays = {name: len(shape) > 1 for name, shape in SHAPES.items()}

    def train(owners: Axis) -> dict[str, torch.Tensor]:
        axes: Any = SimpleNamespace(
            owners=lambda layout: owners, mesh=Mesh((1,), owners.size), place=(0,), device=torch.device("cpu")
        )
        mine.owners = owners
        made, parameters = make_buckets(specs, axes, decays, 300)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        optimizer, reducer = ShardedOptimizer(made, config, 1), GradientReducer(made, parameters, 1)
        optimizer.load_masters()
        for number, (step, loss) in enumerate(((0, 1.0), (1, float("nan")), (1, 1.0))):
            given = terms[step][owners.rank : owners.rank + 1] if owners.size > 1 else terms[step]
            torch.stack([(p * one[n]).sum() for n, p in parameters.items() for one in given]).sum().backward()
            reducer.end_micro_batch()
            reducer.finish()
            labels = (1, 2, 4)[owners.rank] if owners.size > 1 else 7  # which ranks do not have equally many of
            norm = optimizer.step(labels, 0.1, torch.tensor(loss if owners.rank == owners.size - 1 else 1.0))
            assert norm.isfinite() == (number != 1)
        assert optimizer.steps == 2
        optimizer.finish()
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    mine = threading.local()
    stand_in = SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: mine.owners.size,
        all_reduce=lambda value: threads.all_reduce(value, mine.owners.group),
    )  # fmt: skip
    monkeypatch.setattr(optimizers, "dist", stand_in)
    wanted = train(Axis(1, 0, None))
    for found in Ranks(3).run(train):
        for name in SHAPES:
            rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(found[name], wanted[name], rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("once", [False, True])
def test_gradients_that_are_given_now_or_later_are_taken(once):
    """As those of products, where backward runs in two parts; and of gathered weights, once their exchange ends."""
    specs = {name: ParameterSpec((40,), torch.float32, (SHARED,), True, once) for name in "abc"}

    def train(axis: Axis) -> list[torch.Tensor]:
        axes: Any = SimpleNamespace(
            owners=lambda layout: axis, mesh=Mesh((1,), 3), place=(0,), device=torch.device("cpu")
        )
        made, parameters = make_buckets(specs, axes, dict.fromkeys(specs, True), 10**6)
        reducer = GradientReducer(made, parameters, 2)
        for micro_batch in range(2):
            reducer.take(parameters["a"], torch.full((40,), 1.0 + axis.rank))
            late = torch.zeros(40)
            work = SimpleNamespace(wait=lambda late=late: late.fill_(10.0))
            reducer.defer(parameters["b"], work, late)
            if micro_batch or once:  # what is exchanged once gets as many gradients in each micro-batch
                reducer.take(parameters["c"], torch.full((40,), 100.0))
            reducer.end_micro_batch()
        reducer.finish()
        (bucket,) = made
        found = {part.name: bucket.gradient[part.start : part.stop].unique().tolist() for part in bucket.owned_parts()}
        return [found.get(name, []) for name in "abc"]

    every = Ranks(3).run(train)
    for place, wanted in enumerate((2 * 6.0, 2 * 30.0, 600.0 if once else 300.0)):
        assert {value for one in every for value in one[place]} == {wanted}


@pytest.mark.parametrize("once", [False, True])
def test_a_backward_may_begin_before_another_one_ends(once, monkeypatch):
    """Of each of three micro-batches, `a` gets its gradient in the first part of backward, `b` in the second, and `c`
    in both. In the first step it is learned how many a bucket gets; from then on, the last one sends it."""
    specs = {name: ParameterSpec((40,), torch.float32, (SHARED,), True, once) for name in "abc"}
    events: dict[Any, list[str]] = defaultdict(list)
    start = buckets.start_gradient_sum

    def send(target: Any, terms: Any, group: Any, sums: Any) -> Any:
        events[group.rank].append("sent")
        return start(target, terms, group, sums)

    monkeypatch.setattr(buckets, "start_gradient_sum", send)

    def train(axis: Axis) -> dict[str, list[float]]:
        axes: Any = SimpleNamespace(
            owners=lambda layout: axis, mesh=Mesh((1,), 3), place=(0,), device=torch.device("cpu")
        )
        made, parameters = make_buckets(specs, axes, dict.fromkeys(specs, True), 10**6)
        reducer = GradientReducer(made, parameters, 3, overlaps=True)
        for part in 2 * ["I0", "I1", "W0", "I2", "W1", "W2", "end"]:
            if part == "end":
                reducer.finish()
            else:
                for name in "ac" if part[0] == "I" else "bc":
                    reducer.take(parameters[name], torch.full((40,), (1.0 + axis.rank) * 10 ** int(part[1])))
            if part[0] == "W":
                reducer.end_micro_batch()
            events[axis.rank].append(part)
        (bucket,) = made
        return {part.name: bucket.gradient[part.start : part.stop].unique().tolist() for part in bucket.owned_parts()}

    found = Ranks(3).run(train)
    for name, wanted in {"a": 6 * 111.0, "b": 6 * 111.0, "c": 2 * 6 * 111.0}.items():
        assert [value for one in found for value in one.get(name, [])] in ([wanted], [wanted] * 2)
    if once:
        learned = ["I0", "I1", "W0", "I2", "W1", "W2", "sent", "end"]
        assert events[0] == [*learned, "I0", "I1", "W0", "I2", "W1", "sent", "W2", "end"]
