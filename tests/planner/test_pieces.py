"""Which runs of operators can be computed in pieces follows from the annotations. What that costs, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnscaler import register_op
from nnscaler.compiler import Source
from nnscaler.graph import Call, Ref, TensorMeta
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.operators.attention import attention
from nnscaler.pieces import Stretch, stretches, with_registered
from nnscaler.placement import REPLICATE, Placement, Shard
from nnscaler.plan import Key
from nnscaler.planner.costs import CostModel
from nnscaler.planner.pieces import counts_of
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Decision, Divisible, Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, ON_DEVICE, RECOMPUTES_ALL, RECOMPUTES_ALL_BUT_ATTENTION, Level
from nnscaler.trace import trace
from tests import tiny
from tests.test_units import block


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


class Grouped(nn.Module):
    """Attention with two query heads for each of four key-value heads, and what is done with its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(16, 16), nn.RMSNorm(16), nn.Linear(64, 16)
        self.query, self.key, self.value = nn.Linear(16, 64), nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = mixes_rows(self.first(x))
        h = self.norm(x)
        parts = (product(h).unflatten(-1, (-1, 8)).transpose(1, 2) for product in (self.query, self.key, self.value))
        return x + self.out(attention(*parts).flatten(2))


def test_attention_is_divided_by_groups_of_heads_and_with_it_the_products_that_it_uses():
    inputs = {"x": torch.empty((2, 64, 16), device="meta", requires_grad=True)}
    model, buffers = Source(Grouped, inputs, torch.float32).build()
    block = trace(model, inputs, buffers).root
    _, before, _ = stretches(block)
    _, run = with_registered(block, stretches(block))  # the first: sequences at a time
    assert run.within == before
    assert run.units[:-1] == before.units
    weights = [name for name in run.inputs if name.startswith(("query", "key", "value"))]
    assert {run.dims[name] for name in weights} == {0}, "weights and biases, along the rows that make heads"
    assert len(weights) == 6
    (whole,) = [name for name in run.inputs if run.adds_up(name, block)]
    assert whole in {name for node in block.nodes if node.op == "test_mixes_rows" for name in node.outputs}
    (result,) = run.outputs
    assert run.dims[result] == 2


class Reused(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = [product(h).unflatten(-1, (-1, 8)).transpose(1, 2) for product in (self.query, self.key, self.value)]
        return x + self.out(attention(*parts).flatten(2)) + parts[0].transpose(1, 2).flatten(2)[..., :16]


class Rowwise(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(mixes_rows(self.norm(x)))


@register_op("b l d^ -> b l d^", name="test_mixes_along", along={"l": mixes_rows})
def mixes_along(x: Tensor) -> Tensor:
    return x.flip(1)


class Along(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(mixes_along(super().forward(x)))


@pytest.mark.parametrize("make", [Reused, Mixing, Rowwise, Along])
def test_what_is_not_for_the_operator_alone_is_not_divided_with_it(make):
    inputs = {"x": torch.empty((1, 64, 16), device="meta", requires_grad=True)}
    model, buffers = Source(make, inputs, torch.float32).build()
    block = trace(model, inputs, buffers).root
    assert not with_registered(block, stretches(block))


@register_op("* -> *", name="test_among_copies", among_copies=mixes_rows)
def among_copies(x: Tensor) -> Tensor:
    return x.clone()


def test_what_is_around_a_registered_operator_in_blocks_by_hand():
    """Each line: operators, the block's results, and for each operator whose stretch there is, whether it ends it."""
    silu, attention = ("silu", "q", "x"), ("attention", "a", "q k v")
    cases: list[tuple[list[tuple[str, str, str]], str, dict[str, bool]]] = [
        ([silu, attention], "a", {"a": True}),
        ([silu, attention, ("silu", "o", "a")], "o", {"a": False}),
        ([silu, attention], "a q", {}),  # which others use
        ([silu, ("attention", "k", "y y y"), attention], "a", {"a": True}),
        ([silu, attention, ("attention", "b", "y y y")], "a b", {"a": False}),
        ([silu, ("attention", "h", "y y y"), ("silu", "k", "h"), attention], "a", {}),
        ([silu, ("among copies", "a", "q")], "a", {}),
        ([silu, ("call", "a", "q")], "a", {}),
    ]
    for nodes, outputs, wanted in cases:
        made = {name for _, name, _ in nodes}
        inputs = tuple(name for name in "xykv" if name not in made)
        known = [("silu" if op in ("call", "among copies") else op, *rest) for op, *rest in nodes]
        given = block(*known, outputs=tuple(outputs.split()), inputs=inputs)
        given.tensors = dict.fromkeys(given.tensors, TensorMeta((2, 8, 8, 8), torch.float32, True))
        for index, (op, name, taken) in enumerate(nodes):
            if op == "among copies":
                given.nodes[index] = replace(given.nodes[index], op="test_among_copies")
            elif op == "call":
                given.nodes[index] = Call(name, "call", (Ref(taken),), {}, (name,), block="b", parameters={})
        found = with_registered(given, stretches(given))
        assert {stretch.name: stretch.ends_block for stretch in found} == wanted, nodes


def test_what_is_around_attention_is_divided_as_it_is():
    """By groups of heads; by sequences, where what makes the query runs along the heads."""
    for silu, dims in ((("silu", "q", "x"), (1, 1, 2)), (("cumsum", "q", "x"), (0, 0, 0))):
        given = block(silu, ("attention", "a", "q k v"), outputs=("a",), inputs=("x", "k", "v"))
        given.tensors = dict.fromkeys(given.tensors, TensorMeta((2, 8, 8, 8), torch.float32, True))
        if silu[0] == "cumsum":
            given.nodes[0] = replace(given.nodes[0], args=(Ref("x"), 1))
        (found,) = with_registered(given, stretches(given))
        assert (found.inputs, found.outputs) == (("x", "k", "v"), ("a",))
        assert tuple(found.dims[name] for name in ("x", "k", "a")) == dims


def test_stretches_of_blocks_by_hand():
    """Each line: operators, the block's results, and for each stretch, whether it ends the block."""
    silu, attention = ("silu", "a", "x"), ("attention", "h", "a a a")
    cases: list[tuple[list[tuple[str, str, str]], str, dict[str, bool]]] = [
        ([silu, ("attention", "b", "y y y")], "a b", {"a": False}),
        ([silu, attention, ("add", "o", "a h")], "o", {"a": False}),  # the second needs what the first makes
        ([silu, attention, ("silu", "c", "y")], "h c", {"c": False}),  # of both that are no attention
        ([silu, attention, ("silu", "c", "h")], "c", {"a": False, "c": True}),
        ([silu, ("t", "b", "a"), ("add", "c", "a b")], "c", {}),  # rows cannot be columns
        ([silu, ("linear", "b", "a w"), ("add", "c", "a b")], "c", {"c": True}),
    ]
    for nodes, outputs, wanted in cases:
        given = block(*nodes, outputs=tuple(outputs.split()), inputs=("x", "y"))
        assert {stretch.name: stretch.ends_block for stretch in stretches(given)} == wanted, nodes
    given = block(silu, outputs=("a",))
    assert len(stretches(given)) == 1
    given.tensors["a"] = replace(given.tensors["a"], requires_grad=False)
    assert stretches(given) == [], "it has no backward"


def test_gradients_of_activations_that_each_piece_uses_whole_are_added_up():
    given = block(("silu", "a", "x"), outputs=("a",), inputs=("x", "divided", "number"))
    given.tensors["number"] = replace(given.tensors["number"], requires_grad=False)
    inside = Stretch("b", (0,), ("x",), ("b",), {}, False)
    around = Stretch("a", (0, 1), ("x", "w", "divided", "number"), ("a",), {"divided": 0}, True, inside)
    assert {name for name in given.tensors if around.adds_up(name, given)} == {"x"}
    assert not inside.adds_up("x", given)


ROWS, NARROW, WIDE = 2 * 64, 16, 48
MEMORY, ARITHMETIC, LAUNCH = 1e9, 1e9, 1e-5  # bytes and operations a second; seconds of an operator
COLUMNS = Shard(2)
LINK, LATENCY = 2e8, 1e-4  # bytes a second between two devices; seconds of a collective


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, WIDE, bias=False), nn.Linear(WIDE, NARROW, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


@register_op("b l^ d, b l^ d -> b l^ d", name="test_mixes_two")
def mixes_two(x: Tensor, y: Tensor) -> Tensor:
    return x * y.flip(1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(NARROW, WIDE, bias=False), nn.Linear(NARROW, WIDE, bias=False)
        self.out = nn.Linear(WIDE, NARROW, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return x + self.out(mixes_two(self.left(h), self.right(h)))


class Two(nn.Module):
    def __init__(self, layer: type[nn.Module] = Plain) -> None:
        super().__init__()
        self.first = nn.Linear(NARROW, NARROW, bias=False)
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def two(
    layer: type[nn.Module], folder: Path, devices: int = 1, frozen: str = "-", fused: bool = False,
    memory: float = MEMORY,
) -> Problem:  # fmt: skip
    """Two layers.

    frozen  part of the names of weights without gradients
    memory  bytes a second
    """
    inputs = {"x": torch.empty((2, 64, NARROW), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(lambda: Two(layer), inputs).build()
    for name, weight in model.named_parameters():
        weight.requires_grad_(frozen not in name)
    graph = trace(model, inputs, buffers)
    link = {"bandwidth": LINK, "latency": LATENCY}
    hardware = load_hardware(tiny.write_hardware(folder, memory_bandwidth=memory, launch=LAUNCH, intra=link))
    return build_problem(graph, CostModel(hardware, Mesh((devices,)), fused), Recomputing(), 1)


def priced(
    layer: type[nn.Module], level: Level, count: int, folder: Path, devices: int = 1, mixing: Placement = COLUMNS,
    named: str = "mixes", before: int = 1, **changes: Any,
) -> tuple[Divisible, Price | None]:  # fmt: skip
    """The last of a layer's stretches, and the price of two layers at a level with that in so many pieces.

    mixing   how the result lies of the operator that is named so, the one that mixes rows
    before   in how many pieces is the stretch that is within it
    changes  of `two`
    """
    problem = two(layer, folder, devices, **changes)
    stretch = problem.divisible[-1]
    levels = {problem.root: {KEEPS_ALL: 1}, stretch.block: {level: 2}}
    chosen = [_by_rows(decision, mixing, named) for decision in problem.decisions]
    pieces = {(stretch.block, stretch.name): count, (stretch.block, stretch.within): before}
    pieces = {name: number for name, number in pieces.items() if number > 1}
    return stretch, price(Program(problem), Solution(chosen, levels, pieces=pieces))


def _by_rows(decision: Decision, mixing: Placement, named: str) -> int:
    """The option in which rows are divided, but what `mixing` says in the operator that is named so; weights are
    whole."""
    place = mixing if named in decision.name else Shard(1)
    options = enumerate(decision.options if decision.kind != "parameter" else ())
    return next((index for index, option in options if (place,) in option.outputs), 0)


@pytest.mark.parametrize("count", [4, 16])
def test_pieces_by_hand(count, tmp_path):
    stretch, found = priced(Plain, RECOMPUTES_ALL_BUT_ATTENTION, count, tmp_path)
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE  # bytes, in bf16
    # While the last product runs, there are its gradients; what silu reads and makes, computed again; and the gradient
    # of x from the sum. While the first one runs, both weights have their gradients, and silu's tensors are free.
    last, first = weight + (narrow + wide) / count + 2 * wide / count, 2 * weight + (narrow + wide) / count
    own = max(last, first) + narrow / count
    # Around them lie the gradients of the layer's input and output, and of each weight the sum in fp32.
    assert found.memory[Key("working")] == pytest.approx(own + 2 * narrow + 2 * 2 * weight)
    # The last product and the sum, whose results nobody needs, are computed again too, to have their gradients.
    product, added = 2 * ROWS * NARROW * WIDE / ARITHMETIC, 3 * narrow / MEMORY
    again = product + added + 2 * LAUNCH
    # Results are put together, and the input's gradient: a copy each. A weight's sum is written in fp32, read and
    # written by each piece after the first, and rounded to bf16.
    moved = 2 * narrow + 2 * narrow + 2 * weight * (1 + 2 * (2 * count - 1))
    launching = 3 * (count - 1) * 4 * LAUNCH  # of four operators, in forward, again, and backward
    seconds = 2 * (again + moved / MEMORY + launching)
    assert found.seconds[Key("again", stretch.block, stretch.name, "in pieces")] == pytest.approx(seconds)


@pytest.mark.parametrize("count", [4, 16])
def test_pieces_of_what_is_frozen_by_hand(count, tmp_path):
    """The last product's weight has no gradient, nor does its backward read what silu makes."""
    stretch, found = priced(Plain, RECOMPUTES_ALL_BUT_ATTENTION, count, tmp_path, frozen="down")
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE
    # While the last product runs, there is what silu reads, computed again; and while silu does, its two gradients.
    last, silu = weight + (narrow + wide) / count + wide / count, 2 * wide / count + wide / count
    own = max(last, silu) + narrow / count
    assert found.memory[Key("working")] == pytest.approx(own + 2 * narrow + 2 * weight)
    # Nobody needed silu's result either.
    again = 2 * ROWS * NARROW * WIDE / ARITHMETIC + (2 * wide + 3 * narrow) / MEMORY + 3 * LAUNCH
    moved = 2 * narrow + 2 * narrow + weight * (1 + 2 * (2 * count - 1))
    seconds = 2 * (again + moved / MEMORY + 3 * (count - 1) * 4 * LAUNCH)
    assert found.seconds[Key("again", stretch.block, stretch.name, "in pieces")] == pytest.approx(seconds)


class Longer(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(nn.functional.silu(self.up(x))))


@pytest.mark.parametrize(("fused", "kernels"), [(False, 5), (True, 4)])
def test_each_piece_launches_its_kernels_anew(fused, kernels, tmp_path):
    """Each operator is one, or each cluster of what is between products. Of 16 pieces, 12 more than of 4."""
    few, many = (
        found.seconds[Key("again", one.block, one.name, "in pieces")]
        for one, found in (priced(Longer, RECOMPUTES_ALL_BUT_ATTENTION, count, tmp_path, fused=fused, memory=1e30)
                           for count in (4, 16))
    )  # fmt: skip
    assert many - few == pytest.approx(2 * 3 * 12 * kernels * LAUNCH)


@pytest.mark.parametrize("level", [one for one in IN_GROUPS if one.size == 2 and one.in_pieces], ids=str)
def test_pieces_in_a_group_take_as_long_as_in_calls_by_themselves(level, tmp_path):
    seconds = []
    for one in (level, level.of_each):
        stretch, found = priced(Plain, one, 4, tmp_path)
        seconds.append(found.seconds[Key("again", stretch.block, stretch.name, "in pieces")])
    assert seconds[0] == seconds[1] > 0


@pytest.mark.parametrize("count", [4, 16])
def test_pieces_with_a_registered_operator_by_hand(count, tmp_path):
    stretch, found = priced(Mixed, RECOMPUTES_ALL, count, tmp_path)
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE  # bytes, in bf16
    # Each piece makes the whole of tanh's result, which two products use, and a part of the rest. While the operator
    # runs, there are its inputs and the gradients of these and of its result. While tanh does, its result, the
    # gradients of that and of its input, and those of the weights.
    own = max(narrow + 5 * wide / count, 3 * narrow + 2 * weight / count, 3 * narrow + (2 * weight + wide) / count)
    # Around it lie the gradients of the result and of the weights; the sum of the input's, and that of the sum behind,
    # which waits. The result itself, which the last product read, is free by then.
    around = wide + 2 * narrow + 2 * weight
    assert found.memory[Key("working")] == pytest.approx(own + around - wide)
    # Beside it, what comes after needs the operator's result, and pieces need the layer's input.
    assert found.memory[Key("working", stretch.block, "backward")] == pytest.approx(wide + narrow)
    product, mixing = 2 * ROWS * NARROW * WIDE / ARITHMETIC + LAUNCH, 3 * wide / MEMORY + LAUNCH
    tanh, tanh_backward = 2 * narrow / MEMORY + LAUNCH, 3 * narrow / MEMORY + LAUNCH
    # All runs once more than without pieces: in forward, for the last product's gradient, and for each piece's. Only
    # tanh does so for each piece.
    again = 2 * product + mixing + (3 * count - 2) * tanh + (count - 1) * tanh_backward
    # The result is put together twice, and the weights' gradients once: a read and a write each. To the sum of the
    # input's gradient each piece after the first is added: two reads and a write.
    moved = 4 * wide + 2 * 2 * weight + (2 + 3 * (count - 1)) * narrow
    launching = 3 * (count - 1) * 4 * LAUNCH
    seconds = 2 * (again + moved / MEMORY + launching)
    assert found.seconds[Key("again", stretch.block, stretch.name, "in pieces")] == pytest.approx(seconds)


@pytest.mark.parametrize(("count", "before"), [(4, 4), (16, 16), (4, 16)])
def test_pieces_within_pieces_by_hand(count, before, tmp_path):
    """What is before the registered operator is computed for some rows at a time, in each piece of some columns."""
    stretch, found = priced(Mixed, RECOMPUTES_ALL, count, tmp_path, before=before)
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE
    # While a product runs there are, of its rows, tanh's result with its gradient, and what it reads and makes; of its
    # columns, both weights with their gradients.
    inner = 3 * narrow / before + (2 * weight + wide / before) / count
    # Around that lie the gradients of both results, of x, and of the weights, in fp32, all of a piece's columns.
    inner += 2 * wide / count + narrow + 2 * 2 * weight / count
    around = wide + 2 * narrow + 2 * weight
    behind = wide + narrow + weight + narrow  # while the product after it runs, which reads its result
    assert found.memory[Key("working")] == pytest.approx(max(max(inner, 5 * wide / count) + around - wide, behind))
    assert found.memory[Key("working", stretch.block, "backward")] == pytest.approx(wide + narrow)
    for one, name in (((count, 1), stretch.name), ((1, before), stretch.within)):
        _, alone = priced(Mixed, RECOMPUTES_ALL, one[0], tmp_path, before=one[1])
        key = Key("again", stretch.block, name, "in pieces")
        assert found.seconds[key] == alone.seconds[key]


def test_pieces_with_an_all_to_all_by_hand(tmp_path):
    assert priced(Mixed, RECOMPUTES_ALL, 16, tmp_path, 2)[1] is None, "48 columns are no 16 pieces for each of two"
    stretch, found = priced(Mixed, RECOMPUTES_ALL, 4, tmp_path, 2)
    assert found is not None
    narrow, wide, weight = 2 * ROWS * NARROW / 2, 2 * ROWS * WIDE / 2, 2 * NARROW * WIDE  # bytes of a device
    own = max(narrow + 5 * wide / 4, 3 * narrow + 2 * weight / 4, 3 * narrow + (2 * weight + wide) / 4)
    around = wide + 2 * narrow + 2 * weight
    assert found.memory[Key("working")] == pytest.approx(own + around - wide)
    assert found.memory[Key("working", stretch.block, "backward")] == pytest.approx(wide + narrow)
    # As in the test before, but that a device has half of the rows, and after an all-to-all half of the columns.
    product, mixing = 2 * ROWS * NARROW * WIDE / 2 / ARITHMETIC + LAUNCH, 3 * wide / MEMORY + LAUNCH
    tanh, tanh_backward = 2 * narrow / MEMORY + LAUNCH, 3 * narrow / MEMORY + LAUNCH
    again = 2 * product + mixing + 10 * tanh + 3 * tanh_backward
    moved = 4 * wide + 2 * 2 * weight + (2 + 3 * 3) * narrow
    launching = 3 * 3 * 4 * LAUNCH
    # Of what it has, it sends the half. What it sends, and what it gets, is brought in order by a read and a write in
    # strides each. Each piece does so thrice forward and once backward; without pieces, it would be twice and once.
    exchange = wide / 2 / LINK + 2 * 2 * 3 * wide / MEMORY
    exchanges = 2 * (4 * (exchange + 4 * LATENCY) - 3 * (exchange + LATENCY))
    seconds = 2 * (again + moved / MEMORY + launching + exchanges)
    assert found.seconds[Key("again", stretch.block, stretch.name, "in pieces")] == pytest.approx(seconds)


def test_what_is_gathered_in_a_layer_that_is_computed_again_counts_as_it_is_used(tmp_path):
    stretch, found = priced(Mixed, RECOMPUTES_ALL, 1, tmp_path, 2, REPLICATE)
    assert found is not None
    narrow, wide = 2 * ROWS * NARROW, 2 * ROWS * WIDE  # bytes of both devices together
    # Half of tanh's result, for the weights' gradients; all that the operator uses, as it does on each device, and
    # all of its result.
    assert found.memory[Key("working", stretch.block, "backward")] == pytest.approx(narrow / 2 + 2 * wide + wide)
    stretch, found = priced(Plain, RECOMPUTES_ALL, 1, tmp_path, 2, REPLICATE, "silu")
    assert found.memory[Key("working", stretch.block, "backward")] == pytest.approx(wide + wide), "what silu reads, too"


def test_two_pieces_are_tried_only_with_a_registered_operator(tmp_path):
    found = [(one.within is not None, counts_of(one)) for one in two(Grouped, tmp_path, 1).divisible]
    # Of 64 rows, any; of two sequences, and of four heads, as many as there are at most.
    assert found == [*[(False, [4, 16])] * 3, (True, [2]), (True, [2, 4])]


def test_only_levels_that_keep_a_layers_input_alone_allow_its_operators_in_pieces(tmp_path):
    for level in (level for level in (*ON_DEVICE, *IN_GROUPS) if level.size <= 2):
        _, found = priced(Mixed, level, 4, tmp_path)
        assert (found is not None) == (level.of_each is RECOMPUTES_ALL)
