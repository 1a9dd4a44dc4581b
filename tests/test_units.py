"""How a block is divided into units, what of them backward needs, and the order in which they run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from nnscaler.graph import Block, Call, Node, Ref, TensorMeta
from nnscaler.units import Unit, divide, is_elementwise, needed_by, pure, saved_by

SIZES = {"linear": "aten.linear.default", "silu": "aten.silu.default", "mul": "aten.mul.Tensor", "t": "aten.t.default",
         "add": "aten.add.Tensor", "attention": "attention", "sum": "aten.sum.default", "cumsum": "aten.cumsum.default",
         "as": "aten.type_as.default", "exp": "aten.exp.default"}  # fmt: skip


def block(*nodes: tuple[str, str, str], outputs: tuple[str, ...], inputs: tuple[str, ...] = ("x",)) -> Block:
    """Square tensors. Of each node: its operator, its result, and what it takes, with blanks between."""
    found = Block("layer", "Layer", inputs=list(inputs), outputs=list(outputs), parameters={"w": "w"})
    for op, name, taken in nodes:
        args = tuple(map(Ref, taken.split()))
        found.nodes.append(Node(name, SIZES[op], args, {}, (name,)))
    names = {*inputs, "w", *(name for _, name, _ in nodes)}
    shape = (2, 4, 8, 8) if any(op == "attention" for op, *_ in nodes) else (8, 8)
    found.tensors = {name: TensorMeta(shape, torch.float32, True) for name in names}
    return found


def units_of(given: Block) -> list[tuple[str, list[str], list[str], list[str], int]]:
    return [
        (unit.kind, [node.name for node in unit.nodes], unit.inputs, unit.outputs, unit.depth) for unit in divide(given)
    ]


def test_a_gated_mlp_has_three_products_and_a_cluster():
    given = block(
        ("linear", "gate", "x w"), ("silu", "act", "gate"), ("linear", "up", "x w"), ("mul", "inner", "act up"),
        ("linear", "down", "inner w"), ("add", "out", "x down"), outputs=("out", "act"),
    )  # fmt: skip
    assert units_of(given) == [
        ("product", ["gate"], ["x", "w"], ["gate"], 1),
        ("product", ["up"], ["x", "w"], ["up"], 1),
        ("cheap", ["act", "inner"], ["gate", "up"], ["act", "inner"], 1),
        ("product", ["down"], ["inner", "w"], ["down"], 2),
        ("cheap", ["out"], ["x", "down"], ["out"], 2),
    ]
    cluster = divide(given)[2]
    assert (cluster.name, cluster.main.name, pure(cluster)) == ("inner", "act", True)
    assert set(needed_by(cluster, given)) == {"gate", "act", "up"}, (
        "silu's input; both factors, of which one is an output"
    )
    inside = replace(given, outputs=["out"])
    assert set(needed_by(divide(inside)[2], inside)) == {"gate", "up"}, "what is inside is made again from these"
    (product,) = (unit for unit in divide(given) if unit.name == "down")
    assert set(needed_by(product, given)) == {"inner", "w"}
    assert pure(product)


def test_a_product_does_not_lie_between_parts_of_a_cluster():
    given = block(("silu", "a", "x"), ("linear", "b", "a w"), ("mul", "c", "a b"), outputs=("c",))
    assert [names for _, names, *_ in units_of(given)] == [["a"], ["b"], ["c"]]


def test_what_is_used_twice_is_looked_at_once():
    """Each of 60 operators uses the one before twice: there are 2^60 ways through them."""
    names = ["x", *(f"t{i}" for i in range(60))]
    given = block(
        *(("mul", name, f"{before} {before}") for before, name in itertools.pairwise(names)), outputs=("t59",)
    )
    assert needed_by(divide(given)[0], given) == ["x"]


def test_what_is_made_inside_is_made_again_from_what_comes_from_outside():
    given = block(("add", "a", "x y"), ("mul", "b", "a z"), outputs=("b",), inputs=("x", "y", "z"))
    assert needed_by(divide(given)[0], given) == ["z", "x", "y"]


def test_calls_and_what_looks_at_their_results_are_units_of_their_own():
    given = block(
        ("linear", "a", "x w"), ("silu", "b", "x"), ("t", "c", "b"), ("linear", "d", "c w"), outputs=("a", "d")
    )
    first, second = (
        Call(name, "call", (Ref(taken),), {}, (name,), block="layer", parameters={})
        for name, taken in (("a", "x"), ("b", "a"))
    )
    given.nodes = [first, second, *given.nodes[2:]]
    assert [(kind, names, depth) for kind, names, _, _, depth in units_of(given)] == [
        ("call", ["a"], 1), ("call", ["b"], 2), ("cheap", ["c"], 2), ("product", ["d"], 3)
    ]  # fmt: skip
    assert saved_by(first, given) == []
    assert not pure(divide(given)[0])


def test_what_looks_at_no_neighbours_is_elementwise():
    """One is written in another type; sums look at all elements, cumulative ones at those before."""
    given = block(
        ("silu", "a", "x"), ("mul", "b", "a x"), ("as", "c", "b x"), ("t", "d", "c"), ("linear", "e", "x w"),
        ("sum", "f", "x"), outputs=(),
    )  # fmt: skip
    given.nodes.append(Node("g", SIZES["cumsum"], (Ref("x"), 0), {}, ("g",)))
    given.nodes.append(Node("h", "aten.flip.default", (Ref("x"), [0]), {}, ("h",)))
    given.tensors["h"] = given.tensors["g"] = given.tensors["x"]
    given.tensors["f"] = TensorMeta((), torch.float32, True)
    nodes = {node.name: node for node in given.nodes}
    for names, wanted in (
        ("a", True),
        ("abcd", True),
        ("e", False),
        ("f", False),
        ("g", False),
        ("abg", False),
        ("h", False),
    ):
        assert is_elementwise(Unit("cheap", [nodes[name] for name in names]), given) == wanted, names


def test_views_belong_to_what_they_look_at():
    given = block(("linear", "a", "x w"), ("t", "b", "a"), ("linear", "c", "b w"), outputs=("c",))
    assert [(kind, names, made) for kind, names, _, made, _ in units_of(given)] == [
        ("product", ["a", "b"], ["b"]), ("product", ["c"], ["c"])
    ]  # fmt: skip
    first, second = divide(given)
    assert set(needed_by(second, given)) == {"b", "w"}
    assert set(needed_by(first, given)) == {"x", "w"}
    twice = block(("linear", "a", "x w"), ("t", "b", "a"), ("t", "c", "b"), ("linear", "d", "c w"), outputs=("d",))
    assert [names for _, names, *_ in units_of(twice)] == [["a", "b", "c"], ["d"]]
    computed = block(("linear", "a", "x w"), ("t", "b", "a"), ("silu", "c", "b"), outputs=("c",))
    assert [(kind, names) for kind, names, *_ in units_of(computed)] == [("product", ["a"]), ("cheap", ["b", "c"])], (
        "with what is computed of it, a view is part of a cluster"
    )
    of_two = block(("t", "a", "x"), ("linear", "b", "a w"), outputs=("b",))
    assert [names for _, names, *_ in units_of(of_two)] == [["a"], ["b"]], "a view of an input has no such unit"


def test_units_stand_in_an_order_in_which_they_can_run():
    """A cluster whose first part comes early, and whose last needs a product that stands after it."""
    given = block(
        ("silu", "a", "x"), ("linear", "b", "y w"), ("silu", "c", "b"), ("linear", "d", "a w"), ("mul", "e", "c d"),
        outputs=("e",), inputs=("x", "y"),
    )  # fmt: skip
    assert [names for _, names, *_ in units_of(given)] == [["a"], ["b"], ["d"], ["c", "e"]]


def test_what_no_gradient_goes_through_saves_nothing():
    given = block(("linear", "a", "x w"), outputs=("a",))
    (node,) = given.nodes
    assert sorted(saved_by(node, given)) == ["w", "x"]
    given.tensors["x"] = replace(given.tensors["x"], requires_grad=False)
    assert saved_by(node, given) == ["x"], "for the weight's gradient"
    largest = Node("m", "aten.max.dim", (Ref("a"), 0), {}, ("m", "at"))
    given.tensors |= {"m": given.tensors["a"], "at": TensorMeta((8,), torch.int64)}
    assert saved_by(largest, given) == ["at"], "one of two results has a gradient"
    given.tensors["a"] = replace(given.tensors["a"], requires_grad=False)
    assert saved_by(node, given) == []


def test_what_a_registered_operator_saves_inside_is_kept_as_the_view_of_it_that_goes_out():
    given = block(("attention", "a", "q k v"), ("t", "b", "a"), outputs=("b",), inputs=("q", "k", "v"))
    (unit,) = divide(given)
    assert (unit.kind, unit.name, unit.main.name, pure(unit)) == ("registered", "b", "a", False)
    assert "a" in saved_by(unit.main, given)
    assert set(needed_by(unit, given)) == {"q", "k", "v", "b"}
