"""What levels are said to keep is what a real run keeps."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nnscaler import planner, planning
from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.errors import UserError
from nnscaler.graph import Call, Ref
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.operators.attention import attention
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.recompute import (
    KEEPS_ALL,
    KEEPS_PRODUCTS,
    LEVELS,
    ON_DEVICE,
    RECOMPUTES_ALL,
    RECOMPUTES_ALL_BUT_ATTENTION,
    SAME_ON_HOST,
    level_of,
    rank,
    recomputes,
)
from nnscaler.recompute.keeping import Keeping, keep_all, keep_cut, keep_from, keep_group, part_again
from nnscaler.runtime import regions
from nnscaler.runtime.module import ParallelModule
from nnscaler.trace import trace
from nnscaler.units import divide, needed_by, regions_of
from tests import tiny
from tests.test_units import block


class Gated(nn.Module):
    """Cheap operators before, between and after three products of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 48, bias=False), nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return torch.tanh(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def kept(function, *args: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps of a call, but for parameters."""
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return sorted(found.values())


@pytest.mark.parametrize("level", ON_DEVICE, ids=str)
def test_a_level_keeps_what_it_says(level):
    torch._dynamo.reset()
    inputs = {"x": torch.empty((8, 16), device="meta", requires_grad=True)}
    built, buffers = Source(Gated, inputs, torch.float32).build()
    block = trace(built, inputs, buffers).root
    for name in block.inputs:  # as of a layer in a stack
        assert block.tensors[name].shape == (8, 16)
    keeping = level.keeps(divide(block), block, True)
    names = keeping.as_made | {name for _, name in keeping.as_used}
    said = sorted(tuple(block.tensors[name].shape) for name in names - set(block.parameters))
    model = Gated()
    wrapper = level.region or level.call
    function = model.forward if wrapper is None else functools.partial(wrapper, model.forward)
    compiled = torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    assert kept(compiled, torch.randn(8, 16, requires_grad=True)) == said


def test_what_is_computed_again_is_not_kept_but_its_inputs_are():
    """Of x = sigmoid(x), products of it, silu(gate) * up, a product and its tanh: the last cluster alone, and the first
    with the products after it."""
    inputs = {"x": torch.empty((8, 16), device="meta", requires_grad=True)}
    model, buffers = Source(Gated, inputs, torch.float32).build()
    block = trace(model, inputs, buffers).root
    units = divide(block)
    base = keep_all(units, block)
    last = len(units) - 1
    (result,) = units[last].outputs
    assert result in base.as_made, "backward of tanh reads its result"
    found = part_again([last], units, base)
    assert found.as_made == (base.as_made - {result}) | set(units[last].inputs)
    assert found.as_used == {use for use in base.as_used if use[0] != last}
    assert found.recomputed == {last}
    cut = keep_cut(units, block, ("registered",))
    again = {index for index, _ in cut.as_resharded}
    assert len(again) > 1
    assert any(len(units[index].nodes) > 1 for index in cut.recomputed), "a cluster of several operators"
    assert all(name in units[index].inputs for index, name in cut.as_resharded), "not what it makes, or has inside"
    for index in again:
        left = {use for use in cut.as_resharded if use[0] != index}
        assert part_again([index], units, cut).as_resharded == left < cut.as_resharded
    whole = part_again(range(len(units)), units, base)
    outside = {name for unit in units for name in unit.inputs} - {name for unit in units for name in unit.outputs}
    assert whole.as_made == outside >= set(block.inputs)
    assert whole.as_used == set()


def test_what_a_group_runs_again_comes_on_top_of_what_its_calls_do():
    """Of a group of two, all of the first call, and of the last one its first unit; and inside, the first once more."""
    kept = Keeping(recomputed=frozenset({0}), reshards_again=True, with_group={0: 1.0, 1: 0.5})
    assert [kept.runs_again(unit) for unit in range(3)] == [2.0, 0.5, 0.0]
    assert kept.reshards_so_often == 2.0
    assert Keeping(reshards_again=True).reshards_so_often == 1.0
    assert Keeping(with_group={0: 0.5}).reshards_so_often == 0.5
    assert Keeping().reshards_so_often == 0.0


def test_of_the_last_call_of_a_group_only_what_leads_to_what_is_kept_runs_again():
    given = block(("linear", "h", "x w"), ("silu", "s", "h"), ("linear", "y", "s w"), outputs=("y",), inputs=("x",))
    units = divide(given)
    assert len(units) == 3
    for inner, parts in (
        (keep_all(units, given), {0: 1, 1: 1, 2: 3 / 4}),
        (keep_from(units, given, ()), {0: 3 / 4, 1: 3 / 4, 2: 3 / 4}),
    ):
        found = keep_group(units, given, 4, inner)
        assert (found.as_made, found.with_group) == ({"x"}, parts)
        assert (found.recomputed, found.reshards_again) == (inner.recomputed, inner.reshards_again)


def test_weights_are_there_anyway_and_calls_keep_by_themselves():
    """Of a = x * v and b = x + u, both read by products: they are made again from x. A call keeps itself."""
    given = block(
        ("mul", "a", "x v"), ("add", "b", "x u"), ("linear", "y", "a w"), ("linear", "z", "b w"), outputs=("y", "c"),
    )  # fmt: skip
    given.nodes.append(Call("c", "call", (Ref("z"),), {}, ("c",), block="other"))
    given.tensors.update(dict.fromkeys("cuv", given.tensors["z"]))
    given.parameters |= {"u": "u", "v": "v"}
    units = divide(given)
    called = next(index for index, unit in enumerate(units) if unit.kind == "call")
    found = keep_cut(units, given, ("registered",))
    assert found.as_made == {"x"}
    for keeping in (found, keep_all(units, given), keep_from(units, given, ())):
        assert called not in keeping.recomputed | {index for index, _ in keeping.as_used | keeping.as_resharded}
        assert keep_group(units, given, 2, keeping).with_group.keys() == set(range(len(units))) - {called}


def test_only_what_is_cut_is_kept():
    """Of t = p + r and a product of t: the sum, and neither p nor r, of which it is made, nor what is made of it."""
    given = block(
        ("linear", "p", "x w"),
        ("add", "t", "p r"),
        ("linear", "y", "t w"),
        outputs=("y",),
        inputs=("x", "r"),
    )
    found = keep_cut(divide(given), given, ("registered",))
    assert found.as_made == {"x", "t"}
    assert found.recomputed == set()


def test_a_product_alone_keeps_what_it_reads_as_it_reads_it():
    inputs = {"input": torch.empty((8, 16), device="meta", requires_grad=True)}
    model, buffers = Source(lambda: nn.Linear(16, 16, bias=False), inputs, torch.float32).build()
    block = trace(model, inputs, buffers).root
    (unit,) = divide(block)
    found = keep_cut([unit], block, ("product",))
    assert found.as_used == {(0, name) for name in needed_by(unit, block)} != set()
    assert found.as_made == found.as_resharded == found.recomputed == set()
    rounding = keep_cut([replace(unit, rounds=True)], block, ("product",))
    assert rounding.as_used == found.as_used
    assert (rounding.as_made, rounding.copied) == (set(), {(0, "input")}), "the copy in fp8, which is smaller"


def test_a_copy_in_fp8_is_kept_where_its_region_keeps_nothing_of_which_to_make_it():
    """Of o = attention(q, k, v), products of o, of silu(h), of h + a, and of r, which silu reads too: o is kept by
    attention, in another region."""
    given = block(
        ("attention", "o", "q k v"),
        ("linear", "h", "o w"),
        ("silu", "s", "h"),
        ("linear", "a", "s w"),
        ("add", "t", "h a"),
        ("linear", "b", "t w"),
        ("silu", "u", "r"),
        ("linear", "c", "r w"),
        outputs=("b", "u", "c"),
        inputs=("q", "k", "v", "r"),
    )
    units = [replace(unit, rounds=unit.kind == "product") for unit in divide(given)]
    names = {index: unit.name for index, unit in enumerate(units)}
    found = keep_cut(units, given, ("registered", "product"))
    assert {(names[index], name) for index, name in found.copied} == {("h", "o"), ("b", "t")}
    assert found.as_made == {"o", "h", "r"}, "of which the copies of s and r are made again"
    assert keep_cut(units, given, ("registered",)).copied == set()
    everything = {("h", "o"), ("a", "s"), ("b", "t"), ("c", "r")}
    assert {(names[index], name) for index, name in keep_all(units, given).copied if name != "w"} == everything


def test_inputs_that_no_backward_reads_are_not_kept():
    """Of o = attention(q, k, v), silu(o) and a sum with r: attention's inputs as it uses them, and its result."""
    given = block(
        ("attention", "o", "q k v"),
        ("silu", "s", "o"),
        ("add", "y", "s r"),
        outputs=("y",),
        inputs=("q", "k", "v", "r"),
    )
    units = divide(given)
    found = keep_from(units, given, ("registered",))
    assert found.as_made == {"o"}
    assert {name for _, name in found.as_used} == {"q", "k", "v"}
    assert found.recomputed == set()
    whole = keep_from(units, given, ())
    assert whole.as_made == {"q", "k", "v", "r"}, "from which the call is computed again"
    assert whole.reshards_again


def test_a_result_that_its_own_backward_reads_is_kept_as_it_is_made_and_as_a_product_uses_it():
    """Of o = attention(q, k, v) and a product of o: heads may be divided in the one, tokens in the other."""
    given = block(("attention", "o", "q k v"), ("linear", "y", "o w"), outputs=("y",), inputs=("q", "k", "v"))
    found = keep_cut(divide(given), given, ("registered", "product"))
    assert found.as_made == {"o"}
    assert found.as_used == {(0, "q"), (0, "k"), (0, "v"), (1, "o"), (1, "w")}


def test_what_collectives_bring_to_what_is_computed_again_is_kept():
    """Of t = o + r and a product of t: the sum's backward reads neither o nor r, but t is made again from them."""
    given = block(
        ("attention", "o", "q k v"),
        ("add", "t", "o r"),
        ("linear", "y", "t w"),
        outputs=("y",),
        inputs=("q", "k", "v", "r"),
    )
    found = keep_from(divide(given), given, ("registered",))
    assert found.recomputed == {1}
    assert found.as_made == {"o", "r"}
    assert found.as_resharded == {(1, "o"), (1, "r"), (2, "t"), (2, "w")}


def test_what_one_region_gives_to_another_is_kept():
    """Of o = attention(q, k, v), with a gate g = silu(p) that is computed before it, m = o * g, and a product of m:
    what is before attention computes p again; what is after it has been given g."""
    given = block(
        ("linear", "q", "x w"),
        ("linear", "p", "x w"),
        ("attention", "o", "q k v"),
        ("silu", "g", "p"),
        ("mul", "m", "o g"),
        ("linear", "y", "m w"),
        outputs=("y",),
        inputs=("x", "k", "v"),
    )
    units = divide(given)
    assert [(unit.name, region) for unit, region in zip(units, regions_of(units))] == [
        ("q", 0), ("p", 0), ("o", 0), ("g", 0), ("m", 1), ("y", 1),
    ]  # fmt: skip
    found = keep_from(units, given, ("registered",))
    assert found.as_made == {"x", "o", "g"}
    assert {units[index].name for index in found.recomputed} == {"p", "m"}
    found = keep_cut(units, given, ("registered",))
    assert found.as_made == {"x", "o", "p", "g"}, "p, which silu's backward reads, and g"
    assert {units[index].name for index in found.recomputed} == {"m"}
    assert keep_cut(units, given, ("registered", "product")).as_made == {"o", "p", "g"}


@pytest.mark.parametrize(("as_used", "kept"), [(("registered",), "xogp"), (("registered", "product"), "og")])
def test_what_another_region_was_given_is_made_again_where_products_are_kept(as_used, kept):
    """The same with g = p.exp(), whose backward reads g: where products are kept, p is, and gives g again."""
    given = block(
        ("linear", "q", "x w"),
        ("linear", "p", "x w"),
        ("attention", "o", "q k v"),
        ("exp", "g", "p"),
        ("mul", "m", "o g"),
        ("linear", "y", "m w"),
        outputs=("y",),
        inputs=("x", "k", "v"),
    )
    assert keep_cut(divide(given), given, as_used).as_made == set(kept)


class Crossing(nn.Module):
    """Attention with a gate that is computed before it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.gate, self.out = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query(x).unflatten(-1, (2, 8)).transpose(1, 2)
        gate = torch.sigmoid(self.gate(x))
        return self.out(attention(heads, heads, heads).flatten(2) * gate)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Crossing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def held_after(run: Callable[[], Tensor]) -> int:
    """Bytes that there are after `run` and were not there before, beside those of its result."""
    gc.collect()  # else what others left may be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = profiled.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") - result.nbytes


def said_and_held(level, block, calls, source, program, hardware, folder, monkeypatch):
    """Bytes that a model keeps where so many calls of a block have a level: as the program says, and in a real run."""
    levels = {program.problem.root: {KEEPS_ALL: 1}, block: {level: calls}}
    found = price(program, Solution([0] * len(program.problem.decisions), levels))
    assert found is not None
    said = sum(size for key, size in found.memory.items() if key.category in ("saved", "inside"))

    def find_plan(*args, **options):
        plan = planner.find_plan(*args, **options)
        plan.levels[block] = {level: calls}
        return plan

    monkeypatch.setattr(planning, "find_plan", find_plan)
    compile_model(source, ComputeConfig(hardware=hardware), folder / level.name)
    module = ParallelModule(folder / level.name, torch.device("cpu"))
    module.load(lambda name, box: torch.full(box.sizes, 0.01))
    module(**source.inputs)  # what is compiled is, and scales of weights are found
    return said, held_after(functools.partial(module, **source.inputs))


@pytest.mark.parametrize(
    ("level", "compiled", "tensors"),
    # Heads, the gate and attention's result; and where products are kept, that before the gate.
    [(RECOMPUTES_ALL_BUT_ATTENTION, False, 3), (KEEPS_PRODUCTS, True, 4)],
)
def test_a_real_run_keeps_what_goes_from_one_region_to_another(level, compiled, tensors, tmp_path, monkeypatch):
    """Beyond what layers keep that are computed again as a whole."""
    torch._dynamo.reset()
    monkeypatch.setattr(regions, "_on_accelerator", lambda args: compiled)
    compile_ = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compile_)
    hardware = tiny.write_hardware(tmp_path)
    source = Source(Stacked, {"x": torch.zeros(1, 64, 16)}, torch.float32)
    model, buffers = source.build()
    graph, costs = trace(model, source.inputs, buffers), CostModel(load_hardware(hardware), Mesh((1,)), compiled)
    problem = build_problem(graph, costs, Recomputing(), 1)
    said, held = zip(*(
        said_and_held(one, "crossing", 3, source, Program(problem), hardware, tmp_path, monkeypatch)
        for one in (RECOMPUTES_ALL, level)
    ))  # fmt: skip
    assert held[1] - held[0] == said[1] - said[0] == 3 * 4 * (tensors * 64 * 16 + 2 * 64), "with sums of rows"


def test_of_a_cluster_of_which_a_part_runs_again_only_what_that_reads_is_kept():
    """The same with u = t + z beside it, in one cluster: nobody's backward reads u, so that z is not needed."""
    given = block(
        ("attention", "o", "q k v"),
        ("add", "t", "o r"),
        ("add", "u", "t z"),
        ("linear", "y", "t w"),
        outputs=("y", "u"),
        inputs=("q", "k", "v", "r", "z"),
    )
    found = keep_from(divide(given), given, ("registered",))
    assert found.as_made == {"o", "r"}
    assert found.as_resharded == {(1, "o"), (1, "r"), (2, "t"), (2, "w")}


def test_what_is_kept_anyway_costs_nothing_more():
    """Of n = q + k and a product of n: it is made again from what attention keeps, and not kept beside it."""
    given = block(
        ("attention", "o", "q k v"),
        ("add", "n", "q k"),
        ("linear", "y", "n w"),
        outputs=("o", "y"),
        inputs=("q", "k", "v"),
    )
    found = keep_cut(divide(given), given, ("registered",))
    assert {name for _, name in found.as_used} == {"q", "k", "v"}
    assert found.as_made == {"o"}


def test_levels_keep_less_and_less():
    assert ON_DEVICE == (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION, RECOMPUTES_ALL)
    assert [level.everything for level in ON_DEVICE] == [True, False, False, False]


def test_what_each_level_is():
    """How many calls it takes together, whether their regions may be in pieces, and what wraps regions and calls."""
    each = {
        "keeps all": (False, None, None, True),
        "keeps products": (False, "keeping_products", None, False),
        "recomputes all but attention": (True, "recompute", None, False),
        "recomputes all": (True, None, "recompute", False),
    }
    wanted = {name: (1, *facts, None) for name, facts in each.items()}
    for size in (2, 4):
        for inner in ("keeps all", "recomputes all but attention", "recomputes all"):
            pieces, region, *_ = each[inner]
            wanted[f"recomputes groups of {size}, inside {inner}"] = (size, pieces, region, "recompute", False, inner)
    wanted |= {f"{name}, on the host": facts for name, facts in wanted.items()}
    name_of = lambda wrapper: wrapper and wrapper.__name__  # noqa: E731
    found = {
        level.name: (
            level.size, level.in_pieces, name_of(level.region), name_of(level.call), level.everything,
            level.inner and level.inner.name,
        )
        for level in LEVELS
    }  # fmt: skip
    assert found == wanted
    assert all(level.on_host == level.name.endswith(", on the host") for level in LEVELS)
    assert all(level_of(level.name) is level for level in LEVELS)
    assert all(SAME_ON_HOST[level].name == f"{level.name}, on the host" for level in SAME_ON_HOST)
    named = recomputes(["a", "b"])
    assert (named.named, named.size, named.on_host, named.in_pieces) == ({"a", "b"}, 1, False, False)
    assert rank(named) < min(map(rank, LEVELS))
    assert sorted(ON_DEVICE, key=rank) == list(ON_DEVICE), "from most kept to least"
    with pytest.raises(UserError, match="recompute level 'keeps some' is not one of keeps all, keeps products"):
        level_of("keeps some")
