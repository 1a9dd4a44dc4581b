"""The sharded optimizer against torch's own, with values of every setting that are no default."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime import gradients as on_the_host
from nnscaler.runtime import optimizer as optimizers
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import make_buckets, norm_of
from nnscaler.runtime.optimizer import OptimizerConfig, ShardedOptimizer, buckets_of, decays
from nnscaler.shards import ParameterSpec
from tests.runtime.conftest import Stream

SHAPES = {"matrix": (40, 30), "norm": (30,), "other": (3, 100), "bias": (300,)}
CONFIG = OptimizerConfig(betas=(0.6, 0.7), eps=0.03, weight_decay=0.4, clip_gnorm=0.5)
LABELS, COPIES = 12, 2  # the devices of a replica see the same labels


def optimizer_of(
    config: OptimizerConfig,
    dtype: torch.dtype,
    on_host: Collection[int] = (),
    summed: bool = True,
    gradients_on_host: float = 0.0,
) -> tuple[ShardedOptimizer, dict[str, nn.Parameter]]:
    axes = Axes(Mesh((1,), 1), torch.device("cpu"))
    specs = {name: ParameterSpec(shape, dtype, (SHARED,), True, False) for name, shape in SHAPES.items()}
    buckets, parameters = make_buckets(
        specs, axes, {name: decays(shape) for name, shape in SHAPES.items()}, 700, (), summed, gradients_on_host
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = ShardedOptimizer(buckets, config, COPIES, on_host)
    optimizer.load_masters()
    return optimizer, parameters


def give(optimizer: ShardedOptimizer, gradients: dict[str, torch.Tensor]) -> None:
    for bucket in optimizer.buckets:
        bucket.gradient.zero_()
        for part in bucket.owned_parts():
            bucket.gradient[part.start : part.stop] = gradients[part.name][part.box.slices].flatten()
        if bucket.on_host is not None:
            bucket.on_host.norm = norm_of(bucket.gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.5, 0.0, 1e6])
def test_updates_are_those_of_adamw(dtype, clip):
    config = OptimizerConfig(CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay, clip)
    optimizer, parameters = optimizer_of(config, dtype)
    plain = {name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in parameters.items()}
    groups = [
        {"params": [plain["matrix"], plain["other"]], "weight_decay": 0.4},
        {"params": [plain["norm"], plain["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps)
    generator = torch.Generator().manual_seed(1)
    for rate in (0.1, 0.02, 0.3):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        give(optimizer, gradients)
        norm = optimizer.step(LABELS, rate)
        for name, parameter in plain.items():
            parameter.grad = gradients[name] * COPIES / LABELS
        wanted = torch.nn.utils.clip_grad_norm_(plain.values(), clip or 1e9)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-5), "the norm is that before clipping"
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), plain[name].detach().to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("labels", "counted"), [(3, 1.5), (2, 1), (1, 1), (0, 1)])
def test_the_mean_is_over_one_label_at_least(labels, counted):
    """Two devices count the same labels; without any, gradients stay as they are."""
    optimizer, _ = optimizer_of(CONFIG, torch.float32)
    give(optimizer, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert optimizer.step(labels, 0.1).item() == pytest.approx(elements**0.5 / counted)


def test_each_bucket_is_sent_to_its_owners_once_it_is_updated(monkeypatch):
    """In the order in which forward needs them; also after masters were loaded, and where the master is the weight."""
    sent = []
    for dtype in (torch.bfloat16, torch.float32):
        optimizer, _ = optimizer_of(CONFIG, dtype)
        give(optimizer, {name: torch.ones(shape) for name, shape in SHAPES.items()})
        before = [bucket.owned.clone() for bucket in optimizer.buckets]

        def publish(bucket, buckets=optimizer.buckets, before=before):
            index = buckets.index(bucket)
            sent.append((index, torch.equal(bucket.owned, before[index])))

        monkeypatch.setattr(type(optimizer.buckets[0]), "publish", publish)
        optimizer.buckets[0].first = 2
        again = ShardedOptimizer(optimizer.buckets, CONFIG, COPIES)
        again.load_masters()
        again.step(LABELS, 0.1)
        assert sent == [(1, False), (2, False), (0, False)]
        sent.clear()
        for master in again.masters:
            master.zero_()
        again.publish_masters()
        assert sorted(sent) == [(0, False), (1, False), (2, False)]
        assert all(bucket.owned.eq(0).all() for bucket in again.buckets)
        sent.clear()


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_gradient_that_is_not_summed_stays_in_its_own_type(clip):
    """The update is the same to the last bit, the scaling of gradients in fp32 included."""
    config = OptimizerConfig(CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay, clip)
    both = [optimizer_of(config, torch.bfloat16, (), summed) for summed in (True, False)]
    assert [optimizer.buckets[0].gradient.dtype for optimizer, _ in both] == [torch.float32, torch.bfloat16]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradients = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
        norms = []
        for optimizer, _ in both:
            give(optimizer, gradients)
            norms.append(optimizer.step(LABELS, 0.1))
        assert torch.equal(*norms)
        kept = [
            parameter.grad for optimizer, _ in both for state in optimizer._states for parameter in state._parameters()
        ]
        assert kept == [None] * len(kept), "the copies in fp32 are let go of"
        assert all(map(torch.equal, everything(both[0][0]), everything(both[1][0])))


def test_a_state_that_is_loaded_is_gone_on_from():
    """Moments, masters and the number of steps, which corrects the moments' bias: all of them matter to a step."""
    first, second = (optimizer_of(CONFIG, torch.bfloat16)[0] for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    draw = lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}  # noqa: E731
    for _ in range(3):
        give(first, draw())
        first.step(LABELS, 0.1)
    for mine, theirs in zip(second.masters + _moments(second), first.masters + _moments(first), strict=True):
        mine.copy_(theirs)
    second.set_steps(first.steps)
    second.publish_masters()
    last = draw()
    for optimizer in (first, second):
        give(optimizer, last)
        optimizer.step(LABELS, 0.1)
    assert second.steps == 4
    for mine, theirs, bucket in zip(second.masters, first.masters, second.buckets, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(bucket.owned, mine.bfloat16())


def _moments(optimizer: ShardedOptimizer) -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state for key in optimizer.STATE]


def everything(optimizer: ShardedOptimizer) -> list[torch.Tensor]:
    steps = [torch.tensor(state.steps) for state in optimizer._states]
    moments = [tensor for state in optimizer.state for tensor in state.values()]
    return [t.clone() for t in (*optimizer.masters, *(b.flat for b in optimizer.buckets), *moments, *steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("clip", "gradient", "loss"),
    [(0.5, float("nan"), 1.0), (0.0, float("inf"), 1.0), (0.0, 1e25, 1.0), (0.5, 1.0, float("inf")),
     (0.0, 1.0, float("nan"))],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing(dtype, clip, gradient, loss):
    """No weight, moment or count; and what comes after is as if it had never been."""
    config = OptimizerConfig(CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay, clip)
    results = []
    for poisoned in (True, False):
        optimizer, _ = optimizer_of(config, dtype)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            give(optimizer, {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
            assert optimizer.step(LABELS, 0.1, torch.tensor(3.0, dtype=torch.float64)).isfinite()
            if poisoned:
                before = everything(optimizer)
                gradients = {name: torch.ones(shape) for name, shape in SHAPES.items()}
                gradients["other"][1, 7] = gradient
                give(optimizer, gradients)
                norm = optimizer.step(LABELS, 0.1, torch.tensor(loss, dtype=torch.float64))
                assert not norm.isfinite()
                assert all(torch.equal(*pair) for pair in zip(before, everything(optimizer), strict=True))
        results.append(everything(optimizer))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert optimizer.is_finite()
    optimizer.state[-1]["exp_avg_sq"][0] = float("inf")
    assert not optimizer.is_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("states", "gradients_on_host"), [(range(1, 100), 0.0), ((), 1e9), ((0, 2), 3000.0)])
@pytest.mark.parametrize("summed", [True, False])
def test_what_is_on_the_host_gives_the_same_to_the_last_bit(dtype, states, gradients_on_host, summed, monkeypatch):
    """Also where a step that is not finite comes between."""
    monkeypatch.setattr(on_the_host, "GRADIENT_SLOTS", 1)
    both = [
        optimizer_of(CONFIG, dtype, (), summed), optimizer_of(CONFIG, dtype, states, summed, gradients_on_host)
    ]  # fmt: skip
    assert any(bucket.on_host for bucket in both[1][0].buckets) == (gradients_on_host > 0)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        if step == 2:
            gradients["other"][1, 7] = float("inf")
            before = everything(both[1][0])
        for optimizer, _ in both:
            give(optimizer, gradients)
            assert optimizer.step(LABELS, 0.1).isfinite() == (step < 2)
            optimizer.settle()
            if step == 1:  # as from a checkpoint
                optimizer.set_steps(7)
        if step == 2:
            assert all(torch.equal(*pair) for pair in zip(before, everything(both[1][0]), strict=True))
        for name, parameter in both[0][1].items():
            assert torch.equal(parameter, both[1][1][name])
    for ours, theirs in zip(both[0][0].state, both[1][0].state, strict=True):
        for name in ours:
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("states", [(), range(1, 100)])
def test_what_lies_on_the_host_comes_while_what_was_before_is_updated(states, monkeypatch):
    monkeypatch.setattr(optimizers, "STATES_AHEAD", 1)
    optimizer, _ = optimizer_of(CONFIG, torch.bfloat16, states, True, 1e9)
    give(optimizer, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    order, done = optimizer._order, []

    def noted(what, index, call):
        def noting(*args):
            done.append((what, index))
            return call(*args)

        return noting

    for index, bucket in enumerate(optimizer.buckets):
        monkeypatch.setattr(bucket.on_host, "fetch", noted("gradient", index, bucket.on_host.fetch))
        if index in optimizer._staged:
            staged = optimizer._staged[index]
            monkeypatch.setattr(staged, "fetch", noted("state", index, staged.fetch))
            monkeypatch.setattr(staged, "wait_for_fetch", noted("wait", index, staged.wait_for_fetch))
            monkeypatch.setattr(staged, "send_back", noted("back", index, staged.send_back))
        state = optimizer._states[index]
        monkeypatch.setattr(state, "update", noted("update", index, state.update))
    optimizer.step(LABELS, 0.1)
    for index in optimizer._staged:
        own = [what for what, of in done if of == index and what != "gradient"]
        assert own == ["state", "wait", "update", "back"]
    for before, index in pairwise(order):
        for what in ("gradient", "state") if index in optimizer._staged else ("gradient",):
            assert done.index((what, index)) < done.index(("update", before))


@pytest.mark.parametrize("name", ["master", "exp_avg", "exp_avg_sq"])
def test_a_number_on_the_host_that_is_not_finite_is_found(name):
    """In a bucket whose state comes to the device after that of others, and the state is as it was then."""
    optimizer, _ = optimizer_of(CONFIG, torch.bfloat16, range(1, 100))
    give(optimizer, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    optimizer.step(LABELS, 0.1)
    before = everything(optimizer)
    assert optimizer.is_finite()
    assert all(torch.equal(*pair) for pair in zip(before, everything(optimizer), strict=True))
    last = optimizer._order[-1]
    assert last in optimizer._staged
    tensor = optimizer.masters[last] if name == "master" else optimizer.state[last][name]
    tensor[-1] = float("nan")
    assert not optimizer.is_finite()


def test_who_reads_the_state_waits_until_it_is_on_the_host(monkeypatch):
    optimizer, _ = optimizer_of(CONFIG, torch.bfloat16, range(1, 100))
    waited: list[object] = []
    monkeypatch.setattr(optimizers.StagedTensors, "wait_for_host", lambda self: waited.append(self))
    optimizer.settle()
    assert waited == list(optimizer._staged.values()) != []


def test_who_asks_whether_all_is_finite_leaves_gradients_on_the_host(monkeypatch):
    optimizer, _ = optimizer_of(CONFIG, torch.bfloat16, range(3), gradients_on_host=1e9)
    assert all(bucket.on_host is not None for bucket in optimizer.buckets)
    monkeypatch.setattr(on_the_host.GradientOnHost, "fetch", lambda self: pytest.fail("nobody works on it"))
    assert optimizer.is_finite()


def test_the_state_of_the_buckets_that_forward_needs_last_goes_to_the_host():
    optimizer, _ = optimizer_of(CONFIG, torch.bfloat16)
    by_use = sorted(range(len(optimizer.buckets)), key=lambda index: optimizer.buckets[index].first)
    assert buckets_of(optimizer.buckets, 0.0) == []
    assert buckets_of(optimizer.buckets, 1.0) == by_use[-1:]
    assert sorted(buckets_of(optimizer.buckets, 1e9)) == sorted(by_use)


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_as_much_state_goes_to_the_host_as_is_asked_for(dtype, each):
    """Two moments of an element, and where the weight is not in fp32, its master."""
    optimizer, _ = optimizer_of(CONFIG, dtype)
    last = max(range(len(optimizer.buckets)), key=lambda index: optimizer.buckets[index].first)
    size = each * optimizer.buckets[last].owned.numel()
    assert buckets_of(optimizer.buckets, size) == [last]
    assert len(buckets_of(optimizer.buckets, size + 1)) == 2
    staged = optimizer_of(CONFIG, dtype, [last])[0]._staged[last]
    assert sum(tensor.nbytes for tensor in staged.there) == size


def test_buckets_are_updated_in_the_order_in_which_forward_needs_them():
    """A bucket counts for the first of its parameters, by the model's order: matrix, norm, other, bias. Those that
    decay lie in front."""
    optimizer, _ = optimizer_of(CONFIG, torch.float32)
    inside = [[slot.name for slot in bucket.slots] for bucket in optimizer.buckets]
    assert inside == [["matrix"], ["matrix", "other"], ["other", "norm", "bias"]]
    assert [bucket.first for bucket in optimizer.buckets] == [0, 0, 1]
    optimizer.buckets[0].first = 2
    again = ShardedOptimizer(optimizer.buckets, CONFIG, COPIES)
    assert again._order == [1, 2, 0]


def test_a_parameter_of_several_stages_counts_in_the_norm_once():
    """Of buckets that another stage counts as its own, only the update is made here."""
    optimizer, _ = optimizer_of(CONFIG, torch.float32)
    optimizer.buckets[1].is_copy = True
    again = ShardedOptimizer(optimizer.buckets, CONFIG, COPIES)
    give(again, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    counted = sum(bucket.gradient.sum().item() for bucket in (again.buckets[0], again.buckets[2]))
    before = again.buckets[1].owned.clone()
    assert again.step(LABELS, 0.1).item() == pytest.approx(counted**0.5 * COPIES / LABELS, rel=1e-5)
    assert not torch.equal(again.buckets[1].owned, before)


def test_an_update_beside_the_next_forward_holds_what_it_uses_and_is_waited_for(streams):
    """As on an accelerator."""
    pool, done = streams
    used = SimpleNamespace(record_stream=lambda stream: done.append(("held for", stream.name)))
    own = SimpleNamespace(_stream=Stream("update", done), device=pool.device, _staged={})
    with ShardedOptimizer._beside(own, used):
        done.append(("updated",))
    assert done == [("held for", "update"), ("update", "waits for", "now"), ("in", "update"), ("updated",)]
    done.clear()
    ShardedOptimizer.settle(own)
    assert done == [("now", "waits for", "update")]
