"""Which runs of operators can be computed in pieces follows from the annotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnscaler import register_op
from nnscaler.compiler import Source
from nnscaler.pieces import Stretch, stretches
from nnscaler.trace import trace


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Summed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1).sum()


@register_op("b l^ d^ -> b l^ d^", name="test_mixes_rows")
def mixes_rows(x: Tensor) -> Tensor:
    return x.flip(1)


class Mixing(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(mixes_rows(super().forward(x)))


def stretches_of(model: type[nn.Module]) -> list[Stretch]:
    inputs = {"x": torch.empty((2, 64, 16), device="meta", requires_grad=True)}
    built, buffers = Source(model, inputs, torch.float32).build()
    return stretches(trace(built, inputs, buffers).root)


def test_rows_of_an_mlp_are_divided_and_its_weights_are_not():
    (run,) = stretches_of(Gated)
    assert run.ends_block
    assert {run.dims[name] for name in ("x", *run.outputs)} == {1}, "of sequences and rows, there are more rows"
    assert set(run.inputs) - set(run.dims) == {name for name in run.inputs if "weight" in name or "bias" in name}


def test_what_must_not_be_divided_is_not():
    assert not stretches_of(Summed), "each element of a cumulative sum hangs on all before, and a sum is of all pieces"


def test_registered_operators_are_between_runs():
    first, second = stretches_of(Mixing)
    assert not first.ends_block
    assert second.ends_block
    assert not set(first.units) & set(second.units)
