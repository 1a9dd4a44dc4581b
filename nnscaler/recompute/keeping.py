"""What is kept of a call of a block for backward, and what backward must then compute again.

A recompute level (see `nnscaler.recompute.levels`) chooses by one of these functions:

keep_all    everything that some operator's backward reads. Nothing is computed again.
keep_cut    everything that the backward of units of some kinds reads; for the rest, the least bytes from which cheap
            operators can compute it again. A fusing compiler such as `torch.compile` chooses in the same way.
keep_from   the block's inputs; what the backward of units of some kinds reads; and, where there are such units, what
            collectives bring to a unit, and what goes from one region between them to another. The rest is computed
            again.
part_again  what another function keeps, except that some units are computed again from their inputs
keep_group  of several calls, one after the other, the inputs of the first
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from nnscaler.graph import Block
from nnscaler.units import Unit, needed_by, pure, regions_of

Use = tuple[int, str]  # (index of a unit, name of a tensor that it uses)


@dataclass(frozen=True)
class Keeping:
    """What is kept of a call of a block, and what is computed again. It does not depend on how tensors are laid out.

    A tensor may lie in several layouts: the one in which it is made, and one for each unit that needs it in another
    layout. So this says not only which tensors are kept, but also in which layout:

    as_made         tensors that are kept in the layout in which they are made
    as_used         (unit, tensor): the tensor is kept in the layout in which this unit uses it
    as_resharded    (unit, tensor): likewise, but only where the tensor had to be resharded for this unit
    copied          (unit, tensor), of `as_used`: a product in fp8 that keeps its copy wherever the tensor itself is;
                    another makes its copy again from the tensor, but where that had to be resharded
    recomputed      indices of the units that backward computes again
    reshards_again  whether backward also reshards tensors again
    keeps_inner     whether clusters of cheap operators that are not fused keep their inner tensors
    with_group      index of a unit -> in which part of the calls backward runs it once more, because a group of calls
                    is computed again as a whole; empty where there are no groups

    Example: unit 0 is `h = a * b`, unit 1 is `y = linear(h, w)`. To keep all is `as_used={(0, "a"), (0, "b"), (1, "h"),
    (1, "w")}`. To recompute all is `as_made={"a", "b"}` and `recomputed={0}`: nobody's backward reads `y`.
    """

    as_made: frozenset[str] = frozenset()
    as_used: frozenset[Use] = frozenset()
    as_resharded: frozenset[Use] = frozenset()
    copied: frozenset[Use] = frozenset()
    recomputed: frozenset[int] = frozenset()
    reshards_again: bool = False
    keeps_inner: bool = False
    with_group: Mapping[int, float] = field(default_factory=dict)

    def runs_again(self, unit: int) -> float:
        """How often backward runs the unit of this index again: for each call, in the mean."""
        return (unit in self.recomputed) + self.with_group.get(unit, 0.0)

    @property
    def reshards_so_often(self) -> float:
        """How often backward reshards tensors again: for each call, in the mean, and at most."""
        return self.reshards_again + max(self.with_group.values(), default=0.0)


def part_again(parts: Iterable[int], units: list[Unit], base: Keeping) -> Keeping:
    """What `base` keeps, except that the units with indices `parts` are computed again from their inputs."""
    again = set(parts)
    made_inside = {name for index in again for name in units[index].outputs}
    inputs = {name for index in again for name in units[index].inputs} - made_inside
    return replace(
        base,
        as_made=frozenset((base.as_made - made_inside) | inputs),
        as_used=frozenset(use for use in base.as_used if use[0] not in again),
        as_resharded=frozenset(use for use in base.as_resharded if use[0] not in again),
        recomputed=base.recomputed | again,
    )


def _needed(units: list[Unit], block: Block) -> list[tuple[int, str, bool]]:
    """(index of a unit, tensor, whether it is the unit's input) of every tensor that some unit's backward reads."""
    return [(index, name, name in unit.inputs) for index, unit in enumerate(units) for name in needed_by(unit, block)]


def keep_all(units: list[Unit], block: Block) -> Keeping:
    """Everything that some operator's backward reads."""
    needed = _needed(units, block)
    return Keeping(
        as_made=frozenset(name for _, name, is_input in needed if not is_input),
        as_used=frozenset((index, name) for index, name, is_input in needed if is_input),
        copied=frozenset((index, name) for index, name, is_input in needed if is_input and units[index].rounds),
        keeps_inner=True,
    )


def keep_cut(units: list[Unit], block: Block, as_used: Collection[str]) -> Keeping:
    """What backward reads, kept in the fewest bytes: a minimum cut.

    as_used  kinds of units (see `nnscaler.units.Unit`) whose inputs are kept rather than computed again

    The cut is in a network from "exists" (results of units that are not cheap) to "needed" (what backward reads), along
    cheap operators. What it cuts is kept; what lies behind it is computed again. There is a network for each region,
    which is compiled by itself: there, what other regions give exists. A copy in fp8 is made of its tensor as by a
    cheap operator, and has a byte for each element. A region does not know what others keep: beside what it is given,
    and others keep, it keeps the copy.
    """
    needed = _needed(units, block)
    used = {(index, name) for index, name, is_input in needed if is_input and units[index].kind in as_used}
    rounded = {use for use in used if units[use[0]].rounds}
    kept_anyway = {name for _, name in used - rounded}
    regions = regions_of(units)
    kept: set[str] = set()
    copied: set[Use] = set()
    again: set[int] = set()
    uses: set[Use] = set()
    for region in sorted(set(regions), reverse=True):
        wanted = {name for index, name, _ in needed if regions[index] == region and (index, name) not in used}
        rounding = {(index, name) for index, name in rounded if regions[index] == region}
        inside = [unit for unit, where in zip(units, regions) if where == region]
        # What a later region has been given is made again in this one, where products are kept rather than that.
        given = kept if "product" not in as_used else set()
        own_anyway = {name for index, name in used - rounded if regions[index] == region}
        made = {name for unit in inside if pure(unit) for name in unit.outputs}
        beside = {name for _, name in rounding if name in kept_anyway - own_anyway - made}
        copies = {name for _, name in rounding} - beside
        cut, smaller = _least_bytes(wanted, copies, inside, block, kept_anyway, given)
        copied |= {(index, name) for index, name in rounding if name in smaller | beside}
        own, taken = _computed_again((wanted | copies) - smaller, cut, units)
        kept |= cut - set(block.parameters) - kept_anyway
        again |= own
        uses |= taken
    # What reads its own result keeps it as it is made, also where another unit keeps it resharded.
    kept |= {name for index, name, is_input in needed if not is_input and units[index].kind in as_used}
    resharded = {(index, name) for index, name, is_input in needed if is_input} | uses
    return Keeping(frozenset(kept), frozenset(used), frozenset(resharded - used), frozenset(copied), frozenset(again))


def _least_bytes(
    wanted: set[str], copies: set[str], units: list[Unit], block: Block, kept_anyway: set[str], made_again: set[str]
) -> tuple[set[str], set[str]]:
    """The tensors, and the copies in fp8, of least bytes from which cheap ones of some units can make what is wanted
    again.

    copies      tensors of which a copy in fp8 is wanted
    made_again  what these units make that is not to be among them
    """
    if not wanted | copies:
        return set(), set()
    cheap = {
        name: node
        for unit in units
        if unit.kind == "cheap"
        for node in unit.nodes
        for name in node.outputs
        if name not in kept_anyway
    }
    inner = cheap.keys() - {name for unit in units for name in unit.outputs}
    import networkx  # what runs generated code needs levels, but not this

    network = networkx.DiGraph()
    for name, meta in block.tensors.items():
        if name in inner or (name in cheap and name in made_again):  # an edge without capacity has no limit
            network.add_edge((name, "in"), (name, "out"))
        else:
            free = name in block.parameters or name in kept_anyway
            network.add_edge((name, "in"), (name, "out"), capacity=0 if free else meta.nbytes)
        if name not in cheap:
            network.add_edge("exists", (name, "in"))
        for source in cheap[name].inputs if name in cheap else ():
            network.add_edge((source, "out"), (name, "in"))
    for name in wanted:
        network.add_edge((name, "out"), "needed")
    for name in copies:
        network.add_edge((name, "out"), (name, "in fp8"))
        network.add_edge((name, "in fp8"), "needed", capacity=block.tensors[name].numel)
    # Of equal cuts networkx gives the one nearest to what is needed: a sum, say, after its collective.
    _, (reached, _) = networkx.minimum_cut(network, "exists", "needed")
    cut = {name for name in block.tensors if (name, "in") in reached and (name, "out") not in reached}
    return cut, {name for name in copies if (name, "in fp8") in reached}


def _computed_again(wanted: set[str], kept: set[str], units: list[Unit]) -> tuple[set[int], set[Use]]:
    """Units of which some node runs again, to give `wanted` from `kept` and what no unit makes; and what these use from
    outside themselves."""
    made_by = {name: (index, node) for index, unit in enumerate(units) for node in unit.nodes for name in node.outputs}
    recomputed: set[int] = set()
    uses: set[Use] = set()
    seen = set(kept)
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name in seen or name not in made_by:
            continue
        seen.add(name)
        index, node = made_by[name]
        recomputed.add(index)
        uses.update((index, source) for source in node.inputs if source in units[index].inputs)
        stack += node.inputs
    return recomputed, uses


def keep_from(units: list[Unit], block: Block, as_used: Collection[str]) -> Keeping:
    """The block's inputs, and what the backward of units of the kinds `as_used` reads.

    Where there are such units, regions between them are computed again one by one: what another region or a collective
    gives to one is kept too. Otherwise backward communicates again.
    """
    needed = _needed(units, block)
    inputs = set(block.inputs)
    if not as_used:
        recomputed, _ = _computed_again({name for _, name, _ in needed}, set(), units)
        return Keeping(as_made=frozenset(inputs), recomputed=frozenset(recomputed), reshards_again=True)
    made = {name for unit in units if unit.kind in as_used for name in unit.outputs}
    used = {(index, name) for index, name, is_input in needed if is_input and units[index].kind in as_used}
    kept = inputs | made
    regions = regions_of(units)
    made_in = {name: regions[index] for index, unit in enumerate(units) if pure(unit) for name in unit.outputs}
    again: set[int] = set()
    uses: set[Use] = set()
    needs: set[str] = set()  # of what is there anyway, and what other regions give
    for region in set(regions):
        given = kept | {name for name, where in made_in.items() if where != region}
        wanted = {name for index, name, _ in needed if regions[index] == region and (index, name) not in used}
        own, taken = _computed_again(wanted, given, units)
        again |= own
        uses |= taken
        needs |= given & (wanted | {name for _, name in taken})
    resharded = {(index, name) for index, name, is_input in needed if is_input} | uses
    return Keeping(frozenset(needs), frozenset(used), frozenset(resharded - used), recomputed=frozenset(again))


def keep_group(units: list[Unit], block: Block, size: int, inner: Keeping) -> Keeping:
    """What a group of calls keeps, each of which takes what the one before it makes.

    size   calls of a group
    inner  what is kept of each of them, as soon as backward has computed the group again

    Backward computes all calls of a group again; of the last of them, only what leads to what `inner` keeps. Inputs are
    those of the first call: of what is handed on from call to call, a call keeps a part of 1 / size.
    """
    wanted = set(inner.as_made).union(name for _, name in inner.as_used)
    last, _ = _computed_again(wanted, set(), units)
    parts = {index: (size - 1 + (index in last)) / size for index, unit in enumerate(units) if unit.kind != "call"}
    return Keeping(
        as_made=frozenset(block.inputs),
        recomputed=inner.recomputed,
        reshards_again=inner.reshards_again,
        with_group=parts,
    )
