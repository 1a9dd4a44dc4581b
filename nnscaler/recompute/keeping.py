"""What can be kept of a block for backward, and what must then be computed again.

keep_all    what each operator saves; nothing is computed again
keep_cut    what operators of some kinds save, and the least from which cheap operators give the rest, as a fusing
            compiler does
keep_from   the block's inputs, and what operators of some kinds save and collectives bring for them; the rest is
            computed again
part_again  another keeping, but for some units, which are computed again from their inputs
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from nnscaler.graph import Block
from nnscaler.units import Unit, needed_by

Use = tuple[int, str]  # (index of a unit, tensor that it uses)


@dataclass(frozen=True)
class Keeping:
    """What is kept of a call, and what is computed again, whatever the layouts.

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


def part_again(parts: Iterable[int], units: list[Unit], base: Keeping) -> Keeping:
    """`base` but for some units, by index, which are computed again from their inputs."""
    again = set(parts)
    made_inside = {name for index in again for name in units[index].outputs}
    inputs = {name for index in again for name in units[index].inputs} - made_inside
    return replace(
        base,
        made=frozenset((base.made - made_inside) | inputs),
        used=frozenset(use for use in base.used if use[0] not in again),
        moved=frozenset(use for use in base.moved if use[0] not in again),
        again=base.again | again,
    )


def _needed(units: list[Unit], block: Block) -> list[tuple[int, str, bool]]:
    """(unit, tensor, whether the tensor is its input) of everything that some backward reads."""
    return [
        (index, name, name in unit.inputs)
        for index, unit in enumerate(units)
        if unit.kind != "call"
        for name in needed_by(unit, block)
    ]


def keep_all(units: list[Unit], block: Block) -> Keeping:
    needed = _needed(units, block)
    return Keeping(
        made=frozenset(name for _, name, is_input in needed if not is_input),
        used=frozenset((index, name) for index, name, is_input in needed if is_input),
        inside=True,
    )


def keep_cut(units: list[Unit], block: Block, as_used: Collection[str]) -> Keeping:
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
    import networkx  # what runs generated code needs levels, but not this

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


def keep_from(units: list[Unit], block: Block, as_used: Collection[str]) -> Keeping:
    """The block's inputs, and what units of the kinds `as_used` made and save; where there are such, also what
    collectives bring, which otherwise are done again."""
    needed = _needed(units, block)
    inputs, parameters = set(block.inputs), set(block.parameters)
    if not as_used:
        again, _ = _again({name for _, name, _ in needed}, inputs | parameters, units)
        return Keeping(made=frozenset(inputs), again=frozenset(again), reshard=True)
    made = {name for unit in units if unit.kind in as_used for name in unit.outputs}
    used = {(index, name) for index, name, is_input in needed if is_input and units[index].kind in as_used}
    kept = inputs | made
    wanted = {name for index, name, _ in needed if (index, name) not in used}
    again, uses = _again(wanted, kept | parameters, units)
    moved = {(index, name) for index, name, is_input in needed if is_input} | uses
    kept &= wanted | {name for _, name in uses}
    return Keeping(frozenset(kept), frozenset(used), frozenset(moved - used), frozenset(again))
