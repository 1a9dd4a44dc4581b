"""Chains of calls: where one goes on, and where another begins."""

from __future__ import annotations

import pytest

from nnscaler.chains import chains, handed_on
from nnscaler.graph import Block, Call, Graph, Node, Ref

Made = tuple[str, str, tuple[str, ...]]  # a call's block and result, and what it takes


def names(*made: Made, outputs: tuple[str, ...] = (), used: str | None = None) -> list[str]:
    """The results of each chain's calls, one after the other. `used`: what another operator, at the end, takes"""
    root = Block("model", "Model", outputs=list(outputs))
    for block, name, inputs in made:
        root.nodes.append(Call(name, "call", tuple(map(Ref, inputs)), {}, tuple(name), block=block, parameters={}))
    if used is not None:
        root.nodes.append(Node("sum", "aten.sum.default", (Ref(used),), {}, ("sum",)))
    found = chains(Graph(root, {}, {}, {}))
    assert all(handed_on(chain) == 0 for chain in found if len(chain) > 1)
    return ["".join(call.name for call in chain) for chain in found]


STACK: list[Made] = [("layer", name, (before, "mask")) for before, name in zip("xabc", "abcd")]


def test_calls_that_hand_on_one_tensor_are_a_chain():
    assert names(*STACK, used="d") == ["abcd"]
    assert names(*STACK, outputs=("d",)) == ["abcd"]
    assert names() == []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({2: ("other", "c", ("b", "mask"))}, ["ab", "c", "d"]),
        ({2: ("layer", "c", ("a", "mask"))}, ["a", "b", "cd"]),  # so two calls use what the first one makes
        ({2: ("layer", "c", ("b", "another"))}, ["ab", "c", "d"]),
        ({2: ("layer", "c", ("mask", "b"))}, ["ab", "c", "d"]),
        ({2: ("layer", "c", ("b", "b"))}, ["ab", "c", "d"]),
        ({3: ("layer", "dd", ("c", "mask"))}, ["abc", "dd"]),  # with two results
    ],
)
def test_where_a_chain_ends(changes, wanted):
    assert names(*(changes.get(index, one) for index, one in enumerate(STACK))) == wanted


@pytest.mark.parametrize("seen", ["outputs", "used"])
def test_what_others_see_ends_a_chain(seen):
    given = {"outputs": ("b",)} if seen == "outputs" else {"used": "b"}
    assert names(*STACK, **given) == ["ab", "cd"]
