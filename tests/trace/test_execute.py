"""Strategies that execute the model: values that Python reads are real, and the path they choose is compiled."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnscaler import ComputeConfig, Source, UserError, compile_model, register_op
from nnscaler.first_values import initial_parameters
from nnscaler.graph import Call
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.runtime.module import ParallelModule
from nnscaler.trace import STRATEGIES, execute, trace
from nnscaler.trace.offload import Offload, OffloadAttention, run_on
from nnscaler.trace.strategies import Strategy
from tests import tiny
from tests.launch import run

SEED = 5
CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        if self.up(x).sum() > 0:
            return x + self.up(x).sigmoid()
        return x - self.down(x).relu()


class Reader(nn.Module):
    """Its layers take one of two paths each, and its head is applied as often as a value says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(6)])
        self.head = nn.Linear(16, 16)
        self.register_buffer("limits", torch.tensor([0, 1000]))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        low, high = self.limits.tolist()
        times = 1 + min(max(int(x.abs().sum().item()), low), high) % 5
        for _ in range(times):
            x = self.head(x)
        return x


def reader() -> Source:
    return Source(Reader, {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(1))}, torch.float32, SEED)


def with_weights(source: Source) -> nn.Module:
    """The model as anyone would run it, with the weights of its seed."""
    meta, _ = source.build()
    model = source.make()
    with torch.no_grad():
        for name, value in initial_parameters(meta, source.seed, CPU):
            model.get_parameter(name).copy_(value)
    return model


def traced(source, strategy):
    model, buffers = source.build()
    return trace(model, source.inputs, buffers, strategy, source.seed)


@pytest.fixture
def offloaded(monkeypatch):
    """A strategy that goes the way of cuda_run_cpu_offload with the CPU as its device."""
    monkeypatch.setitem(STRATEGIES, "offloaded", Strategy("for tests", device="cpu", offload=True))
    return "offloaded"


def paths_taken(model, x):
    """For each layer of `Reader`, whether it goes up; and how often the head is applied."""
    ups = []
    for layer in model.layers:
        ups.append(bool(layer.up(x).sum() > 0))
        x = layer(x)
    return ups, 1 + int(x.abs().sum().item()) % 5


def test_the_path_that_real_values_choose_is_traced():
    source = reader()
    ups, times = paths_taken(with_weights(source), source.inputs["x"])
    assert True in ups, "the test wants layers of both kinds"
    assert False in ups, "the test wants layers of both kinds"
    assert times == 3, "the test wants a value that counts"
    graph = traced(source, "cpu")
    goes_up = {name: any("sigmoid" in node.op for node in block.nodes) for name, block in graph.blocks.items()}
    assert len(graph.blocks) == 2, "equal paths are one block"
    assert [goes_up[node.block] for node in graph.root.nodes if isinstance(node, Call)] == ups
    assert sum(node.op == "aten.linear.default" for node in graph.root.nodes) == times
    assert all(node.source.startswith("test_execute.py:") for node in graph.root.nodes)


def forward(directory) -> torch.Tensor:
    module = ParallelModule(directory, CPU)
    source = reader()
    meta, _ = source.build()
    for name, value in initial_parameters(meta, SEED, CPU):
        if name in module.parameters_to_load():
            module.load_one(name, value[module.box(name).slices])
    return module(**source.inputs).detach().numpy()


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_compiled_computes_what_the_model_computes(devices, tmp_path):
    hardware = tiny.write_hardware(tmp_path)
    config = ComputeConfig(devices, devices, trace_strategy="cpu", hardware=hardware)
    directory = compile_model(reader(), config, tmp_path / "code")
    plan = json.loads((directory / "plan.json").read_text())
    splits = {node["split"] for block in plan["blocks"].values() for node in block["nodes"].values()}
    if devices > 1:
        assert splits & {"n", "d0", "d1"}, "two devices share the work"
    wanted = with_weights(reader())(**reader().inputs).detach()
    for found in run(devices, forward, directory):
        assert tiny.close(torch.from_numpy(found), wanted) < 1e-5


def test_offloading_gives_the_same_graph(offloaded):
    assert str(traced(reader(), offloaded)) == str(traced(reader(), "cpu"))


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
def test_executed_or_not_the_graph_of_a_model_that_reads_nothing_is_the_same(implementation, offloaded):
    config = tiny.config(num_hidden_layers=3)
    prepare_config(config, tiny.LENGTH, implementation)
    tokens = torch.randint(tiny.VOCABULARY, (1, tiny.LENGTH), generator=torch.Generator().manual_seed(0))
    source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)
    wanted = str(traced(source, "reuse_cache"))
    for strategy in ("meta", "cpu", offloaded):
        assert str(traced(source, strategy)) == wanted, strategy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["cuda", "cuda_run_cpu_offload"])
def test_strategies_on_a_gpu(strategy, monkeypatch):
    def from_cpu(model, seed, device):  # the same seed gives other numbers on another kind of device
        return ((name, value.to(device)) for name, value in initial_parameters(model, seed, CPU))

    monkeypatch.setattr(execute, "initial_parameters", from_cpu)
    assert str(traced(reader(), strategy)) == str(traced(reader(), "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("strategy", ["cuda", "cuda_run_cpu_offload"])
def test_without_a_gpu_its_strategies_are_refused(strategy):
    with pytest.raises(UserError, match=f"'{strategy}' needs a CUDA device.*reuse_cache, meta, cpu"):
        ComputeConfig(trace_strategy=strategy)
    with pytest.raises(UserError, match=f"'{strategy}' needs a CUDA device"):
        traced(reader(), strategy)


def test_inputs_without_values_cannot_be_executed():
    source = Source(Reader, {"x": torch.empty(8, 16, device="meta")}, torch.float32)
    with pytest.raises(UserError, match="input 'x' is on the meta device"):
        traced(source, "cpu")


def test_weights_beyond_the_machine_are_refused_before_they_are_made():
    source = Source(lambda: nn.Linear(10**6, 10**8), {"input": torch.zeros(1, 10**6)}, torch.float32)
    with pytest.raises(UserError, match="executing the model takes 400000 GB"):
        traced(source, "cpu")


def test_what_is_read_only_while_traced_is_refused():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            if torch.compiler.is_exporting() and x.sum().item() > 0:
                return self.linear(x)
            return self.linear(x) * 2

    with pytest.raises(UserError, match=r"reads a tensor's value at test_execute.py:\d+ while it is traced"):
        traced(Source(Model, {"x": torch.ones(2, 4)}, torch.float32), "cpu")


def test_a_registered_operator_that_reads_values_is_one_node(offloaded):
    @register_op("b d^ -> b d^", name="test_reads")
    def reads(x):
        return x * 2 if x.sum().item() > 0 else x.clone()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = reads(self.linear(x))
            return y * 3 if y.sum() > 0 else y

    source = Source(Model, {"x": torch.ones(2, 4)}, torch.float32)
    for strategy in ("cpu", offloaded):
        assert [node.op for node in traced(source, strategy).root.nodes][:2] == ["aten.linear.default", "test_reads"]
    with pytest.raises(UserError, match=r"use a trace strategy that executes it \(cpu, cuda, "):
        traced(source, "meta")


def test_the_traced_model_is_left_as_it_was():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0
            self.register_buffer("limit", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.shape = x.shape
            return self.linear(x) * (2 if self.limit.item() > 0 else 3)

    source = Source(Model, {"x": torch.ones(2, 4)}, torch.float32)
    model, buffers = source.build()
    before = dict(vars(model))
    trace(model, source.inputs, buffers, "cpu")
    assert vars(model) == before


def program(weight, x):
    """In-place writes, views of them, results that are arguments, attention, and factories."""
    x = F.linear(x, weight)
    x.view(-1)[:4].add_(1)
    x.mul_(2)[0].zero_()
    torch.add(x, 1, out=x)
    values, places = x.topk(2)
    y = torch.zeros_like(x).scatter_(-1, places, values) + torch.arange(x.shape[-1], dtype=x.dtype)
    y = F.scaled_dot_product_attention(y[None], x[None], torch.cat([x, y], -1)[None], is_causal=True)[0]
    return y.masked_fill(y.isnan(), 0).split(3, -1)[0].contiguous()


def test_offloaded_operators_compute_the_same_and_run_on_the_device():
    weight, x = torch.randn(8, 8), torch.randn(6, 8)
    wanted = program(weight, x)
    ran = []

    class Noted(Offload):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Noted(CPU), OffloadAttention(CPU):
        found = program(weight, x)
    assert torch.equal(found, wanted)
    assert {"aten.topk.default", "aten.add.out"} <= set(ran)
    assert not any("scaled_dot_product" in name for name in ran), "attention goes as a whole"


def test_an_operator_on_a_device_gets_copies_and_writes_into_the_originals():
    seen = []

    def write(x, scale):
        seen.append(x)
        return x.mul_(scale), x.sum()

    x = torch.ones(3)
    returned, total = run_on(CPU, write, (x, 2), {})
    assert seen[0] is not x
    assert returned is x
    assert x.tolist() == [2, 2, 2]
    assert total == 6
