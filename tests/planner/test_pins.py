"""What the named policies pin, by hand: of a model with products of weights, in several forms, and of activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nnscaler.compiler import Source
from nnscaler.graph import Call, Graph
from nnscaler.planner.policies import apply_policy
from nnscaler.trace import trace


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(6, 1))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        z = torch.softmax(y @ y.transpose(1, 2) + mask, -1) @ y
        return x + linear(linear(z, self.weight * self.scale), self.weight.t())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.table = nn.Embedding(10, 8)

    def forward(self, number: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) * number
        for layer in self.layers:
            x = layer(x, mask)
        return x.flatten(0, 1).sum(1).view(4, 5).sum(1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Of four samples of five tokens, which come after a number; the mask has no samples."""
    inputs = {"number": torch.tensor(2.0), "ids": torch.zeros(4, 5, dtype=torch.int64), "mask": torch.zeros(5, 5)}
    model, buffers = Source(Model, inputs, torch.float32).build()
    return trace(model, inputs, buffers)


def pinned(graph: Graph, policy: str, devices: int) -> dict[str, tuple[str | None, ...] | None]:
    """Of each node, root's after those of layers: along what it may be split."""
    apply_policy(graph, policy, devices)
    blocks = [*graph.blocks.values(), graph.root]
    nodes = [(block, node) for block in blocks for node in block.nodes if not isinstance(node, Call)]
    return {f"{'root ' if block is graph.root else ''}{node.name}": node.pinned for block, node in nodes}


def test_by_data_all_that_has_samples_is_split_along_them_and_nothing_else(graph):
    assert pinned(graph, "dp", 2) == {
        "norm": ("d0",), "transpose": ("d0",), "matmul": ("b0",), "add": ("d0",), "softmax": ("d0",),
        "matmul_1": ("b0",), "mul": (None,), "linear": ("*0",), "t": (None,), "linear_1": ("*0",), "add_1": ("d0",),
        "root table": ("d0",), "root mul": ("d0",), "root flatten": ("d0",), "root sum_1": ("d0",),
        "root view": ("d0",), "root sum_2": ("d0",),
    }  # fmt: skip
    assert graph.stored == dict.fromkeys(graph.parameters, (None,))


def test_by_tensors_products_with_weights_are_split_along_them_and_nothing_along_samples(graph):
    """On two devices, and on four, which do not divide six."""
    rest = {
        "norm": (None, "d1"), "transpose": (None, "d1"), "matmul": (None, "m", "k", "n"), "add": (None, "d1"),
        "softmax": (None, "d1"), "matmul_1": (None, "m", "k", "n"), "mul": (None, "d0", "d1"),
        "t": (None, "d0", "d1"), "add_1": (None, "d1", "d2"), "root table": (None, "h", "d1"),
        "root mul": (None, "d2", "d1"),
        **dict.fromkeys(("root flatten", "root sum_1", "root view", "root sum_2"), (None,)),
    }  # fmt: skip
    for devices, first, second in ((2, ("k", "n"), ("k", "n")), (4, ("k",), ("n",))):
        found = pinned(graph, "tp", devices)
        assert (found.pop("linear"), found.pop("linear_1")) == (first, second)
        assert {name: set(one or ()) for name, one in found.items()} == {name: set(one) for name, one in rest.items()}
        assert graph.stored == {}


class Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return (y @ y.t()).sum()


def test_what_has_samples_along_two_names_is_whole():
    """Each sample with each other one."""
    model, buffers = Source(Gram, {"x": torch.zeros(4, 8)}, torch.float32).build()
    found = pinned(trace(model, {"x": torch.zeros(4, 8)}, buffers), "dp", 2)
    assert list(found.values()) == [("*0",), ("d0",), (None,), (None,)], found


@pytest.mark.parametrize(("policy", "devices"), [("autodist", 2), ("dp", 1), ("tp", 1)])
def test_where_there_is_nothing_to_decide_nothing_is_pinned(graph, policy, devices):
    """Nor is what another policy has pinned."""
    apply_policy(graph, "dp", 4)
    assert set(pinned(graph, policy, devices).values()) == {None}
    assert graph.stored == {}
