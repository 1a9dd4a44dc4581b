"""Layers are one block where they compute the same, whatever could make them differ.

Each model is compiled for one process and compared with PyTorch: loss, and gradients of its parameters.
"""

import dataclasses
import enum
import functools
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from nnscaler import ComputeConfig, Source, UserError, compile_model, register_op
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.trace.layers import WIDTH, Layer, Stack, X, buffer, check_as_pytorch, sets, stack, traced


class Kind(enum.Enum):
    A = 2.0
    B = 3.0


@dataclasses.dataclass
class Settings:
    scale: float
    _hidden: float = 1.0


@register_op("d -> d", name="test_scaled")
def scaled(x, *, by=1.0):
    return x * by


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def closure(value):
    return lambda: value


KINDS = {
    "private": (lambda layer: layer._s, sets(_s=lambda i: 1.0 + i % 2)),
    "enum": (lambda layer: layer.kind.value, sets(kind=lambda i: Kind.A if i % 2 else Kind.B)),
    "dict": (lambda layer: layer.d["a"]["b"], sets(d=lambda i: {"a": {"b": float(i // 2)}})),
    "set": (lambda layer: float(len(layer.names)), sets(names=lambda i: {"a", "b"} if i % 2 else {"a"})),
    "lambda": (lambda layer: layer.f(2.0), sets(f=lambda i: (lambda x: x * 2) if i % 2 else (lambda x: x * 3))),
    "cell": (lambda layer: layer.f(), sets(f=lambda i: closure(1.0 + i % 2))),
    "partial": (lambda layer: layer.f(), sets(f=lambda i: functools.partial(float, str(i % 2)))),
    "bound method": (lambda layer: layer.f(), sets(f=lambda i: (1.0 + i % 2).__abs__)),
    "dataclass": (lambda layer: layer.c._hidden, sets(c=lambda i: Settings(1.0, 1.0 + i % 2))),
    "slots": (lambda layer: layer.c.value, sets(c=lambda i: Slotted(1.0 + i % 2))),
    "tensor": (lambda layer: layer.t, sets(t=lambda i: torch.full((WIDTH,), 1.0 + i % 2))),
    "tensors": (lambda layer: layer.t[1], sets(t=lambda i: [torch.ones(1), torch.arange(8.0) * (i % 2)])),
    "numpy": (lambda layer: torch.from_numpy(layer.a) + float(layer.a[0]), sets(a=lambda i: np.arange(8) * (i % 2))),
    "dtype": (lambda layer: torch.ones(1, dtype=layer.t).itemsize, sets(t=lambda i: (torch.int32, torch.int64)[i % 2])),
    "operator's keyword": (lambda layer: scaled(layer.linear.weight[0], by=layer.by), sets(by=lambda i: 1.0 + i % 2)),
    "index": (lambda layer: 2.0 if layer.index % 2 else 3.0, None),
    "index in a table": (
        lambda layer: 2.0 if layer.c.types[layer.index] == "full" else 3.0,
        sets(c=lambda i: types.SimpleNamespace(types=["full", "full", "sliding", "full"])),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_computes_something_else_is_another_block(kind):
    factor, prepare = KINDS[kind]
    graph = traced(stack(factor, prepare))
    assert len(graph.blocks) == 2, "two kinds of layers"
    assert str(graph) == str(traced(stack(factor, prepare), "meta"))


def test_what_tells_layers_apart_has_its_value(tmp_path):
    """Of constants, which a block holds: each layer its own."""
    factors, prepares = zip(*(KINDS[kind] for kind in ("tensor", "enum", "cell", "dict", "numpy")))

    def prepare(layer, index):
        buffer(layer, index)
        for one in prepares:
            one(layer, index)

    def factor(layer):
        return layer.held * torch.tensor([2.0, layer.index % 3]).sum() * sum(one(layer) for one in factors)

    check_as_pytorch(stack(factor, prepare, 3), tmp_path)


def test_an_index_that_changes_nothing_is_no_difference():
    seen = []
    graph = traced(stack(lambda layer: 2.0 if seen.append(layer.index) is None else 3.0, count=6))
    (block,) = graph.blocks.values()
    assert len(graph.calls(block.name)) == 6


def patched():
    model = stack(Layer.scale)()
    model.layers[1].scale = lambda: 5.0
    model.layers[1].factor = lambda layer: layer.scale()
    model.layers[2].forward = types.MethodType(lambda layer, x: x - layer.linear(x), model.layers[2])
    return model


def hooked():
    model = stack(Layer.scale)()
    model.layers[1].register_forward_hook(lambda layer, given, result: result * 2)
    model.layers[2].register_forward_pre_hook(lambda layer, given: (given[0] * 3,))
    model.layers[3].linear.register_forward_hook(lambda layer, given, result: result + 1)
    model.register_forward_hook(lambda layer, given, result: result * 2)
    return model


def subclasses():
    class Doubled(Layer):
        constant = 2.0

        def scale(self):
            return self.constant

    other = type("Doubled", (Doubled,), {"constant": property(lambda layer: 4.0)})
    kinds = (Layer, Doubled, other, Layer)
    return Stack(kind(index, lambda layer: layer.scale()) for index, kind in enumerate(kinds))


def parametrized():
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    model = stack(Layer.scale)()
    parametrize.register_parametrization(model.layers[1].linear, "weight", Twice())
    return model


def tied():
    model = stack(Layer.scale)()
    model.layers[2].linear.weight = model.layers[0].linear.weight
    return model


def borrowing():
    """Layers that use the weight of the layer before."""
    model = stack(lambda layer: layer.before.linear.weight.sum(0))()
    for layer, before in zip(model.layers, [model.layers[-1], *model.layers]):
        layer.__dict__["before"] = before
    return model


def stashing():
    """Layers whose loss is read from an attribute."""

    class Model(Stack):
        def forward(self, x):
            return super().forward(x) + sum(layer.loss for layer in self.layers)

    def factor(layer):
        layer.loss = layer.linear.weight.square().mean()
        return 1.0

    return Model(Layer(index, factor) for index in range(3))


def writing():
    """Layers that write into their argument, and into results and views of their own."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x.mul_(0.5)
            y = self.linear(x)
            y[0].mul_(3.0)
            return y.add_(1.0)

    class Model(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = x * 1.5
                x = layer(x) + x
            return x.sum()

    return Model(Writes() for _ in range(3))


def without_gradient():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
                with torch.enable_grad():
                    z = self.b(x)
            return x + y + z + self.c(x).detach() * x

    return Stack(Part() for _ in range(3))


def counting_depth():
    """Layers that count themselves in an object that they share, from 0 in each forward."""
    shared = types.SimpleNamespace(depth=0)

    class Model(Stack):
        def forward(self, x):
            shared.depth = 0
            return super().forward(x)

    def factor(layer):
        shared.depth += 1
        return float(shared.depth)

    return Model(Layer(index, factor) for index in range(3))


def two_names_in_slices():
    """A module that has two names in each layer; layers are called by slices, of which one counts from the end."""

    class Twice(Layer):
        def __init__(self, index):
            super().__init__(index, Layer.scale)
            self.again = self.linear

        def forward(self, x):
            return super().forward(x) + self.again(x)

    class Model(Stack):
        def forward(self, x):
            for layer in [*self.layers[:1], *self.layers[-2:], *self.layers[1:2], *self.layers[::-2]]:
                x = layer(x)
            return x.square().sum()

    return Model(Twice(index) for index in range(4))


def handing_on():
    """Layers that get a list from those before, and add to it: numbers and tensors."""

    class Adds(Layer):
        def forward(self, x, depths, seen):
            depths.append(self.index)
            seen["all"] += [super().forward(x) * len(depths)]
            return seen["all"][-1]

    class Model(Stack):
        def forward(self, x):
            depths, seen = [], {"all": []}
            for layer in self.layers:
                x = layer(x, depths, seen)
            return sum(one.square().sum() for one in seen["all"]) * len(depths)

    return Model(Adds(index, Layer.scale) for index in range(3))


def twice():
    class Model(Stack):
        def forward(self, x):
            for layer in [*self.layers, *self.layers]:
                x = layer(x)
            return x.square().mean()

    return Model(Layer(index, Layer.scale) for index in range(2))


def compiled():
    """Parts that are compiled, functions and modules, are traced as they are written."""

    class Part(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            # Not by inductor: oneDNN may have no products in fp8 any more in a process in which that has chosen its
            # instructions (with ONEDNN_MAX_CPU_ISA=AVX2).
            self.scaled = torch.compile(lambda x: x.tanh() * by, backend="eager")
            self.compile(backend="eager")

        def forward(self, x):
            return x + self.scaled(self.linear(x))

    return Stack(Part(1.0 + index % 2) for index in range(4))


RIGHT = (
    patched, hooked, subclasses, parametrized, tied, borrowing, stashing, writing, without_gradient, counting_depth,
    handing_on, twice, two_names_in_slices, compiled,
)  # fmt: skip


@pytest.mark.parametrize("make", RIGHT)
def test_it_trains_as_pytorch_does(make, tmp_path):
    check_as_pytorch(make, tmp_path)


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (1,), (0, 3)])
def test_frozen_layers_among_trained_ones(frozen, tmp_path):
    def make():
        model = stack(Layer.scale)()
        for index in frozen:
            model.layers[index].requires_grad_(False)
        return model

    check_as_pytorch(make, tmp_path)
    graph = traced(make)
    assert {path: meta.requires_grad for path, meta in graph.parameters.items()} == {
        f"layers.{index}.linear.weight": index not in frozen for index in range(4)
    }


def test_without_a_loss_or_a_gradient_there_is_nothing_to_train(tmp_path):
    class Two(Stack):
        def forward(self, x):
            return self.layers[0](x), x

    hardware = tiny.write_hardware(tmp_path)
    make = stack(Layer.scale)
    source = Source(lambda: Two(make().layers), {"x": X}, torch.float32)
    code = compile_model(source, ComputeConfig(hardware=hardware), tmp_path / "code")
    with pytest.raises(UserError, match=r"forward gives 2 results; .* one number"):
        ParallelModule(code, torch.device("cpu")).accumulate([{"x": X}])
    frozen = Source(lambda: make().requires_grad_(False), {"x": X}, torch.float32)
    with pytest.raises(UserError, match="what Stack returns gives no parameter a gradient"):
        compile_model(frozen, ComputeConfig(hardware=hardware), tmp_path / "frozen")


def test_gradients_pass_through_complex_numbers():
    class Turned(Stack):
        def forward(self, x):
            return torch.view_as_complex(super().forward(x) * self.layers[0].linear.weight[0, :2]).abs()

    graph = traced(lambda: Turned(stack(Layer.scale)().layers))
    assert all(parameter.requires_grad for parameter in graph.parameters.values())


values = st.sampled_from([1.0, 2.0])
ways = st.sampled_from(["scale", "act", "norm", "plain"])
parts = st.tuples(ways, st.sampled_from(["attribute", "_private", "dict", "closure", "tensor"]), values, st.booleans())


class Part(nn.Module):
    def __init__(self, way, kind, value, frozen):
        super().__init__()
        self.way = way
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight.requires_grad_(not frozen)
        setattr(self, "_held" if kind == "_private" else "held", {
            "dict": {"value": value}, "closure": closure(value), "tensor": torch.tensor(value),
        }.get(kind, value))  # fmt: skip

    def forward(self, x):
        held = vars(self).get("_held", vars(self).get("held"))
        held = held["value"] if isinstance(held, dict) else held() if callable(held) else held
        if self.way == "scale":
            return self.linear(x) * held
        if self.way == "act":
            return nn.functional.leaky_relu(self.linear(x), float(held)) if isinstance(held, float) else x.relu()
        return nn.functional.layer_norm(x, (WIDTH,)) if self.way == "norm" else self.linear(x)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(parts, min_size=1, max_size=2), min_size=2, max_size=5))
def test_with_and_without_reuse_the_graph_is_the_same(stacks):
    def make():
        return Stack(nn.Sequential(*(Part(*part) for part in parts)) for parts in stacks)

    graph, whole = traced(make), traced(make, "meta")
    assert str(graph) == str(whole)
    assert [graph.blocks[name] for name in graph.blocks] == [whole.blocks[name] for name in whole.blocks]
    assert graph.parameters == whole.parameters
    assert {name: value.tolist() for name, value in graph.buffers.items()} == {
        name: value.tolist() for name, value in whole.buffers.items()
    }
