"""Bytes that are held while operators run: by hand for a small layer, and beside what runs on a GPU held."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chunk_linear_cross_entropy import in_chunks
from nnscaler.compiler import Source
from nnscaler.graph import Graph
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.models import load_config
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.placement import Shard
from nnscaler.plan import GIB, Key
from nnscaler.planner.costs import CostModel
from nnscaler.planner.held import Held, Sum
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Decision, Flow, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planning import traced
from nnscaler.recompute import (
    IN_GROUPS,
    KEEPS_ALL,
    KEEPS_PRODUCTS,
    RECOMPUTES_ALL,
    RECOMPUTES_ALL_BUT_ATTENTION,
    SAME_ON_HOST,
    Level,
)
from nnscaler.trace import trace
from tests import tiny
from tests.planner.test_pieces import NARROW, ROWS, WIDE, Plain, Two, mixes_two

TWOS = {level.inner: level for level in IN_GROUPS if level.size == 2}
N, W, WEIGHT = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE  # bytes, in bf16


@pytest.fixture(scope="module")
def layers() -> Graph:
    inputs = {"x": torch.empty((2, ROWS // 2, NARROW), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(Two, inputs).build()
    return trace(model, inputs, buffers)


# While the last product runs backward: what it reads and makes; and the gradient of the result, which is that of x too.
PRODUCT = (W + N + WEIGHT) + 2 * N
# While silu does, where it is computed again: its input and result again, and the gradients of both. Those of the
# layer's result, as whoever runs the region's backward holds it, and of x, to which it is added.
SILU = 2 * W + 2 * W + 2 * N
KEPT = N + 2 * W  # of a call that keeps all: x, silu's input and its result


@pytest.mark.parametrize(
    ("levels", "again", "beside"),
    [
        ({KEEPS_ALL: 2}, 0, PRODUCT),
        ({RECOMPUTES_ALL_BUT_ATTENTION: 2}, 0, SILU),
        ({RECOMPUTES_ALL: 2}, 2 * W, PRODUCT),
        # The call that keeps all runs backward first: what it kept is free when the other is computed again.
        ({KEEPS_ALL: 1, RECOMPUTES_ALL_BUT_ATTENTION: 1}, 0, max(PRODUCT, SILU - KEPT)),
        ({KEEPS_ALL: 1, RECOMPUTES_ALL: 1}, 0, PRODUCT),
    ],
)
def test_one_layer_by_hand(layers, levels, again, beside, tmp_path):
    costs = CostModel(load_hardware(tiny.write_hardware(tmp_path)), Mesh((1,)), fused=True)
    problem = build_problem(layers, costs, Recomputing(), 1)
    (block,) = layers.blocks
    chosen = [0] * len(problem.decisions)  # on one device there is one way
    found = price(Program(problem), Solution(chosen, {layers.root.name: {KEEPS_ALL: 1}, block: levels}))
    assert found.memory.get(Key("working", block, "backward"), 0.0) == again
    assert found.memory[Key("working")] == beside


class Squashed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.down(nn.functional.silu(self.up(x))))


class Added(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(NARROW, WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.other(x)
        return x + self.down(self.up(x) + other)


def held_by(layer: type[nn.Module], frozen: str, folder: Path) -> float:
    """Bytes that two layers hold while they run, of which regions are compiled and computed again.

    frozen  part of the names of weights without gradients
    """
    inputs = {"x": torch.empty((2, ROWS // 2, NARROW), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(lambda: Two(layer), inputs).build()
    for name, weight in model.named_parameters():
        weight.requires_grad_(frozen not in name)
    graph = trace(model, inputs, buffers)
    costs = CostModel(load_hardware(tiny.write_hardware(folder)), Mesh((1,)), fused=True)
    problem = build_problem(graph, costs, Recomputing(), 1)
    (block,) = graph.blocks
    levels = {graph.root.name: {KEEPS_ALL: 1}, block: {RECOMPUTES_ALL_BUT_ATTENTION: 2}}
    found = price(Program(problem), Solution([0] * len(problem.decisions), levels))
    assert found is not None
    return found.memory[Key("working")]


@pytest.mark.parametrize(("frozen", "held"), [("-", 2 * W + N + 2 * W + 2 * N), ("down", W + 2 * W + 2 * N)])
def test_products_wait_for_what_is_made_again_of_their_factors(frozen, held, tmp_path):
    """While silu is computed again, and then its gradient: silu's input and result, and the gradients of both. The last
    product's weight has its gradient after that, so that of the product's result still lies there; and those of the
    layer's result and of x. Where the weight is frozen, nobody waits, nor needs silu's result."""
    assert held_by(Squashed, frozen, tmp_path) == held


def test_what_needs_no_gradient_is_held_in_forward_by_hand(tmp_path):
    """While a sum is computed again: both terms, which nobody needs after it, and the sum; and what backward needs of
    it; and the gradients of the layer's result and of x. In backward there would be the gradients of the sum and of one
    term."""
    assert held_by(Added, "-", tmp_path) == 3 * W + W + 2 * N


class Normed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(h * h.pow(2).mean(-1, True).rsqrt())


# A cluster is given the gradient of its result, and makes that of its input. Silu's is written over the given one; a
# norm's needs all of a row. In fp8 there are, beside the given gradient, two orders of the one that is made, and what
# the product after the cluster reads once more: half a byte of each for a byte in bf16.
@pytest.mark.parametrize(
    ("layer", "in_fp8", "held"),
    [(Plain, False, W), (Normed, False, 2 * W), (Plain, True, W + W + W / 2), (Normed, True, W + W + W / 2)],
)
def test_where_a_gradient_is_not_written_over_another(layer, in_fp8, held, tmp_path):
    inputs = {"x": torch.empty((2, ROWS // 2, NARROW), dtype=torch.bfloat16, device="meta")}
    graph = traced(Source(lambda: Two(layer), inputs, fp8=in_fp8), "reuse_cache")
    flops = {"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 1e12}
    costs = CostModel(load_hardware(tiny.write_hardware(tmp_path, flops=flops)), Mesh((1,)), fused=True)
    program = Program(build_problem(graph, costs, Recomputing(), 1))
    (block,) = graph.blocks
    units = Held(program.choices, program.flows, block)
    cluster = next(index for index, unit in units.units.items() if unit.fused)
    assert units.alone(cluster) == ([(program.choices.x[cluster][0], held)], held)


class Rich(Added):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        with torch.no_grad():
            other = self.other(x)
        return x + torch.tanh(self.down(mixes_two(nn.functional.silu(h), other)))


TRANSIENT = N + W + WEIGHT  # of a product: what it reads and makes
# Unit -> its own bytes; gradients of tensors from before it that are used after it, such as x; those of its region's
# results that are made after it; and which tensors no backward reads from it on.
UNITS = {
    "up": (TRANSIENT, N, W, {"up", "other", "silu", "mixed", "down"}),
    "other": (TRANSIENT, N + W, W, {"other", "silu", "mixed", "down"}),  # without a gradient, and in the region
    "silu": (2 * W, N, 0, {"silu", "mixed", "down"}),
    "mixed": (3 * W, N, 0, {"mixed", "down"}),
    "down": (TRANSIENT, N, N, {"down"}),
    "add": (3 * N, 0, 0, set()),
}


def test_what_units_hold_by_hand(tmp_path):
    inputs = {"x": torch.empty((2, ROWS // 2, NARROW), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(lambda: Two(Rich), inputs).build()
    graph = trace(model, inputs, buffers)
    costs = CostModel(load_hardware(tiny.write_hardware(tmp_path)), Mesh((1,)), fused=True)
    program = Program(build_problem(graph, costs, Recomputing(), 1))
    (block,) = graph.blocks
    held = Held(program.choices, program.flows, block)
    names = dict(zip(held.units, UNITS, strict=True))
    tensors = {held.units[index].name: name for index, name in names.items()}

    def size(one: Sum) -> float:  # on one device there is one way
        terms, most = one
        assert sum(amount for _, amount in terms) == most
        return most

    found = {}
    for index, unit in held.units.items():
        freed = {tensors[flow.tensor] for _, flow in held.freed(unit.place, unit.place)}
        waiting = held.waiting(unit.place, unit.place)
        found[names[index]] = (size(held.alone(index)), size(waiting), size(held.held_by_caller(unit)), freed)
    assert found == UNITS
    units = {name: index for index, name in names.items()}
    parts = {"up": 1 / 2, "other": 1 / 8, "add": 1 / 16}

    def part(flow: Flow) -> float:
        return 1.0 if flow.is_parameter else parts.get(tensors.get(flow.tensor, ""), 1 / 4)

    assert {name: size(held.alone(index, part=part)) for name, index in units.items()} == {
        "up": N / 4 + W / 2 + WEIGHT, "other": N / 4 + W / 8 + WEIGHT, "silu": W / 2 + W / 4,
        "mixed": W / 4 + W / 8 + W / 4, "down": W / 4 + N / 4 + WEIGHT, "add": N / 4 + N / 4 + N / 16,
    }  # fmt: skip
    assert held.inner(units["add"]) == ([], 0.0)
    of_add = held.units[units["add"]]
    held.units[units["add"]] = replace(of_add, options=[replace(of_add.options[0], inner_bytes=160.0)])
    assert [size(held.inner(units["add"])), size(held.inner(units["add"], part))] == [160, 10], "as the least"
    product = held.units[units["up"]].options[0]
    more = replace(product, transient=product.transient + 1600)
    assert held._transient(units["up"], more, part) == N / 4 + W / 2 + WEIGHT + 400, "what else it needs, as the least"
    assert [held.waiting_for(units[name]) for name in ("up", "silu", "add")] == [([], 0.0)] * 3


@dataclass(frozen=True)
class Run:
    """Layers of Llama-3 8B on H100s, whose weights and tokens are divided among the devices.

    levels     of the layers
    state      64ths of the optimizer's state that lie on the host;  gradients: likewise
    pieces     of which stretches of a layer: "mlp", "before attention", "attention" -> how many
    alone      which weights are stored as their fp32 master weight alone
    whole      which are stored whole on each device
    fp8        whether products of layers are in fp8
    sequences  of a micro-batch
    """

    layers: int
    length: int
    micro_batches: int
    levels: Mapping[Level, int]
    state: int = 0
    gradients: int = 0
    pieces: Mapping[str, int] = field(default_factory=dict)
    devices: int = 1
    alone: Collection[str] = ()
    whole: Collection[str] = ()
    fp8: bool = False
    sequences: int = 1


STRETCHES = {(None, True): "mlp", (None, False): "before attention", ("transpose_2", False): "attention"}


def of_llama(run: Run, hardware: str = "h100") -> Price:
    config = load_config("meta-llama/Meta-Llama-3-8B")
    config.num_hidden_layers = run.layers
    prepare_config(config, run.length, "auto")
    size = run.sequences, run.length
    inputs = {name: torch.empty(size, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    graph = traced(Source(lambda: CausalLM(config, in_chunks), inputs, fp8=run.fp8), "reuse_cache")
    costs = CostModel(load_hardware(hardware), Mesh((run.devices,)), fused=True)
    problem = build_problem(graph, costs, Recomputing(), run.micro_batches, host=112 * GIB)
    (block,) = graph.blocks
    divided = {
        (one.block, one.name): run.pieces[STRETCHES[one.within, one.ends_block]]
        for one in problem.divisible
        if STRETCHES[one.within, one.ends_block] in run.pieces
    }
    again = frozenset(index for index, flow in enumerate(problem.flows) if flow.is_parameter)
    found = price(
        Program(problem),
        Solution(
            [chosen(one, run.alone, run.whole) for one in problem.decisions],
            {graph.root.name: {KEEPS_ALL: 1}, block: run.levels},
            again, run.state, divided, run.gradients,
        ),
    )  # fmt: skip
    assert found is not None
    return found


def chosen(decision: Decision, alone: Collection[str], whole: Collection[str]) -> int:
    """The index of the option: matrices are stored in shards of their rows, and tokens divided; in attention, heads."""
    if len(decision.options) == 1:
        return 0
    if decision.kind != "parameter":
        return 2 if decision.name in ("embed_tokens", "reshape") else 1
    ways = [(option.outputs[0], option.master_only) for option in decision.options]
    is_matrix = any(layout == (Shard(1),) for layout, _ in ways)
    return ways.index(((Shard(0),), decision.name in alone)) if is_matrix and decision.name not in whole else 0


AWAY, TWOS_AWAY = SAME_ON_HOST[RECOMPUTES_ALL_BUT_ATTENTION], SAME_ON_HOST[TWOS[RECOMPUTES_ALL_BUT_ATTENTION]]
LAYERS_AT = {RECOMPUTES_ALL_BUT_ATTENTION: 1, RECOMPUTES_ALL: 2, AWAY: 5, TWOS_AWAY: 24}
ALONE = [f"{name}_weight" for name in (
    "model_model_embed_tokens", "model_lm_head", "self_attn_k_proj", "self_attn_v_proj", "self_attn_o_proj",
    "mlp_gate_proj", "mlp_up_proj", "mlp_down_proj",
)]  # fmt: skip
LAYERS_FAR = {
    KEEPS_ALL: 1, KEEPS_PRODUCTS: 3, RECOMPUTES_ALL_BUT_ATTENTION: 12, SAME_ON_HOST[KEEPS_PRODUCTS]: 2, AWAY: 14,
}  # fmt: skip
LAYERS_FARTHER = {
    RECOMPUTES_ALL_BUT_ATTENTION: 2, RECOMPUTES_ALL: 6, AWAY: 2, SAME_ON_HOST[RECOMPUTES_ALL]: 22,
}  # fmt: skip
OTHERS_ALONE = [f"{name}_weight" for name in (
    "model_model_embed_tokens", "self_attn_q_proj", "self_attn_v_proj", "self_attn_o_proj", "mlp_gate_proj",
    "mlp_down_proj",
)]  # fmt: skip
HEADS = {"mlp": 16, "before attention": 4, "attention": 4}


@pytest.mark.parametrize(
    ("measured", "run"),
    [
        (61.80, Run(2, 131_072, 1, {KEEPS_ALL: 2})),
        (24.48, Run(4, 131_072, 1, {AWAY: 4}, 64, pieces={"mlp": 16})),
        (19.06, Run(3, 131_072, 1, {SAME_ON_HOST[RECOMPUTES_ALL]: 3}, 62, pieces={"mlp": 16, "before attention": 16})),
        (39.42, Run(3, 131_072, 1, {KEEPS_ALL: 1, RECOMPUTES_ALL_BUT_ATTENTION: 2}, 61)),
        (20.38, Run(2, 131_072, 1, {RECOMPUTES_ALL_BUT_ATTENTION: 2}, 64, pieces={"mlp": 16})),
        (39.22, Run(4, 8_192, 4, {KEEPS_ALL: 4})),
        (21.95, Run(6, 8_192, 4, {KEEPS_ALL: 1, KEEPS_PRODUCTS: 4, RECOMPUTES_ALL_BUT_ATTENTION: 1}, 61)),
        (22.68, Run(4, 294_912, 1, {SAME_ON_HOST[RECOMPUTES_ALL]: 4}, 64, 55, HEADS)),
        (31.10, Run(2, 425_984, 1, {TWOS[RECOMPUTES_ALL]: 2}, 64, pieces=HEADS)),
        (19.60, Run(2, 237_568, 1, {RECOMPUTES_ALL: 2}, 64, 29, HEADS)),
        (59.65, Run(2, 950_272, 1, {RECOMPUTES_ALL: 2}, 64, 39, HEADS)),
        (21.42, Run(4, 131_072, 1, {
            RECOMPUTES_ALL_BUT_ATTENTION: 1, RECOMPUTES_ALL: 1, SAME_ON_HOST[RECOMPUTES_ALL]: 2
        }, 64, 15, {"mlp": 4})),
        (50.52, Run(4, 65_536, 2, {KEEPS_ALL: 1, RECOMPUTES_ALL_BUT_ATTENTION: 3}, fp8=True)),
        (76.46, Run(8, 131_072, 4, {KEEPS_ALL: 3, RECOMPUTES_ALL_BUT_ATTENTION: 5}, 64, 54, fp8=True)),
        # 71.44 with what the last layer on the host keeps, which stayed until backward then.
        (71.44 - 2.25, Run(32, 131_072, 4, {
            KEEPS_ALL: 1, KEEPS_PRODUCTS: 6, RECOMPUTES_ALL_BUT_ATTENTION: 3, AWAY: 22
        }, 64, 64, devices=2)),
        (54.69, Run(32, 524_288, 1, LAYERS_AT, 44, 51, {"mlp": 16}, 2, ALONE)),
        (71.85, Run(32, 131_072, 4, LAYERS_FAR, 64, 57, devices=2, whole=["model_lm_head_weight"])),
        # 72.54 with the projection's gradient, which waited beside the last layer's pieces then.
        (72.54 - 2.94, Run(32, 524_288, 1, LAYERS_FARTHER, 49, 25, {"mlp": 4}, 2, OTHERS_ALONE)),
    ],
)  # fmt: skip
def test_beside_what_runs_held(measured, run):
    """`measured`: GiB, the most that `torch.cuda.max_memory_allocated` said, with torch 2.11 and flash-attn-4."""
    assert 0.985 * measured < of_llama(run).total_memory / GIB < 1.032 * measured


@pytest.mark.parametrize(
    ("measured", "run"),
    [
        (47.806, Run(4, 32_768, 2, {KEEPS_ALL: 4}, fp8=True)),
        (47.853, Run(4, 8_192, 2, {KEEPS_ALL: 4}, fp8=True, sequences=4)),
        (46.604, Run(6, 8_192, 8, {KEEPS_PRODUCTS: 6}, fp8=True)),
        (60.161, Run(2, 131_072, 1, {KEEPS_ALL: 2}, fp8=True)),
        (38.507, Run(2, 131_072, 1, {RECOMPUTES_ALL_BUT_ATTENTION: 2}, pieces={"mlp": 4}, fp8=True)),
        (49.231, Run(6, 8_192, 4, {
            KEEPS_ALL: 1, RECOMPUTES_ALL_BUT_ATTENTION: 3, RECOMPUTES_ALL: 2
        }, fp8=True, sequences=4)),
        (45.998, Run(6, 32_768, 2, {
            RECOMPUTES_ALL_BUT_ATTENTION: 3, RECOMPUTES_ALL: 1, TWOS[RECOMPUTES_ALL_BUT_ATTENTION]: 2
        }, pieces={"mlp": 4}, fp8=True)),
        (52.563, Run(4, 32_768, 2, {KEEPS_ALL: 4})),
        (52.551, Run(4, 8_192, 2, {KEEPS_ALL: 4}, sequences=4)),
    ],
)  # fmt: skip
def test_never_below_what_ran_on_an_h200(measured, run):
    """Likewise, the first step included."""
    assert measured <= of_llama(run, "h200").total_memory / GIB <= 1.03 * measured
