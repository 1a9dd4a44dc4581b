"""Predicted bytes and seconds against numbers worked out by hand, in bf16 and on more than one device.

The graph has three operators: h = x @ w.T, silu(h), and its sum; x is [64, 256] and w [512, 256], in bf16. The machine
does 1e9 operations a second, moves 1e9 bytes a second in memory and 1e6 between devices, without latencies.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.compiler import Source
from nnscaler.graph import Block, Graph, Node, Ref, TensorMeta
from nnscaler.hardware import Hardware, load_hardware
from nnscaler.mesh import Mesh
from nnscaler.operators import bind, operator_of
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard
from nnscaler.plan import Key
from nnscaler.planner import find_plan
from nnscaler.planner.costs import CostModel, Local, Seconds
from nnscaler.planner.flows import resharding
from nnscaler.planner.options import unit_options
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Flow, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.profiler.operators import Part
from nnscaler.recompute import KEEPS_ALL
from nnscaler.report.values import Work, plan_report
from nnscaler.reshard import reshards
from nnscaler.runtime import collectives, gathering
from nnscaler.sums import IN_FP32, gradient_sum
from nnscaler.trace import trace
from nnscaler.units import divide
from tests import tiny

ROWS, INNER, OUTER = 64, 256, 512
X, H, W = ROWS * INNER, ROWS * OUTER, INNER * OUTER  # elements
OPERATIONS, MEMORY, LINK = 1e9, 1e9, 1e6  # a second


class ThreeOperators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INNER, OUTER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.linear(x)).sum()


@pytest.fixture(scope="module")
def graph() -> Graph:
    inputs = {"x": torch.empty((ROWS, INNER), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(ThreeOperators, inputs).build()
    return trace(model, inputs, buffers)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Hardware:
    link = {"bandwidth": LINK, "latency": 0.0}
    folder = tmp_path_factory.mktemp("machine")
    return load_hardware(tiny.write_hardware(folder, memory_bandwidth=MEMORY, intra=link, inter=link))


def by_rows(graph: Graph, machine: Hardware, devices: int) -> Price:
    """Every operator with its rows split over the devices, the weight whole, its gradient exchanged each time."""
    problem = build_problem(graph, CostModel(machine, Mesh((devices,))), Recomputing(), 2)
    rows = (Shard(0),) if devices > 1 else (REPLICATE,)
    chosen = []
    for decision in problem.decisions:
        fitting = [
            index
            for index, option in enumerate(decision.options)
            if (decision.kind == "unit" and option.inputs[0] == rows)
            or (
                decision.kind == "parameter"
                and (option.outputs[0], option.memory["gradients"]) == ((SHARED,), 4 * W / devices)
            )
            or decision.kind in ("input", "output")
        ]
        chosen.append(fitting[0])
    evaluation = price(Program(problem), Solution(chosen, {graph.root.name: {KEEPS_ALL: 1}}))
    assert evaluation is not None
    return evaluation


def total(values: dict, category: str, detail: str = "") -> float:
    return sum(value for key, value in values.items() if key.category == category and detail in ("", key.detail))


@pytest.mark.parametrize("devices", [1, 2])
def test_three_operators(graph, machine, devices):
    found = by_rows(graph, machine, devices)
    product = 2 * ROWS * INNER * OUTER / OPERATIONS / devices
    moved = 2 * H / MEMORY / devices  # h or silu(h), in bf16
    scalar = 2 / MEMORY
    forward = product + 2 * moved + moved + scalar
    assert total(found.seconds, "forward") == pytest.approx(forward, rel=1e-3)
    # The product: for the weight alone. silu: reads h and a gradient, writes one. The sum: writes one.
    backward = product + 3 * moved + moved + scalar
    assert total(found.seconds, "backward") == pytest.approx(backward, rel=1e-3)
    read_and_written = 2 * (X + H) / devices + 2 * W  # by the product, whose result silu's backward has read before
    assert found.memory[Key("working")] == read_and_written - 2 * H / devices
    owned = W / devices
    assert total(found.memory, "parameter", "parameters") == 2 * W
    assert total(found.memory, "parameter", "gradients") == 4 * owned
    assert total(found.memory, "parameter", "master weights") == 4 * owned, "of a bf16 weight"
    assert total(found.memory, "parameter", "moments") == 8 * owned
    assert total(found.memory, "saved") == 2 * (X + H) / devices, "x for the weight's gradient, h for silu's"
    # Master weight and two moments are read and written; the gradient is read, scaled, and read again; the master is
    # read once more for the weight that is written.
    state = owned * (2 * (4 + 8) + 4 * 4 + 4 + 2) / MEMORY
    # Backward's bf16 gradient is read; in fp32 its sum is written, which every second micro-batch reads, or what is
    # exchanged, of which that one adds the owned part.
    added = (W if devices == 1 else owned * 3) * 4 / 2
    copied = (W * (2 + 4) + added) / MEMORY
    gathered = 2 * W * (devices - 1) / devices / LINK
    assert total(found.seconds, "update") == pytest.approx((state + gathered) / 2 + copied, rel=1e-3)
    assert total(found.beside, "exchange") == pytest.approx(4 * W * (devices - 1) / devices / LINK, rel=1e-3), "in fp32"


def test_tokens_a_second_are_those_of_a_device(graph, machine):
    plan = find_plan(graph, [Mesh((2,), 2)], machine, micro_batches=3)
    predicted = plan_report(plan, Work(ROWS, (6e6, 3e6), OPERATIONS))["predicted"]
    seconds = plan.step_seconds
    assert predicted["tokens_per_second_per_gpu"] == pytest.approx(3 * ROWS / seconds / 2, rel=1e-5)
    assert predicted["mfu"] == pytest.approx(3 * 6e6 / seconds / 2 / OPERATIONS, rel=1e-5)
    assert predicted["mfu_causal"] == pytest.approx(3 * 3e6 / seconds / 2 / OPERATIONS, rel=1e-5)
    assert (predicted["micro_batch_flops"], predicted["micro_batch_flops_causal"]) == (6e6, 3e6)


def test_a_gathered_weight_comes_back_in_fp32(machine):
    """16 bf16 rows a device: forward gathers 2 bytes an element, backward adds up 4."""
    meta = TensorMeta((32, 8), torch.bfloat16, True)
    flow = Flow("w", "model", meta, (0, 0), is_parameter=True)
    problem = SimpleNamespace(costs=CostModel(machine, Mesh((2,))), resharding={})
    seconds = resharding(problem, flow, (Shard(0),), (SHARED,))
    assert seconds is not None
    assert seconds.forward == pytest.approx(32 * 8 * 2 / 2 / LINK)
    assert seconds.backward == pytest.approx(32 * 8 * 4 / 2 / LINK)
    assert resharding(problem, replace(flow, is_parameter=False), (Shard(0),), (REPLICATE,)).forward == seconds.forward
    narrow = CostModel(machine, Mesh((2,)), sums=gradient_sum("bf16", 2, 8))
    found = resharding(SimpleNamespace(costs=narrow, resharding={}), flow, (Shard(0),), (SHARED,))
    assert found is not None
    assert (found.forward, found.backward) == (seconds.forward, seconds.backward / 2)
    frozen = replace(flow, meta=replace(meta, requires_grad=False))
    assert resharding(SimpleNamespace(costs=narrow, resharding={}), frozen, (Shard(0),), (REPLICATE,)).backward == 0


COPY = 2 * 3  # a byte is read and written, in strides


@pytest.mark.parametrize(("source", "target", "links", "copies"), [
    (PARTIAL, REPLICATE, 2 * 1 / 2, 1),  # which keeps what it was given
    (Shard(0), REPLICATE, 1 / 2, 0),  # whose shards come to lie one behind the other
    (Shard(1), REPLICATE, 1 / 2, 1),
    (PARTIAL, Shard(0), 1 / 2, 0),
    (PARTIAL, Shard(1), 1 / 2, 1),
    (Shard(0), Shard(1), 1 / 4, 1 / 2),
])  # fmt: skip
def test_resharding_by_hand(machine, source, target, links, copies):
    """[32, 8] in fp32 between two devices: the part of its bytes that a device sends, and copies as often."""
    costs = CostModel(replace(machine, memory_bandwidth=LINK), Mesh((2,)))
    changes = reshards((source,), (target,))
    assert changes is not None
    seconds = costs.resharding(TensorMeta((32, 8), torch.float32), (source,), changes)
    assert seconds.forward == pytest.approx(32 * 8 * 4 * (links + COPY * copies) / LINK)


@pytest.mark.parametrize(("source", "target", "forward", "backward"), [
    (REPLICATE, Shard(1), 2 / 2, (1 / 2, 2 * 3)),  # a slice is read and written; its gradient is gathered, in strides
    (SHARED, Shard(0), 2 / 2, (0, 2 / 2)),  # its gradient is a slice of nothing else
    (SHARED, REPLICATE, 0, (0, 2 / 2)),  # the gradient is divided by the devices
    (REPLICATE, SHARED, 0, (2 * 1 / 2, 2 * 3)),  # whose terms are added up
])  # fmt: skip
def test_what_no_other_device_takes_part_in_by_hand(machine, source, target, forward, backward):
    """[32, 8] in fp32: the times that its bytes are moved in memory, or sent. Launching takes 1 ms."""
    costs = CostModel(replace(machine, memory_bandwidth=LINK, launch=1e-3), Mesh((2,)))
    meta = TensorMeta((32, 8), torch.float32, True)
    seconds = costs.resharding(meta, (source,), reshards((source,), (target,)))
    size, (sent, moved) = 32 * 8 * 4 / LINK, backward
    assert seconds.forward == pytest.approx(size * forward + (1e-3 if forward else 0))
    assert seconds.backward == pytest.approx(size * (sent + moved) + (0 if sent else 1e-3))
    without = costs.resharding(replace(meta, requires_grad=False), (source,), reshards((source,), (target,)))
    assert (without.forward, without.backward) == (seconds.forward, 0)
    alone = CostModel(costs.hardware, Mesh((1,)))
    assert alone.resharding(meta, (source,), reshards((source,), (target,))).forward == 0


def test_weights_are_gathered_early_up_to_what_there_is(graph, machine):
    assert build_problem(graph, CostModel(machine, Mesh((2,))), Recomputing(), 1).gathered_early == 2 * W


@pytest.mark.parametrize(
    ("sums", "travels_as"), [(IN_FP32, torch.float32), (gradient_sum("bf16", 2, 8), torch.bfloat16)]
)
def test_what_runs_adds_up_a_gathered_weights_gradient_in_fp32(sums, travels_as, monkeypatch):
    sent = []

    def start_gradient_sum(result, terms, group, how):
        sent.append(terms)
        assert how is sums

    monkeypatch.setattr(gathering, "start_gather", lambda shard, axis, dtype: (torch.cat([shard, shard]), None))
    monkeypatch.setattr(gathering, "finish_gather", lambda whole, work, dim: whole)
    monkeypatch.setattr(collectives, "start_gradient_sum", start_gradient_sum)
    given = []
    gathers = gathering.Gathers(lambda parameter, work, gradient: given.append(gradient), sums=sums)
    shard = nn.Parameter(torch.ones((2, 4), dtype=torch.bfloat16))
    axis = SimpleNamespace(size=2, group=None)
    whole = gathers.weight(shard, (axis, 0))
    (whole * 1.0).sum().backward()
    assert [gradient.dtype for gradient in (*sent, *given)] == [travels_as, torch.float32]
    assert given[0].shape == shard.shape


def attention_block(causal: bool, frozen: str = "") -> Block:
    """Queries [2, 8, 128, 16], keys and values [2, 4, 128, 16]; `frozen` ones need no gradient."""
    block = Block("model", "Model")
    shapes = {"q": (2, 8, 128, 16), "k": (2, 4, 128, 16), "v": (2, 4, 128, 16), "o": (2, 128, 8, 16)}
    block.tensors = {name: TensorMeta(shape, torch.bfloat16, name != frozen) for name, shape in shapes.items()}
    block.inputs = ["q", "k", "v"]
    args = tuple(Ref(name) for name in block.inputs)
    block.nodes = [Node("o", "attention", args, {"is_causal": causal}, ("o",))]
    block.outputs = ["o"]
    return block


ATTENTION = 2 * (2 * 2 * 8 * 128 * 128 * 16)  # two products of 128 queries with 128 keys in 16 dimensions, 16 times


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_each_of_two_devices(machine, causal):
    """However it is split over two devices, each does half: also along the sequence, where each has all keys."""
    block = attention_block(causal)
    (unit,) = divide(block)
    arithmetic = ATTENTION * 129 / 256 if causal else ATTENTION  # row i of 128 sees i keys, counted from 1
    fast = replace(machine, memory_bandwidth=1e30)
    for devices in (1, 2):
        options = unit_options(unit, block, CostModel(fast, Mesh((devices,))))
        splits = {option.ways[0][1].split: option for option in options}
        assert devices == 1 or {"b", "k", "l"} <= set(splits)
        for split, option in splits.items():
            share = 1 if split == "-" else devices
            exchanged = 0.0
            if split == "l":  # a device has half of the queries and results, of which half goes to the other
                exchanged = 2 * (2 * 8 * 128 * 16) * 2 / 2 / 2 / LINK
            assert option.seconds.forward == pytest.approx(arithmetic / share / OPERATIONS + exchanged, rel=1e-4), split
            assert option.seconds.backward == pytest.approx(
                2.5 * arithmetic / share / OPERATIONS + exchanged, rel=1e-4
            ), split


def test_on_two_axes_the_sequence_is_divided_along_one_or_both(machine):
    """A function that communicates takes both for one; each of four devices does a quarter all the same."""
    block = attention_block(causal=False)
    (unit,) = divide(block)
    options = unit_options(unit, block, CostModel(replace(machine, memory_bandwidth=1e30), Mesh((2, 2))))
    splits = {option.ways[0][1].split: option.seconds.forward for option in options}
    assert {"l,k", "k,l", "b,k", "l,l"} <= set(splits)
    assert splits["b,k"] == pytest.approx(ATTENTION / 4 / OPERATIONS, rel=1e-4)
    exchanged = 2 * (2 * 8 * 128 * 16) * 2 / 4 / 2 / LINK  # of a quarter of the queries and results, a half
    assert splits["l,k"] == pytest.approx(ATTENTION / 4 / OPERATIONS + exchanged, rel=1e-4)
    exchanged *= 3 / 2  # three quarters go to others
    assert splits["l,l"] == pytest.approx(ATTENTION / 4 / OPERATIONS + exchanged, rel=1e-4)


def test_operators_are_timed_on_what_a_device_has(graph, machine):
    asked = set()

    class Times:
        def seconds(self, node, inputs, part=None):
            asked.add((node.op, *(meta.shape for meta in inputs)))
            return (3.0, 4.0)

    (product,) = (unit for unit in divide(graph.root) if unit.kind == "product")
    options = unit_options(product, graph.root, CostModel(machine, Mesh((2,)), times=Times()))
    halves = [
        ((ROWS // 2, INNER), (OUTER, INNER)),
        ((ROWS, INNER // 2), (OUTER, INNER // 2)),
        ((ROWS, INNER), (OUTER // 2, INNER)),
    ]
    assert asked == {("aten.linear.default", *shapes) for shapes in [((ROWS, INNER), (OUTER, INNER)), *halves]}
    assert {(option.seconds.forward, option.seconds.backward) for option in options} == {(3.0, 4.0)}


def test_a_time_that_was_measured_is_scaled_to_what_a_device_does(machine):
    """Along the sequence each of two devices does half of the causal arithmetic. What is timed is a call with half of
    the queries: the last ones, which see more keys. What it exchanges comes on top."""

    class Times:
        def seconds(self, node, inputs, part=None):
            assert [meta.shape for meta in inputs] == [(2, 8, 64, 16), (2, 4, 128, 16), (2, 4, 128, 16)]
            return (3.0, 4.0)

    block = attention_block(causal=True)
    costs = CostModel(replace(machine, memory_bandwidth=1e30), Mesh((2,)), times=Times())
    metas = [TensorMeta((2, 8, 64, 16), torch.bfloat16), *[TensorMeta((2, 4, 128, 16), torch.bfloat16)] * 2]
    sizes = {"b": 2, "k": 4, "g": 2, "l": 64, "s": 128, "d": 16, "e": 16}
    exchanged = (True, False, False, True)
    share = 2 * 8 * 64 * 16 * 2  # bytes of a device's queries, and of its results
    local = Local(
        block.nodes[0], sizes, metas, [share, 2 * share, 2 * share, share], (0,), "l", {**sizes, "l": 128}, exchanged
    )
    seconds, transient, inner = costs.unit(divide(block)[0], block, {}, [local])
    part = sum(range(1, 129)) / 2 / sum(range(65, 129))
    sent = 2 * share / 2 / LINK
    assert (seconds.forward, seconds.backward) == pytest.approx((3 * part + sent, 4 * part + sent))
    assert inner == share + 4 * 2 * 8 * 64, "the result before it goes back, and a sum for each row and head"
    in_fp32 = 4 * (2 * 8 * 64 * 16 + 2 * 2 * 4 * 128 * 16)  # gradients that backward adds up
    assert transient == 6 * share + in_fp32
    assert costs.node_origin(block.nodes[0], metas) == "measured"
    nowhere = SimpleNamespace(seconds=lambda node, inputs: None)
    assert replace(costs, times=nowhere).node_origin(block.nodes[0], metas) == "roofline"
    assert replace(costs, times=None).node_origin(block.nodes[0], metas) == "roofline"


@pytest.mark.parametrize(("limit", "heads"), [(1.01, 4), (0.6, 2), (0.34, 1), (0.1, 1)])
def test_attention_that_takes_very_long_is_timed_for_some_heads(machine, monkeypatch, limit, heads):
    """`limit`: seconds that may be timed, as a part of those of the call. It is not divided along the sequence."""

    class Times:
        def seconds(self, node, inputs, part=None):
            parts.append(part)
            return (3.0, 4.0)

    parts: list[Part | None] = []
    block = attention_block(causal=True)
    block.tensors = {name: replace(one, shape=(1, *one.shape[1:])) for name, one in block.tensors.items()}
    (unit,) = divide(block)
    seconds = ATTENTION * 129 / 256 / 2 / OPERATIONS
    monkeypatch.setattr("nnscaler.planner.costs.TIMED_SECONDS", limit * seconds)
    (option,) = unit_options(unit, block, CostModel(machine, Mesh((1,)), times=Times()))
    assert option.seconds == Seconds(3.0, 4.0)
    (part,) = parts
    if heads == 4:
        assert part is None
    else:
        assert [meta.shape for meta in part.inputs] == [(1, 2 * heads, 128, 16), *[(1, heads, 128, 16)] * 2]
        assert part.times == pytest.approx(4 / heads)


def test_what_an_operator_keeps_is_kept_only_for_a_gradient(machine):
    """A mask of what is dropped, a byte for each of [4, 6]."""
    for trained in (True, False):
        block = Block("model", "Model")
        shapes = {"x": (4, 6), "draws": (1, 5), "place": (), "n0": (4,), "n1": (6,)}
        block.tensors = {name: TensorMeta(shape, torch.int64) for name, shape in shapes.items()}
        block.tensors |= {name: TensorMeta((4, 6), torch.bfloat16, trained) for name in ("x", "y")}
        block.inputs, block.outputs = list(shapes), ["y"]
        args = (Ref("x"), 0.5, Ref("draws"), Ref("place"), [Ref("n0"), Ref("n1")])
        block.nodes = [Node("y", "nnscaler.dropout.default", args, {}, ("y",))]
        for fused in (True, False):
            (option,) = unit_options(divide(block)[0], block, CostModel(machine, Mesh((1,)), fused))
            assert option.inner_bytes == (24 if trained else 0)


def test_only_gradients_that_there_are_are_exchanged(machine):
    """Along the sequence half of the queries and of the results go to the other device; of their gradients likewise."""
    costs = CostModel(replace(machine, memory_bandwidth=1e30), Mesh((2,)))
    seconds = []
    for frozen in ("", "q"):
        block = attention_block(True, frozen)
        options = unit_options(divide(block)[0], block, costs)
        seconds.append(next(option.seconds for option in options if option.ways[0][1].split == "l"))
    each = (2 * 8 * 128 * 16) * 2 / 2 / 2 / LINK
    assert seconds[0].forward == seconds[1].forward
    assert seconds[0].backward - seconds[1].backward == pytest.approx(each, rel=1e-4)


def test_experts_on_each_of_two_devices(machine):
    """8 tokens choose 2 of 4 experts, of 16 to 2 x 32 and back. A token's row goes to 1.5 devices in the mean."""
    block = Block("model", "Model")
    shapes = {"x": (8, 16), "scores": (8, 2), "up": (4, 2, 32, 16), "down": (4, 16, 32), "y": (8, 16)}
    block.tensors = {name: TensorMeta(shape, torch.bfloat16, True) for name, shape in shapes.items()}
    block.tensors["chosen"] = TensorMeta((8, 2), torch.int64, False)
    block.inputs, block.outputs = ["x", "chosen", "scores", "up", "down"], ["y"]
    given = {"gate": "silu", "constants": {}}
    block.nodes = [Node("y", "experts", tuple(map(Ref, block.inputs)), given, ("y",))]
    (unit,) = divide(block)
    options = unit_options(unit, block, CostModel(replace(machine, memory_bandwidth=1e30), Mesh((2,))))
    splits = {option.ways[0][1].split: option for option in options}
    arithmetic = 8 * 2 * 2 * (16 * 64 + 32 * 16) / OPERATIONS
    travels = 4 * 1.5 * 16 * 2  # of a device's four tokens, in bf16
    exchanged = 2 * travels / 2 / LINK  # there and back
    found, plain = splits["t n"], splits["t"]
    assert found.seconds.forward == pytest.approx(arithmetic / 2 + exchanged)
    assert found.seconds.backward == pytest.approx(2 * arithmetic / 2 + exchanged)
    assert (plain.seconds.forward, plain.seconds.backward) == pytest.approx((arithmetic / 2, arithmetic))
    assert found.inner_bytes - plain.inner_bytes == travels, "kept where they go"
    block.tensors = {name: replace(meta, requires_grad=False) for name, meta in block.tensors.items()}
    options = unit_options(unit, block, CostModel(replace(machine, memory_bandwidth=1e30), Mesh((2,))))
    found = next(option for option in options if option.ways[0][1].split == "t n")
    assert found.seconds.backward == 0


def test_the_chunked_loss_by_hand(machine):
    """[1, 64, 32] @ [96, 32].T: the product, and the gradients of both already in forward; backward scales them."""
    block = Block("model", "Model")
    shapes = {"x": (1, 64, 32), "w": (96, 32), "loss": (1, 64)}
    block.tensors = {name: TensorMeta(shape, torch.bfloat16, True) for name, shape in shapes.items()}
    block.tensors["labels"] = TensorMeta((1, 64), torch.int64, False)
    block.inputs = ["x", "w", "labels"]
    args = (*(Ref(name) for name in block.inputs), -100)
    block.nodes = [Node("loss", "chunk_linear_cross_entropy", args, {}, ("loss",))]
    block.outputs = ["loss"]
    assert chunk_linear_cross_entropy is not None, "importing it registers it"
    node = block.nodes[0]
    flops = operator_of(node).flops(bind(node, block).sizes, node)
    assert flops == 3 * 2 * 64 * 32 * 96
    (unit,) = divide(block)
    rates = {"bfloat16": OPERATIONS, "float32": OPERATIONS / 4}
    block.tensors["loss"] = TensorMeta((1, 64), torch.float32, True)  # whatever it gives, its products are in 16 bits
    costs = CostModel(replace(machine, memory_bandwidth=1e30, flops=rates), Mesh((1,)))
    (option,) = unit_options(unit, block, costs)
    assert option.seconds.forward == pytest.approx(flops / OPERATIONS)
    assert option.seconds.backward == pytest.approx(0.0, abs=1e-9)
