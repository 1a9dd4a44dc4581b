"""Calls that drop at random are given their places when a model is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnscaler import ComputeConfig, OptimizerConfig, UserError, parallelize, same_dropout
from nnscaler.graph import Graph
from nnscaler.kernels.random import DRAWS, place_of
from nnscaler.operators import bind
from nnscaler.trace import build_on_meta, trace
from tests import tiny

X = torch.zeros(4, 8, 16)


def graph_of(model: type[nn.Module], **inputs: Tensor) -> Graph:
    built, buffers = build_on_meta(model)
    return trace(built, inputs or {"x": X}, buffers)


def places(graph: Graph) -> list[int]:
    return [int(value) for path, value in graph.buffers.items() if "place" in path]


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.Linear(16, 16), nn.Dropout(0.2))


class Layers(nn.Module):
    times = 1

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for one in self.layers:
                x = one(x)
        return x.sum()


class Twice(Layers):
    times = 2


def test_layers_share_a_block_and_have_places_of_their_own():
    graph = graph_of(Layers)
    assert list(graph.blocks) == ["sequential"]
    assert graph.root.inputs == ["x", DRAWS]
    wanted = [place_of(f"layers.{index}", ordinal) for index in range(3) for ordinal in range(2)]
    assert places(graph) == wanted
    assert len([path for path in graph.buffers if "numbers" in path]) == 3, "all share what counts along a dimension"


def test_a_layer_that_is_called_again_drops_anew():
    graph = graph_of(Twice)
    assert len(graph.blocks) == 2
    assert sorted(places(graph)) == sorted(int(place_of(f"layers.{i}", n)) for i in range(3) for n in range(4))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = self.again = nn.Dropout(0.5)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.again(self.linear(self.drop(x)))).sum()


def test_one_dropout_under_two_names():
    assert places(graph_of(Shared)) == [place_of("", ordinal) for ordinal in range(3)]


class Quiet(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layers.eval()


def test_what_drops_nothing_needs_nothing():
    graph = graph_of(Quiet)
    assert graph.root.inputs == ["x"]
    assert not graph.buffers


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        F.dropout(y, 0.5, inplace=True)
        return y.sum()


class OfAView(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        F.dropout(y[:2], 0.5, inplace=True)
        return y.sum()


def test_dropout_in_place():
    nodes = graph_of(InPlace).root.nodes
    assert [node.op for node in nodes[1:]] == ["nnscaler.dropout.default", "aten.sum.default"]
    assert nodes[2].inputs == list(nodes[1].outputs)
    graph = graph_of(OfAView)
    (refused,) = (node for node in graph.root.nodes if "bernoulli" in node.op)
    with pytest.raises(UserError, match=r"aten\.bernoulli.* draws random numbers"):
        bind(refused, graph.root)


class Named(nn.Module):
    def forward(self, draws: Tensor) -> Tensor:
        return F.dropout(draws).sum()


def test_an_input_of_the_name_that_is_needed_is_refused():
    with pytest.raises(UserError, match="forward has an argument 'draws', by which a compiled model is told what to"):
        graph_of(Named, draws=X)


class Attention(nn.Module):
    """Attention of torch that drops its weights, with each of its options; and a layer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(16, 8)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, 0.2, batch_first=True)
        self.register_buffer("hidden", torch.arange(64).view(8, 8) % 5 != 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (x, self.key(x)))
        attend, p = F.scaled_dot_product_attention, 0.3 * self.training
        found = [
            attend(q, k, k, self.hidden, p, enable_gqa=True),
            attend(q, q, q, self.hidden.to(x.dtype), p, scale=0.3),
            attend(q, q, q, None, p, True),
            self.layer(x).unflatten(-1, (-1, 4)).transpose(1, 2),
        ]
        return torch.stack(found).cos().sum()


def test_attention_of_torch_that_drops_its_weights(tmp_path):
    x = torch.randn(2, 8, 16)
    hardware = tiny.write_hardware(tmp_path)
    config, plain = ComputeConfig(hardware=hardware), Attention()
    model = parallelize(plain, (x,), config, OptimizerConfig(lr=0.01), seed=3, folder=tmp_path / "code")
    for step in range(2):
        with same_dropout(plain, 3, step):
            wanted = plain(x)
        assert model.step([(x,)]).item() == pytest.approx(wanted.item(), rel=1e-5)
        wanted.backward()
        found = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        assert model.optimizer.step().item() == pytest.approx(found.item(), rel=1e-4)
        plain.load_state_dict(model.state_dict(), strict=False)
        plain.zero_grad()
    assert model.evaluate([(x,)]).item() == pytest.approx(plain.eval()(x).item(), rel=1e-5)
