"""Recompute levels: what each keeps of a block for backward, and what it computes again.

none     keep what each operator saves; nothing is computed again. A fusing compiler keeps what products save, and of
         what cheap operators save the least from which they give the rest
cheap    keep the smallest set of tensors from which cheap operators give the rest
compute  keep the block's inputs, what registered operators save, and what collectives bring; compute products again
all      keep the block's inputs
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import networkx

from nnscaler.graph import Block
from nnscaler.planner.units import Unit, needed_by

LEVELS = ("none", "cheap", "compute", "all")
Use = tuple[int, str]  # (index of a unit, tensor that it uses)


@dataclass(frozen=True)
class Keeping:
    """What one level keeps and computes again, whatever the layouts.

    made    tensors kept in the layout in which they are made
    used    uses whose tensor is kept in the layout in which it is used
    moved   uses whose tensor is kept in that layout where it had to be resharded for it
    again   units that are computed again
    reshard whether resharding is done again too
    inside  whether unfused clusters keep their inner tensors
    """

    made: frozenset[str] = frozenset()
    used: frozenset[Use] = frozenset()
    moved: frozenset[Use] = frozenset()
    again: frozenset[int] = frozenset()
    reshard: bool = False
    inside: bool = False


def keeping(level: str, units: list[Unit], block: Block, fused: bool) -> Keeping:
    """What `level` means for a block."""
    if level == "none":
        return _keep_cut(units, block, ("registered", "product")) if fused else _keep_all(units, block)
    if level == "cheap":
        return _keep_cut(units, block, ("registered",))
    return _keep_from(units, block, everything=level == "all")


def part_again(parts: Iterable[int], units: list[Unit], block: Block, fused: bool) -> Keeping:
    """Level `none` but for given units, which are computed again from their inputs."""
    again = set(parts)
    base = keeping("none", units, block, fused)
    made_inside = {name for index in again for name in units[index].outputs}
    inputs = {name for index in again for name in units[index].inputs} - made_inside
    return Keeping(
        made=frozenset((base.made - made_inside) | inputs),
        used=frozenset(use for use in base.used if use[0] not in again),
        moved=frozenset(use for use in base.moved if use[0] not in again),
        again=base.again | again,
        inside=base.inside,
    )


def _needed(units: list[Unit], block: Block) -> list[tuple[int, str, bool]]:
    """(unit, tensor, whether the tensor is its input) of everything that some backward reads."""
    return [
        (index, name, name in unit.inputs)
        for index, unit in enumerate(units)
        if unit.kind != "call"
        for name in needed_by(unit, block)
    ]


def _keep_all(units: list[Unit], block: Block) -> Keeping:
    needed = _needed(units, block)
    return Keeping(
        made=frozenset(name for _, name, is_input in needed if not is_input),
        used=frozenset((index, name) for index, name, is_input in needed if is_input),
        inside=True,
    )


def _keep_cut(units: list[Unit], block: Block, as_used: Collection[str]) -> Keeping:
    """The least bytes from which cheap units give what is needed: a minimum cut between what exists and what is.

    as_used  kinds of units whose inputs are kept as they are used, rather than computed again
    """
    needed = _needed(units, block)
    made_by = {name: index for index, unit in enumerate(units) for name in unit.outputs}
    used = {(index, name) for index, name, is_input in needed if is_input and units[index].kind in as_used}
    wanted = {name for index, name, _ in needed if (index, name) not in used}
    if not wanted:
        return Keeping(used=frozenset(used))
    kept_anyway = {name for _, name in used}
    cheap = {
        name: node
        for unit in units
        if unit.kind == "cheap"
        for node in unit.nodes
        for name in node.outputs
        if name not in kept_anyway
    }
    network = networkx.DiGraph()
    for name, meta in block.tensors.items():
        inner = name in cheap and name not in made_by
        if not inner:  # an inner tensor of a cluster is never kept: an edge without capacity has no limit
            free = name in block.parameters or name in kept_anyway
            network.add_edge((name, "in"), (name, "out"), capacity=0 if free else meta.nbytes)
        else:
            network.add_edge((name, "in"), (name, "out"))
        if name not in cheap:
            network.add_edge("exists", (name, "in"))
        for source in cheap[name].inputs if name in cheap else ():
            network.add_edge((source, "out"), (name, "in"))
    for name in wanted:
        network.add_edge((name, "out"), "needed")
    # Of equal cuts networkx gives the one nearest to what is needed: a sum, say, after its collective.
    _, (reached, _) = networkx.minimum_cut(network, "exists", "needed")
    cut = {name for name in block.tensors if (name, "in") in reached and (name, "out") not in reached}
    again, uses = _again(wanted, cut, units)
    kept = cut - set(block.parameters) - kept_anyway
    moved = {(index, name) for index, name, is_input in needed if is_input} | uses
    return Keeping(frozenset(kept), frozenset(used), frozenset(moved - used), frozenset(again))


def _again(wanted: set[str], kept: set[str], units: list[Unit]) -> tuple[set[int], set[Use]]:
    """Units that run again, in part or whole, to give `wanted` from `kept`; and what they use from outside."""
    made_by = {name: (index, node) for index, unit in enumerate(units) for node in unit.nodes for name in node.outputs}
    again: set[int] = set()
    uses: set[Use] = set()
    seen = set(kept)
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name in seen or name not in made_by:
            continue
        seen.add(name)
        index, node = made_by[name]
        again.add(index)
        uses.update((index, source) for source in node.inputs if source in units[index].inputs)
        stack += node.inputs
    return again, uses


def _keep_from(units: list[Unit], block: Block, everything: bool) -> Keeping:
    """Keeps the block's inputs, and unless `everything` is computed again what registered operators made and saved."""
    needed = _needed(units, block)
    inputs, parameters = set(block.inputs), set(block.parameters)
    if everything:
        again, _ = _again({name for _, name, _ in needed}, inputs | parameters, units)
        return Keeping(made=frozenset(inputs), again=frozenset(again), reshard=True)
    registered = {name for unit in units if unit.kind == "registered" for name in unit.outputs}
    used = {(index, name) for index, name, is_input in needed if is_input and units[index].kind == "registered"}
    kept = inputs | registered
    wanted = {name for index, name, _ in needed if (index, name) not in used}
    again, uses = _again(wanted, kept | parameters, units)
    made = kept & (wanted | {name for _, name in uses})
    moved = {(index, name) for index, name, is_input in needed if is_input} | uses
    return Keeping(frozenset(made), frozenset(used), frozenset(moved - used), frozenset(again))
