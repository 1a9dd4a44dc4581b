"""Frozen layers among trained ones, on two processes: gradients of the trained ones are PyTorch's."""

import json

import pytest
import torch
from torch import nn

from nnscaler import ComputeConfig, Source, compile_model
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.launch import run

WIDTH = 16


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        for name in frozen:
            for parameter in [self.get_parameter(name)] if "weight" in name else self.get_submodule(name).parameters():
                parameter.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def inputs(index):
    return {"x": torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(index))}


def with_weights(frozen):
    model = Model(frozen)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def gradients(jobs):
    """For each directory and what is frozen, the loss, and the parts of gradients that this rank owns."""
    found = []
    for directory, frozen in jobs:
        ours = ParallelModule(directory, torch.device("cpu"))
        weights = dict(with_weights(frozen).named_parameters())
        ours.load(lambda name, box, weights=weights: weights[name].detach()[box.slices])
        loss = ours.accumulate([inputs(ours.axes.replica)]).item()
        parts = [
            (part.name, part.box.slices, bucket.gradient[part.start : part.stop].view(part.box.sizes).numpy().copy())
            for bucket in ours.buckets
            for part in bucket.owned_parts()
        ]
        found.append((loss, parts))
    return found


FROZEN = [[], ["layers.0", "layers.1"], ["layers.2", "layers.3"], ["layers.1", "layers.2.up.weight"]]


def test_gradients_beside_frozen_layers(tmp_path):
    hardware = tiny.write_hardware(tmp_path)
    jobs, plans = [], []
    for number, frozen in enumerate(FROZEN):
        source = Source(lambda frozen=frozen: Model(frozen), inputs(0), torch.float32)
        for plan in (1, 2):
            config = ComputeConfig(plan_ngpus=plan, runtime_ngpus=2, hardware=hardware)
            jobs.append((compile_model(source, config, tmp_path / f"{number}_{plan}"), frozen))
            plans.append(plan)
    first = json.loads((jobs[3][0] / "plan.json").read_text())["parameters"]["layers.0.up.weight"]
    assert first["layout"].startswith("S("), "frozen weights are sharded too, and gathered"
    assert not first["trained"]
    assert "gathers.weight(w[" in (jobs[3][0] / "gencode_stage0.py").read_text()
    ranks = run(2, gradients, jobs)
    for index, (plan, (_, frozen)) in enumerate(zip(plans, jobs)):
        model = with_weights(frozen)
        losses = [model(**inputs(replica)) for replica in range(2 // plan)]
        sum(losses).backward()
        owned = set()
        for rank, found in enumerate(ranks):
            loss, parts = found[index]
            assert loss == pytest.approx(losses[rank % len(losses)].item(), rel=1e-4), (plan, frozen)
            for name, slices, values in parts:
                wanted = model.get_parameter(name).grad[slices]
                assert tiny.close(torch.from_numpy(values), wanted) < 1e-4, (plan, frozen, name)
                owned.add(name)
        assert owned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
