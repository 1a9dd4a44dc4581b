"""Which stretches of a block can be computed in pieces: for one piece of a dimension after the other.

A dimension may be split over devices, or over time. Where annotations allow operators to be split over devices without
communication, the same operators can be computed in pieces. What they make in between then exists only a piece at a
time. An example is the MLP of a decoder layer, on a sixteenth of the tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nnscaler.annotation import Bound, Split
from nnscaler.graph import Block, Node
from nnscaler.operators import bind
from nnscaler.placement import Placement, Replicate, Shard
from nnscaler.units import Unit, divide, pure

MOST_WAYS = 64  # about so many are looked at for one stretch


@dataclass(frozen=True)
class Stretch:
    """Units of a block that can be computed in pieces: all that is pure between two registered operators or calls.

    name        that of its last unit
    units       their indices among the block's units
    inputs      tensors that come from outside, in order
    outputs     tensors that others use, in order
    dims        tensor -> the dimension that is divided; a tensor that is not named is used or made whole by each piece
    ends_block  whether nothing of the block is computed after it
    """

    name: str
    units: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: Mapping[str, int]
    ends_block: bool


def stretches(block: Block) -> list[Stretch]:
    """The stretches of a block, in the order in which they run."""
    units = divide(block)
    places = _places(units)
    found = []
    for place in sorted({place for unit, place in zip(units, places) if pure(unit)}):
        members = [index for index, unit in enumerate(units) if pure(unit) and places[index] == place]
        stretch = _stretch(block, units, members)
        if stretch is not None:
            found.append(stretch)
    return found


def _places(units: list[Unit]) -> list[int]:
    """For each unit, the largest number of registered operators and calls on a way to it."""
    made_by = {name: index for index, unit in enumerate(units) for name in unit.outputs}
    places: list[int] = []
    for unit in units:
        producers = [made_by[name] for name in unit.inputs if name in made_by]
        places.append(max((places[index] + (not pure(units[index])) for index in producers), default=0))
    return places


def _stretch(block: Block, units: list[Unit], members: list[int]) -> Stretch | None:
    """The stretch of some units. None where it cannot be computed in pieces, or needs what other pure units make."""
    inside = {name for index in members for name in units[index].outputs}
    elsewhere = {name for index, unit in enumerate(units) if index not in members for name in unit.inputs}
    inputs = dict.fromkeys(name for index in members for name in units[index].inputs if name not in inside)
    outputs = [name for index in members for name in units[index].outputs if name in elsewhere or name in block.outputs]
    others = {name for index, unit in enumerate(units) if pure(unit) and index not in members for name in unit.outputs}
    if others & inputs.keys() or not all(block.tensors[name].requires_grad for name in outputs):
        return None
    nodes = sorted((node for index in members for node in units[index].nodes), key=block.nodes.index)
    ways = [way for way in _ways(block, nodes) if outputs and all(name in way for name in outputs)]
    if not ways:
        return None
    dims = max(ways, key=lambda way: min(block.tensors[name].shape[way[name]] for name in outputs))
    ends_block = not elsewhere & set(outputs) and max(members) == len(units) - 1
    return Stretch(units[members[-1]].name, tuple(members), tuple(inputs), tuple(outputs), dims, ends_block)


def _ways(block: Block, nodes: list[Node]) -> Iterator[dict[str, int]]:
    """Ways to divide some nodes, each as the divided dimension of each divided tensor.

    Parameters are whole, and no node makes a term of a sum. All ways are found, unless there are very many.
    """
    bounds = [bind(node, block) for node in nodes]
    whole: dict[str, Placement] = dict.fromkeys(block.parameters, Replicate())
    begun = [(0, whole)]  # (how many nodes are divided, how their tensors are)
    for _ in range(MOST_WAYS * (len(nodes) + 1)):
        if not begun:
            return
        index, known = begun.pop()
        if index == len(nodes):
            yield {name: place.dim for name, place in known.items() if isinstance(place, Shard)}
            continue
        node = nodes[index]
        for way in _splits(bounds[index]):
            after = dict(known)
            if all(after.setdefault(name, place) == place for name, place in zip(node.inputs, way.inputs)):
                after.update(zip(node.outputs, way.outputs))
                begun.append((index + 1, after))


def _splits(bound: Bound) -> Iterator[Split]:
    """The ways to divide one operator, with no partial sums."""
    for way in bound.splits(1):
        places = (*way.inputs, *way.outputs)
        if all(isinstance(place, (Shard, Replicate)) for place in places):
            alike = [place if isinstance(place, Shard) else Replicate() for place in places]
            yield Split(way.name, tuple(alike[: len(way.inputs)]), tuple(alike[len(way.inputs) :]))
