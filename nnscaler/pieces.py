"""Which stretches of a block can be computed in pieces: for one piece of a dimension after the other.

A dimension may be split over devices, or over time. Where annotations allow operators to be split over devices without
communication, the same operators can be computed in pieces. What they make in between then exists only a piece at a
time. An example is the MLP of a decoder layer, on a sixteenth of the tokens at a time.

A stretch may also hold one registered operator, with all that is computed for it alone. It is divided along a name of
that operator. An example is attention with the products that make query, key and value, for a group of heads at a time:
these use a part of each weight, and the whole of the layer's input. What comes before the operator is a stretch as
well, and may be computed in pieces of its own within each piece: some heads at a time, and of these some tokens.

What the registered operator uses may be resharded within each piece: say from tokens to heads, by an all-to-all. A
piece then has the same part of each of several blocks of the divided dimension: as many as devices have shards, before
or after, the least common multiple. So each shard is some whole blocks, and the shards of a piece are pieces of shards.
With eight heads, two devices and two pieces, the first piece has heads 0, 1, 4 and 5; of these, after the all-to-all,
one device has 0 and 1, the first half of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from nnscaler.annotation import Bound, Split
from nnscaler.graph import Block, Node
from nnscaler.operators import bind, operator_of
from nnscaler.placement import Placement, Replicate, Shard
from nnscaler.units import Unit, divide, pure, regions_of

MOST_WAYS = 64  # about so many are looked at for one stretch


@dataclass(frozen=True)
class Stretch:
    """Units of a block that can be computed in pieces: all that is pure between two registered operators or calls; or,
    where `within` is given, one registered operator and all that is computed for it alone.

    name        that of its last unit
    units       their indices among the block's units
    inputs      tensors that come from outside, in order
    outputs     tensors that others use, in order
    dims        tensor -> the dimension that is divided; a tensor that is not named is used or made whole by each piece
    ends_block  whether nothing of the block is computed after it
    within      the stretch of all its units but the registered operator
    """

    name: str
    units: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: Mapping[str, int]
    ends_block: bool
    within: Stretch | None = None

    def adds_up(self, tensor: str, block: Block) -> bool:
        """Whether the gradients that pieces have of an input are added up in its own type, as those of an activation
        are that several operators use. Others, such as weights', are added up in fp32."""
        whole = tensor in self.inputs and tensor not in self.dims and tensor not in block.parameters
        return self.within is not None and whole and block.tensors[tensor].requires_grad


def stretches(block: Block) -> list[Stretch]:
    """The stretches of a block, in the order in which they run."""
    units = divide(block)
    regions = regions_of(units)
    found = []
    for region in sorted(set(regions)):
        members = [index for index, unit in enumerate(units) if pure(unit) and regions[index] == region]
        stretch = _stretch(block, units, members)
        if stretch is not None:
            found.append(stretch)
    return found


def with_registered(block: Block, alone: Sequence[Stretch]) -> list[Stretch]:
    """The stretches of a block that hold a registered operator. The rest of each is one of `alone`, its `stretches`."""
    units, found = divide(block), []
    for before in alone:
        users = {index for index, unit in enumerate(units) if set(before.outputs) & set(unit.inputs)}
        if len(users) == 1 and not set(before.outputs) & set(block.outputs):
            stretch = _around(block, units, before, *users)
            found += [stretch] if stretch is not None else []
    return found


def _around(block: Block, units: list[Unit], before: Stretch, index: int) -> Stretch | None:
    """The stretch of a registered operator, and of `before`, which only it uses. None where it cannot be divided."""
    unit = units[index]
    if unit.kind != "registered" or operator_of(unit.main).among_copies is not None:
        return None
    others = [name for name in unit.inputs if name not in before.outputs]
    if any(pure(one) and set(others) & set(one.outputs) for one in units):
        return None  # which might be computed after `before`
    nodes = [node for place in before.units for node in units[place].nodes]
    nodes.sort(key=block.nodes.index, reverse=True)
    ways = [way for way in _ways_along(block, unit, nodes) if all(name in way for name in unit.outputs)]
    if not ways:
        return None
    dims = max(ways, key=lambda way: gcd(*(block.tensors[name].shape[dim] for name, dim in way.items())))
    inputs = dict.fromkeys([*before.inputs, *others])
    every, ends_block = (*before.units, index), index == len(units) - 1
    return Stretch(unit.name, every, tuple(inputs), tuple(unit.outputs), dims, ends_block, before)


def _ways_along(block: Block, unit: Unit, before: list[Node]) -> Iterator[dict[str, int]]:
    """Ways to divide a unit along a name of its registered operator: for each name one, as the divided dimension of
    each divided tensor. What is made before, by nodes that are given from the last to the first, is divided as the unit
    uses it."""
    for first in _splits(bind(unit.main, block)):
        if first.name is None or first.name in operator_of(unit.main).along:
            continue
        known: dict[str, Placement] = {}
        for node in [*unit.nodes, *before]:
            ways = [first] if node is unit.main else _splits(bind(node, block))
            way = next((way for way in ways if _fits(node, way, known)), None)
            if way is None:
                break
            known.update(zip((*node.inputs, *node.outputs), (*way.inputs, *way.outputs)))
        else:
            yield {name: place.dim for name, place in known.items() if isinstance(place, Shard)}


def _fits(node: Node, way: Split, known: Mapping[str, Placement]) -> bool:
    """Whether a way to divide a node agrees with how its tensors are known to be divided."""
    places = zip((*node.inputs, *node.outputs), (*way.inputs, *way.outputs))
    return all(known.get(name, place) == place for name, place in places)


def _stretch(block: Block, units: list[Unit], members: list[int]) -> Stretch | None:
    """The stretch of some units. None where it cannot be computed in pieces, or needs what other pure units make."""
    inside = {name for index in members for name in units[index].outputs}
    elsewhere = {name for index, unit in enumerate(units) if index not in members for name in unit.inputs}
    inputs = dict.fromkeys(name for index in members for name in units[index].inputs if name not in inside)
    outputs = [name for index in members for name in units[index].outputs if name in elsewhere or name in block.outputs]
    pure_ones = {name for unit in units if pure(unit) for name in unit.outputs}
    if pure_ones & inputs.keys() or not all(block.tensors[name].requires_grad for name in outputs):
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
