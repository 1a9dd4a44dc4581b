"""Products in fp8 as the planner sees them: where they are taken, what they cost, and what backward keeps."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnscaler.codegen import generate
from nnscaler.compiler import Source
from nnscaler.graph import Call, Graph, Node, Ref, TensorMeta
from nnscaler.hardware import Hardware, load_hardware
from nnscaler.kernels import fp8
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.operators import spell
from nnscaler.operators.attention import attention
from nnscaler.placement import Shard
from nnscaler.plan import Key
from nnscaler.planner import find_plan
from nnscaler.planner import fp8 as fp8_costs
from nnscaler.planner.costs import CostModel
from nnscaler.planner.options import Option
from nnscaler.planner.price import price
from nnscaler.planner.problem import Decision, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planning import traced
from nnscaler.recompute import KEEPS_ALL, KEEPS_PRODUCTS, ON_DEVICE, RECOMPUTES_ALL, RECOMPUTES_ALL_BUT_ATTENTION, Level
from nnscaler.runtime import regions
from tests import tiny
from tests.planner.test_levels import said_and_held

M, K, N = 32, 16, 64
FP8 = {"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 2e9}


class Gated(nn.Module):
    """Three products, of which two take the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return torch.tanh(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


class InFp8(Gated):
    """The same, as generated code computes it."""

    def forward(self, x: Tensor) -> Tensor:
        x = fp8.rounded(torch.sigmoid(x))
        inner = nn.functional.silu(fp8.linear(x, self.gate.weight)) * fp8.linear(x, self.up.weight)
        return torch.tanh(fp8.linear(fp8.rounded(inner), self.down.weight))


class Straight(Gated):
    """A product of what the layer is given, and one of its result."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(self.gate(x)))


class StraightInFp8(Gated):
    def forward(self, x: Tensor) -> Tensor:
        inner = fp8.linear(fp8.rounded(x), self.gate.weight)
        return torch.tanh(fp8.linear(fp8.rounded(inner), self.down.weight))


class Shared(Gated):
    """What the layer is given is read by products and by what reads it in its own backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.gate(x)) * self.up(x)) + torch.sin(x)


class SharedInFp8(Gated):
    def forward(self, x: Tensor) -> Tensor:
        given = fp8.rounded(x)
        inner = torch.sin(fp8.linear(given, self.gate.weight)) * fp8.linear(given, self.up.weight)
        return fp8.linear(fp8.rounded(inner), self.down.weight) + torch.sin(x)


class Attended(nn.Module):
    """A product of attention's result, which is in another region, and kept by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query(torch.sigmoid(x)).unflatten(-1, (2, K // 2)).transpose(1, 2)
        return self.out(attention(heads, heads, heads).flatten(2))


class Routed(nn.Module):
    """A router's choice, and a product that it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.product = nn.Linear(K, N, bias=False), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2)
        return self.product(x) * scores.sum(-1, keepdim=True) * (chosen.sum(-1, keepdim=True) % 2)


class Stack(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.head = nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x)
        return self.head(x).float().sum()


class Trained(Stack):
    """What its layers are given has a gradient."""

    def __init__(self) -> None:
        super().__init__(Attended)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.head(x))


def stack(layer: type[nn.Module], keep: tuple[str, ...] = (), width: int = K, rows: int = M) -> Graph:
    inputs = {"x": torch.empty((rows, width), dtype=torch.bfloat16, device="meta")}
    return traced(Source(lambda: Stack(layer), inputs, fp8=True, fp8_keep_bf16=keep), "reuse_cache")


@pytest.fixture
def machine(tmp_path) -> Hardware:
    return load_hardware(tiny.write_hardware(tmp_path, flops=FP8))


def marked(graph: Graph) -> dict[str, list[str]]:
    """Block -> the modules whose products may be in fp8."""
    return {
        block.name: [node.module for node in block.nodes if node.may_be_fp8]
        for block in graph.all_blocks()
        if any(node.may_be_fp8 for node in block.nodes)
    }


def test_products_of_layers_may_be_in_fp8_but_no_head_and_no_router():
    assert marked(stack(Gated)) == {"gated": ["gate", "up", "down"]}
    assert marked(stack(Routed)) == {"routed": ["product"]}
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.empty((1, tiny.LENGTH), dtype=torch.int64, device="meta")
    source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, fp8=True)
    (modules,) = marked(traced(source, "reuse_cache")).values()
    assert [module.rpartition(".")[2] for module in modules] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    assert marked(traced(replace(source, dtype=torch.float32), "reuse_cache")) == {}
    assert marked(traced(replace(source, fp8=False), "reuse_cache")) == {}


@pytest.mark.parametrize("keep", [("first",), ("last",), ("first", "last")], ids="-".join)
def test_layers_that_stay_have_a_block_of_their_own(keep, machine):
    graph = stack(Gated, keep)
    blocks = [call.block for block in graph.blocks for call in graph.calls(block)]
    assert sorted(blocks) == ["gated"] * (4 - len(keep)) + ["gated_in_bf16"] * len(keep)
    assert list(marked(graph)) == ["gated"]
    order = [node.block for node in graph.root.nodes if isinstance(node, Call)]
    assert (order[0] == "gated_in_bf16") == ("first" in keep)
    assert (order[-1] == "gated_in_bf16") == ("last" in keep)
    plan = find_plan(graph, [Mesh((1,))], machine)
    assert {block for (block, _), way in plan.nodes.items() if way.in_fp8} == {"gated"}
    assert generate(plan).count("= fp8.linear(") == 3, "written once for all layers that have it"


def test_a_product_by_hand(machine):
    """Rates of 1e9 in bf16 and 2e9 in fp8; 1e11 bytes a second."""
    graph = stack(Gated)
    problem = build_problem(graph, CostModel(machine, Mesh((1,))), Recomputing(), 1)
    found = {d.name: d.options[0] for d in problem.decisions if d.kind == "unit" and d.options[0].rounded}
    assert set(found) == {node.name for node in graph.blocks["gated"].nodes if node.may_be_fp8}
    product, byte = 2 * M * K * N / 2e9, 1e-11
    x, weight, y = M * K, N * K, M * N
    gate = next(option for name, option in found.items() if "gate" in name)
    # x is rounded once for gate and up: read twice, and written in two orders.
    assert gate.seconds.forward == pytest.approx(product + byte * (6 * x / 2 + 3 * weight))
    assert gate.seconds.backward == pytest.approx(2 * product + byte * (6 * y + 3 * weight))
    assert gate.transient == 2 * (x + weight + y) + max(2 * x, 2 * y) + weight
    down = next(option for name, option in found.items() if "down" in name)
    assert down.seconds.forward == pytest.approx(product + byte * (6 * y + 3 * weight))


def test_a_product_that_memory_and_launches_bound_by_hand(tmp_path):
    """1e6 bytes a second, and a millisecond for each kernel; also where x, W, or both are frozen."""
    machine = load_hardware(tiny.write_hardware(tmp_path, flops=FP8, launch=1e-3, memory_bandwidth=1e6))
    x, weight, y, byte = M * K, N * K, M * N, 1e-6
    both = fp8_costs.Fp8Product(M, K, N, 2, takers=4, trains_x=True, trains_w=True)
    # The product, a fourth of x's rounding, which looks at x first, and W's, whose largest element is known.
    assert both.forward(machine) == pytest.approx(2.5e-3 + byte * (x + weight + 2 * y + 6 * x / 4 + 3 * weight))
    rounding = 2e-3 + byte * 6 * y
    of_x = 2e-3 + byte * (3 * weight + y + weight + 2 * x)
    of_w = 1e-3 + byte * (y + x + 2 * weight)
    assert both.backward(machine) == pytest.approx(rounding + of_x + of_w)
    assert replace(both, trains_w=False).backward(machine) == pytest.approx(rounding + of_x)
    assert replace(both, trains_x=False).backward(machine) == pytest.approx(rounding + of_w)
    assert replace(both, trains_x=False, trains_w=False).backward(machine) == 0


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"launch": 1e-3}, False),  # of the kernels that round
        ({"memory_bandwidth": 1e6}, False),
        ({"flops": {**FP8, "float8_e4m3fn": 1e9}}, False),
        ({"flops": {"float32": 1e9, "bfloat16": 1e9}}, False),
    ],
    ids=["fp8 is faster", "small products", "slow memory", "no faster products", "no products in fp8"],
)
def test_fp8_is_taken_where_it_is_faster(changes, taken, tmp_path):
    machine = load_hardware(tiny.write_hardware(tmp_path, **{"flops": FP8, **changes}))
    plan = find_plan(stack(Gated), [Mesh((1,))], machine)
    assert sum(way.in_fp8 for way in plan.nodes.values()) == 3 * taken


def test_on_an_h100_large_products_are_in_fp8_and_small_ones_are_not():
    costs = CostModel(load_hardware("h100"), Mesh((1,)), fused=True)
    for rows, taken in ((16384, True), (16, False)):
        config = tiny.config(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
        prepare_config(config, rows, "auto")
        tokens = torch.empty((1, rows), dtype=torch.int64, device="meta")
        source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, fp8=True)  # noqa: B023
        problem = build_problem(traced(source, "reuse_cache"), costs, Recomputing(), 1)
        assert sum(bool(option.rounded) for d in problem.decisions for option in d.options) == 7 * taken


def test_shards_that_no_product_in_fp8_takes_are_in_bf16(machine):
    """Of 16 columns, 8 on each device."""
    graph = stack(Gated)
    problem = build_problem(graph, CostModel(machine, Mesh((2,))), Recomputing(), 1)
    options = [(d, option) for d in problem.decisions if d.kind == "unit" for option in d.options]
    ways = {way.split: way.in_fp8 for d, option in options if "gate" in d.name for _, way in option.ways}
    assert ways == {"-": True, "*0": True, "n": True, "k": False}


@pytest.mark.parametrize("sizes", [(M, K, N), (M + 8, K, N), (M, K + 8, N), (M, K, N + 8)], ids=str)
def test_each_size_has_to_be_a_multiple_of_what_the_device_wants(sizes, machine):
    m, k, n = sizes
    block = stack(Gated).blocks["gated"]
    node = next(node for node in block.nodes if node.module == "down")
    given = [TensorMeta(shape, torch.bfloat16, True) for shape in ((m, k), (n, k))]
    found = fp8_costs.fp8_product(node, given, block, machine)
    assert (found is not None) == (sizes == (M, K, N))


def test_each_function_of_generated_code_rounds_what_it_is_given(machine):
    plan = find_plan(stack(Gated), [Mesh((1,))], machine)
    assert generate(plan).count("= fp8.rounded(") == 2, "one for gate and up"
    plan.recomputed["gated"] = {node.name for node in plan.graph.blocks["gated"].nodes if node.module == "up"}
    assert generate(plan).count("= fp8.rounded(") == 3, "up is in a region of its own"


def test_where_a_sum_is_split_each_device_adds_a_part_of_the_bias():
    node = Node("y", "aten.linear.default", (Ref("x"), Ref("w"), Ref("b")), {}, ("y",))
    given = [Ref("x_fp8"), Ref("w"), Ref("b")]
    assert spell(node, given, [], {}, in_fp8=True) == "fp8.linear(x_fp8, w) + b"
    assert spell(node, given, [], {"k": 2}, in_fp8=True) == "fp8.linear(x_fp8, w) + b / 2"


def cpu_has_products() -> bool:
    """Slow ones. Limited to AVX2, oneDNN has none any more once inductor has chosen its instructions."""
    one, scale = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("level", "fused"), [*((level, True) for level in ON_DEVICE), (KEEPS_ALL, False)], ids=str)
@pytest.mark.parametrize(("layer", "real"), [(Gated, InFp8), (Straight, StraightInFp8), (Shared, SharedInFp8)])
def test_backward_keeps_what_it_is_said_to(layer, real, level: Level, fused: bool, machine, monkeypatch):
    """As the compiler divides forward and backward, or without one; the scales, a number each, do not count."""
    if not cpu_has_products():
        pytest.skip("oneDNN has no products in fp8 here")
    monkeypatch.setattr(fp8, "_multiplies", lambda on_gpu: True)
    torch._dynamo.reset()
    graph = stack(layer)
    problem = build_problem(graph, CostModel(machine, Mesh((1,)), fused=fused), Recomputing(), 1)
    levels = {graph.root.name: {KEEPS_ALL: 1}, layer.__name__.lower(): {level: 4}}
    program = Program(problem)
    priced = price(program, Solution([0] * len(problem.decisions), levels))
    keys = [key for key in priced.memory if key.category in ("saved", "inside") and key.block == layer.__name__.lower()]
    said = sum(priced.memory[key] for key in keys)
    model = real().bfloat16()
    wrapper = level.region or level.call
    function = model.forward if wrapper is None else functools.partial(wrapper, model.forward)
    if fused:
        function = torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() and not isinstance(tensor, nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(torch.randn(M, K).bfloat16().requires_grad_())
    assert result.requires_grad
    assert said == 4 * sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_a_real_run_keeps_the_copy_of_what_attention_keeps_too(tmp_path, monkeypatch):
    """Beyond what layers keep that are computed again: heads, attention's result and its sums of rows; and the copy."""
    if not cpu_has_products():
        pytest.skip("oneDNN has no products in fp8 here")
    torch._dynamo.reset()
    monkeypatch.setattr(fp8, "_multiplies", lambda on_gpu: True)
    monkeypatch.setattr(regions, "_on_accelerator", lambda args: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    source = Source(Trained, {"x": torch.zeros(1, M, K, dtype=torch.bfloat16)}, fp8=True)
    graph = traced(source, "reuse_cache")
    hardware = tiny.write_hardware(tmp_path, flops=FP8)
    costs = CostModel(load_hardware(hardware), Mesh((1,)), fused=True)
    program = Program(build_problem(graph, costs, Recomputing(), 1))
    said, held = zip(*(
        said_and_held(level, "attended", 4, source, program, hardware, tmp_path, monkeypatch)
        for level in (RECOMPUTES_ALL, KEEPS_ALL)
    ))  # fmt: skip
    assert said[1] - said[0] == 4 * (2 * M * K + 2 * M * K + 4 * 2 * M + M * K)
    scales = 4 * 4 * 2  # of x and of attention's result, which are not counted
    assert held[1] - held[0] == said[1] - said[0] + scales


def test_the_copy_of_what_a_region_is_given_lies_there_while_the_region_runs_again(machine):
    """While the second product runs backward: itself, what it rounds, its input, and the copy of the layer's input."""
    graph = stack(Straight)
    problem = build_problem(graph, CostModel(machine, Mesh((1,)), fused=True), Recomputing(), 1)
    inner, outer, weight = M * N, M * K, N * K  # elements

    def working(level: Level) -> dict[Key, float]:
        levels = {graph.root.name: {KEEPS_ALL: 1}, "straight": {level: 4}}
        found = price(Program(problem), Solution([0] * len(problem.decisions), levels))
        return {key: size for key, size in found.memory.items() if key.category == "working"}

    product = 2 * (inner + outer + weight) + 2 * inner + weight
    assert working(RECOMPUTES_ALL_BUT_ATTENTION) == {Key("working"): product + 2 * inner + outer}
    # As a whole also tanh's result, which is free when the product runs backward.
    whole = {Key("working", "straight", "backward"): 2 * inner + outer + 2 * outer, Key("working"): product - 2 * outer}
    assert working(RECOMPUTES_ALL) == whole


def test_what_is_not_kept_is_not_free_later_either(machine):
    for fused, least in ((True, 0), (False, M * N)):
        problem = build_problem(stack(Gated), CostModel(machine, Mesh((1,)), fused=fused), Recomputing(), 1)
        (inner,) = (flow for flow in problem.flows if flow.tensor == "mul")
        assert Program(problem).flows.size(inner, smallest=True)[1] == least


@pytest.mark.parametrize(("level", "byte"), [(KEEPS_ALL, 1), (KEEPS_PRODUCTS, 2)], ids=str)
def test_what_a_region_is_given_is_kept_as_it_is_where_the_region_runs_again(level, byte, machine):
    """Rows of x lie on two devices, and are gathered for gate and up, of which each device computes a half."""
    graph = stack(Gated)
    problem = build_problem(graph, CostModel(machine, Mesh((2,)), fused=True), Recomputing(), 1)
    splits = {"gate": "n", "up": "n", "down": "k"}

    def wanted(decision: Decision, option: Option) -> bool:
        if decision.kind == "unit" and decision.name in splits:
            return option.ways[0][1].split == splits[decision.name]
        if decision.block == "gated" and decision.kind != "parameter" and decision.name != "mul":
            return option.outputs[0] == (Shard(0),)
        return decision.name != "mul" or option.outputs[0] == (Shard(1),)

    chosen = [next(i for i, o in enumerate(d.options) if wanted(d, o)) for d in problem.decisions]
    priced = price(Program(problem), Solution(chosen, {graph.root.name: {KEEPS_ALL: 1}, "gated": {level: 4}}))
    shard = 2 * M // 2 * K  # in bf16, which the sigmoid's own backward reads
    assert priced.memory[Key("saved", "gated", "sigmoid", level.name)] == 4 * (byte * M * K + shard)


@pytest.mark.parametrize(("sizes", "held"), [((3, 5, 7), 2 * 3 * 7 + 7 * 5), ((3, 5, 2), 2 * 3 * 5 + 2 * 5)])
def test_most_that_is_rounded_at_a_time(sizes, held):
    """The weight, and in two orders the input in forward or the result's gradient in backward."""
    m, k, n = sizes
    assert fp8_costs.Fp8Product(m, k, n, 2, takers=1, trains_x=True, trains_w=True).held == held
