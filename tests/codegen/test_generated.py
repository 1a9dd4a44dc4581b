"""Generated code: what computes without gradients gives none, and variables that nobody uses any more are let go."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler import ComputeConfig, Source, compile_model
from nnscaler.codegen import generate
from nnscaler.codegen.body import Body
from nnscaler.graph import Block as GraphBlock
from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.placement import PARTIAL, REPLICATE, Shard
from nnscaler.plan import NodePlan
from nnscaler.planner import find_plan
from nnscaler.recompute import KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL, SAME_ON_HOST
from nnscaler.trace import trace
from tests import tiny
from tests.codegen.plain import beside_plain

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    def __init__(self, _index: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        with torch.no_grad():
            gate = self.second(y).sigmoid() + x
            with torch.enable_grad():
                again = self.second(y) * 0.1
        return ((y * gate + again + 1) * 3 + 0) / 2 * 1  # of these, two change nothing and are left out


class Model(nn.Module):
    """Parts without gradients in the model and in its repeated layers; within them, one with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        with torch.no_grad():
            largest = x.abs().amax(1, keepdim=True)
        return (x / largest).square().sum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).tanh() + x


class Frozen(nn.Module):
    """Layers called without gradients: one that is called with them too, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.layers[0](x)
        with torch.no_grad():
            still = self.layers[0](self.layers[1](x))
        for layer in self.layers[2:]:
            x = layer(x) * still
        return x.square().sum()


@pytest.mark.parametrize("strategy", ["reuse_cache", "meta"])
@pytest.mark.parametrize("make", [Model, Frozen])
def test_parts_without_gradients_give_none(make, strategy, tmp_path):
    hardware = tiny.write_hardware(tmp_path)
    compute = ComputeConfig(hardware=hardware, trace_strategy=strategy)
    compile_model(Source(make, {"x": X}, torch.float32), compute, tmp_path / "code")
    plain, (found, loss), gradients = beside_plain(tmp_path / "code", make, X)
    torch.testing.assert_close(found.float(), loss)
    for _, mine, wanted in gradients:
        torch.testing.assert_close(mine, wanted)
    assert len(gradients) >= sum(weight.grad is not None for weight in plain.parameters())


def kept_to_the_end(function: ast.FunctionDef) -> set[str]:
    """Variables made and last used before the function's last `del`, which none deletes."""
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    deleted = [name for node in statements if isinstance(node, ast.Delete) for name in node.targets]
    last = max((name.lineno for name in deleted), default=0)
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    made = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    later = {name.id for name in names if name.lineno > last}
    return made - later - {name.id for name in deleted if isinstance(name, ast.Name)}


def test_tensors_that_nobody_uses_are_let_go_before_what_follows(tmp_path):
    """In the layer, which has three steps (before, in and after attention), and in the model around layers."""
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.zeros(1, tiny.LENGTH, dtype=torch.long)
    source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)
    compile_model(source, ComputeConfig(2, 2, hardware=tiny.write_hardware(tmp_path)), tmp_path / "code")
    code = ast.parse((tmp_path / "code" / "gencode_stage0.py").read_text())
    functions = {node.name: node for node in code.body if isinstance(node, ast.FunctionDef)}
    for name, least in (("llama_decoder_layer", 2), ("forward", 1)):
        lets_go = [node for node in ast.walk(functions[name]) if isinstance(node, ast.Delete)]
        assert len(lets_go) >= least, "between one step and the next"
        assert kept_to_the_end(functions[name]) <= {"device", "i"}
    first = next(node for node in ast.walk(functions["llama_decoder_layer"]) if isinstance(node, ast.Delete))
    assert "input_layernorm_weight_whole" in ast.unparse(first), "a gathered weight goes with the step that used it"


def test_a_bias_is_divided_by_the_devices_of_all_axes_along_which_its_product_is_a_sum():
    """Each of 2 x 3 devices has a sixth of the terms, or a half where only the first axis divides them."""
    shapes = {"x": (4, 12), "w": (8, 12), "b": (8,), "y": (4, 8)}
    tensors = {name: TensorMeta(shape, torch.float32) for name, shape in shapes.items()}
    node = Node("y", "aten.linear.default", tuple(map(Ref, "xwb")), {}, ("y",))
    given = GraphBlock("model", "Model", tensors, inputs=list("xwb"), outputs=["y"], nodes=[node])
    for split, second, part in (("k,k", Shard(1), 6), ("k,-", REPLICATE, 2)):
        layouts = [(Shard(1), second), (Shard(1), second), (REPLICATE, REPLICATE)]
        way = NodePlan(split, tuple(layouts), ((PARTIAL, PARTIAL if part == 6 else REPLICATE),))
        plan = SimpleNamespace(mesh=Mesh((2, 3)), splits=False, nodes={("model", "y"): way})
        body = Body(plan, given, {(name, layout): name for name, layout in zip("xwb", layouts)})
        assert body._node(node, []) == [f"y = F.linear(x, w, b / {part})"]


def test_calls_that_keep_least_come_first(tmp_path):
    """Backward comes to them last, when what the others kept is gone."""
    config = tiny.config(num_hidden_layers=6)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.zeros(1, tiny.LENGTH, dtype=torch.long)
    model, buffers = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32).build()
    graph = trace(model, {"input_ids": tokens, "labels": tokens}, buffers)
    hardware = load_hardware(tiny.write_hardware(tmp_path))
    plan = find_plan(graph, [Mesh((1,))], hardware, recompute_modules=())
    counts = {KEEPS_PRODUCTS: 1, RECOMPUTES_ALL: 3, KEEPS_ALL: 2}
    code = generate(replace(plan, levels={**plan.levels, "llama_decoder_layer": counts}))
    lines = code[code.index("def forward(") :].splitlines()
    calls = [line for line in lines if "llama_decoder_layer" in line]
    levels = re.findall(r'axes, "([^"]*)"', "\n".join(calls))
    assert levels == [str(level) for level in (RECOMPUTES_ALL, KEEPS_PRODUCTS, KEEPS_ALL)]
    assert re.findall(r"in range\((.*)\)", "\n".join(lines)) == ["3", "4, 6"], "the fourth layer is called by itself"


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, mask, x):
        return self.linear(x) * mask + x


class MaskedLayers(nn.Module):
    """Layers that hand on their second argument; the first one lies otherwise on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.layers = nn.Parameter(torch.ones(1, 8)), nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x):
        mask = self.mask * 2
        for layer in self.layers:
            x = layer(mask, x)
        return x.square().sum()


def test_calls_are_one_loop_where_what_is_handed_on_lies_as_it_is_taken(tmp_path):
    model, buffers = Source(MaskedLayers, {"x": X}, torch.float32).build()
    hardware = load_hardware(tiny.write_hardware(tmp_path))
    plan = find_plan(trace(model, {"x": X}, buffers), [Mesh((2,))], hardware, recompute_modules=())
    (made,), (mask, taken) = plan.outputs["masked"], plan.inputs["masked"]
    assert made == taken != mask
    loop = 'for i in range(3):\n        layers = masked(scope(w, f"layers.{i}."), axes, "keeps all", mul, layers)\n'
    assert loop in generate(plan)
    otherwise = replace(plan, outputs={**plan.outputs, "masked": [mask]})
    assert "for i in" not in generate(otherwise), "it comes to the next call as that takes it"


class MaskedTwice(MaskedLayers):
    """Of four layers, two have a mask, and two another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Masked() for _ in range(4))

    def forward(self, x):
        first, second = self.mask * 2, self.mask * 3
        for layer, mask in zip(self.layers, (first, first, second, second)):
            x = layer(mask, x)
        return x.square().sum()


class MaskedApart(MaskedTwice):
    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(self.mask * (number + 2), x)
        return x.square().sum()


@pytest.mark.parametrize(("make", "shared"), [
    (MaskedLayers, ["mul"]), (MaskedTwice, ["mul", "mul_1"]), (MaskedApart, [""]),
])  # fmt: skip
def test_what_several_calls_have_stays_on_the_device(make, shared, tmp_path):
    """What they keep on the host is theirs alone."""
    model, buffers = Source(make, {"x": X}, torch.float32).build()
    hardware = load_hardware(tiny.write_hardware(tmp_path))
    plan = find_plan(trace(model, {"x": X}, buffers), [Mesh((1,))], hardware, recompute_modules=())
    (calls,) = plan.levels["masked"].values()
    code = generate(replace(plan, levels={**plan.levels, "masked": {SAME_ON_HOST[KEEPS_ALL]: calls}}))
    assert sorted(set(re.findall(r"with axes\.host\.keeping\((.*)\):", code))) == shared


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(8, 8), Inner()

    def forward(self, x):
        y = self.inner(self.before(x))
        return y * y.sigmoid()


class Outers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Outer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def test_a_region_gives_what_is_used_after_it_and_nothing_else(tmp_path):
    """Two products and what lies between them are one region, which is computed again: only its result leaves it. What
    comes before and after is in regions of its own."""
    inputs = {"x": X}
    model, buffers = Source(Outers, inputs, torch.float32).build()
    hardware = load_hardware(tiny.write_hardware(tmp_path))
    plan = find_plan(trace(model, inputs, buffers), [Mesh((1,))], hardware, recompute_modules=("Inner",))
    functions = [node for node in ast.walk(ast.parse(generate(plan))) if isinstance(node, ast.FunctionDef)]
    (region,) = (one for one in functions if "tanh" in ast.unparse(one))
    assert region.name == "outer_again_1"
    assert "@region" in ast.unparse(region)
    (given,) = (node for node in ast.walk(region) if isinstance(node, ast.Return))
    assert isinstance(given.value, ast.Name)
    assert ast.unparse(region).count("linear") == 2
    assert "sigmoid" not in ast.unparse(region)
    (outer,) = (one for one in functions if one.name == "outer")
    text = ast.unparse(outer)
    assert text.index("before") < text.index("outer_again_1") < text.index("outer_region_2")
