"""Models of layers that are alike but for what a test does to them, and what PyTorch makes of them."""

import pytest
import torch
from torch import nn

from nnscaler import ComputeConfig, Source, compile_model
from nnscaler.runtime.module import ParallelModule
from nnscaler.trace import trace
from tests import tiny

WIDTH = 8
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """Adds a product of its input times what `factor(layer)` gives; `prepare(layer, index)` sets the layer up."""

    def __init__(self, index, factor, prepare=None):
        super().__init__()
        self.index, self.factor = index, factor
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        if prepare is not None:
            prepare(self, index)

    def scale(self):
        return 1.0

    def forward(self, x):
        return x + self.linear(x) * self.factor(self)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def stack(factor, prepare=None, count=4):
    return lambda: Stack(Layer(index, factor, prepare) for index in range(count))


def traced(make, strategy="reuse_cache"):
    source = Source(make, {"x": X}, torch.float32)
    model, buffers = source.build()
    return trace(model, source.inputs, buffers, strategy)


def check_as_pytorch(make, folder, **config):
    """Compiles, and compares loss and gradients with PyTorch's."""
    config = ComputeConfig(hardware=tiny.write_hardware(folder), **config)
    code = compile_model(Source(make, {"x": X}, torch.float32), config, folder / "code")
    ours, model = ParallelModule(code, torch.device("cpu")), make()
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    ours.load(lambda name, box: weights[name].detach()[box.slices])
    found, wanted = ours.accumulate([{"x": X}]).item(), model(X)
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=1e-4)
    trained = set()
    for bucket in ours.buckets:
        for part in bucket.owned_parts():
            gradient = weights[part.name].grad
            found = bucket.gradient[part.start : part.stop].view(part.box.sizes)
            torch.testing.assert_close(found, gradient[part.box.slices], rtol=1e-3, atol=1e-4)
            trained.add(part.name)
    assert trained == {name for name, weight in weights.items() if weight.grad is not None}


def sets(**makers):
    def prepare(layer, index):
        for name, make in makers.items():
            setattr(layer, name, make(index))

    return prepare


def buffer(layer, index):
    layer.register_buffer("held", torch.full((WIDTH,), 1.0 + index % 2), persistent=False)
