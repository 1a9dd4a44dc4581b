"""Operators that torch composes of others, writes in place, and regions without gradients: compiled as PyTorch runs
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.runtime.module import ParallelModule
from tests import tiny


def written_then_not_followed(y: Tensor, x: Tensor) -> Tensor:
    y = y * 1
    y.add_(x, alpha=2)
    with torch.no_grad():
        z = y.exp()
        z.add_(1)
    return y * z


def written_by_parts(y: Tensor, x: Tensor) -> Tensor:
    y = y.clone()
    y[..., 2:4] *= 2
    y[:, 0].relu_()
    return y * y.detach()


def composed(y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.hstack([x, y])
    return torch.tensordot(y, x, dims=([2], [2])).sum() + (y.mT @ x).tile(2).sum() + z.swapaxes(0, 1).sum() * y.sum()


@pytest.mark.parametrize("function", [written_then_not_followed, written_by_parts, composed])
def test_values_and_gradients_are_those_of_pytorch(function, tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.linear(x), x).sum()

    inputs = {"x": torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))}
    config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))
    compile_model(Source(Model, inputs, torch.float32), config, tmp_path / "code")
    model, module = Model(), ParallelModule(tmp_path / "code", torch.device("cpu"))
    weights = dict(model.named_parameters())
    module.load(lambda name, box: weights[name].detach())
    loss = module.accumulate([inputs])
    wanted = model(**inputs)
    wanted.backward()
    torch.testing.assert_close(loss.to(wanted.dtype).squeeze(), wanted.detach())
    for bucket in module.buckets:
        for part in bucket.owned_parts():
            found = bucket.gradient[part.start : part.stop].view(part.box.sizes)
            torch.testing.assert_close(found, weights[part.name].grad)
