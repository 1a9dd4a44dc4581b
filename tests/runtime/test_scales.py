"""The scales of weights that devices hold in shards: of each whole weight, however buckets and owners divide it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nnscaler.kernels.fp8 import round_by
from nnscaler.kernels.fp8 import scale_of as scale_of_whole
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.axis import ALONE, Axis
from nnscaler.runtime.buckets import make_buckets
from nnscaler.runtime.generated import scope
from nnscaler.runtime.module import Weights
from nnscaler.runtime.scales import Scales
from nnscaler.shards import ParameterSpec
from tests.launch import run

SHAPES = {"a": (40, 32), "b": (6, 100), "other": (300,), "c": (64, 12)}
PLACES = (3, 1279, 417)  # where in `a` the largest element is, from step to step: with either device


def scales(mesh: Mesh, elements: int, master_only: bool) -> list[bool]:
    """Whether scales and rounded shards are right: of what was loaded, after an update, and of what was loaded again;
    and whether those of masters are kept meanwhile."""
    axes = Axes(mesh, torch.device("cpu"))
    layout = (Shard(0),) if mesh.sizes[0] > 1 else (SHARED,)
    specs = {
        name: ParameterSpec(shape, torch.bfloat16, layout, True, False, master_only, gathered_in_fp8=name != "other")
        for name, shape in SHAPES.items()
    }
    buckets, parameters = make_buckets(specs, axes, dict.fromkeys(SHAPES, True), elements)
    weights = Weights(buckets, parameters, axes.owners((REPLICATE,)))
    found = []
    for step, place in enumerate(PLACES):
        generator = torch.Generator().manual_seed(step)
        whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        whole["a"].view(-1)[place] = -9.013 - step  # which bf16 rounds
        whole["c"].zero_()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(whole[name][specs[name].box(mesh, axes.place).slices])
                if step == 2:
                    weights.changed(parameter)
        if step == 1:
            for bucket in buckets:
                bucket.publish()
        for name in "abc":
            weights.wait(parameters[name])
            scale = scale_of_whole(whole[name].bfloat16())
            mine = whole[name][specs[name].box(mesh, axes.place).slices].bfloat16()
            rounded = [weights.rounded(parameters[name], torch.bfloat16) for _ in range(2)]
            found.append(torch.equal(weights.scale(parameters[name]), scale))
            found += [torch.equal(one.float(), round_by(mine, scale).float()) for one in rounded]
            found.append((rounded[0] is rounded[1]) == master_only)
    assert dist.get_world_size() == 2
    return found


@pytest.mark.parametrize("mesh", [Mesh((2,)), Mesh((1,), 2)], ids=["shards", "owners"])
@pytest.mark.parametrize("elements", [256, 10**6])
@pytest.mark.parametrize("master_only", [False, True])
def test_those_of_whole_weights_are_found_anew_after_each_update(mesh, elements, master_only):
    for found in run(2, scales, mesh, elements, master_only):
        assert found == [True] * 36


def a_step(mesh: Mesh, elements: int) -> list[bool]:
    """Whether each device's own scales are right, and found once: of what was loaded, after an update of the parts that
    it owns, and of what was loaded again."""
    axes = Axes(mesh, torch.device("cpu"))
    layout = (Shard(0),) if mesh.sizes[0] > 1 else (SHARED,)
    specs = {
        name: ParameterSpec(shape, torch.bfloat16, layout, True, False, master_only=False, gathered_in_fp8=False)
        for name, shape in SHAPES.items()
    }
    buckets, parameters = make_buckets(specs, axes, dict.fromkeys(SHAPES, True), elements)
    weights, found = Weights(buckets, parameters), []

    def check() -> None:
        for name, parameter in parameters.items():
            scale = weights.scale_of(name)
            found.append(torch.equal(scale, scale_of_whole(parameter.detach().view(1, -1))))
            found.append(weights.scale_of(name) is scale)

    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter.fill_(1.0 + number)
        check()
        for number, bucket in enumerate(buckets):
            bucket.owned.fill_(3.0 + number + axes.rank)
            bucket.publish()
        check()
        for parameter in parameters.values():
            parameter.fill_(-7.0)
            weights.changed(parameter)
        check()
    return found


@pytest.mark.parametrize("mesh", [Mesh((2,)), Mesh((1,), 2)], ids=["shards", "owners"])
@pytest.mark.parametrize("elements", [256, 10**6])
def test_a_device_finds_the_scales_of_what_it_holds_once_an_update(mesh, elements):
    for found in run(2, a_step, mesh, elements):
        assert found == [True] * 24


def test_a_weight_below_a_module_path_has_its_scale_there():
    weights = Weights((), {"layers.0.a": torch.full((2, 2), -448.0), "a": torch.ones(2, 2)})
    assert scope(weights, "layers.0.").scale_of("a") == 1.0
    weights["layers.0.a"].fill_(44.8)
    assert weights.scale_of("layers.0.a").item() == pytest.approx(0.1)
    weights["layers.0.a"][0, 0] = float("nan")
    assert weights.scale_of("layers.0.a").isnan()


def test_what_is_read_is_not_what_the_next_update_writes():
    weight = torch.ones(4)
    found = Scales({id(weight): weight}, torch.bfloat16, ALONE)
    first = found.of(weight)
    weight.fill_(448.0)
    assert torch.equal(found.of(weight), first), "it has not been told"
    found.find()
    assert (found.of(weight).item(), first.item()) == (1.0, torch.tensor(1 / 448).item())


def test_they_are_not_written_to_while_an_exchange_may_still_write_to_them(monkeypatch):
    happened = []

    class Exchange:
        def __init__(self, values, *_, **__):
            self.values, self.found = values, values.clone()
            happened.append("begun")

        def wait(self):
            happened.append("done")
            self.values.copy_(self.found)  # when it likes, this at the latest

    monkeypatch.setattr(dist, "all_reduce", Exchange)
    weight = torch.full((4,), 448.0)
    found = Scales({id(weight): weight}, torch.bfloat16, Axis(2, 0, "group"))
    found.find()
    weight.fill_(896.0)
    found.find()  # as where a state is loaded after an update, and no forward has come between
    assert found.of(weight) == 2.0
    assert happened == ["begun", "done"] * 2
