"""The planning problem of a graph on a mesh: what is to be decided, and the tensors that flow between the decisions.

A `Decision` is one choice among options: how a unit is laid out, how a parameter is stored, or how an input or output
of a block lies. A `Flow` is a tensor on its way from the decision that makes it to those that use it. Where their
layouts differ, it is resharded, once for each layout that is needed. All calls of a block share the decisions inside
it; they may differ in their recompute level, and a plan says how many calls have which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import gcd

from nnscaler.chains import chains, handed_on
from nnscaler.graph import Block, Call, Graph, TensorMeta
from nnscaler.later import factors
from nnscaler.mesh import Mesh
from nnscaler.pieces import Stretch, stretches, with_registered
from nnscaler.placement import REPLICATE, SHARED, Placements, Shard, shards
from nnscaler.planner.bodies import Bodies, body_of
from nnscaler.planner.costs import CostModel, Seconds, in_fp32, master_bytes
from nnscaler.planner.options import CannotBePinned, Option, is_alias, layouts_of
from nnscaler.recompute import IN_GROUPS, KEEPS_ALL, ON_DEVICE, RECOMPUTES_ALL, SAME_ON_HOST, Level, recomputes
from nnscaler.sizes import PREFETCH_BYTES
from nnscaler.sums import IN_FP32
from nnscaler.units import Unit, is_elementwise, needed_by, pure, regions_of

Port = tuple[int, int]  # (index of a decision, which of its inputs or outputs)


@dataclass(frozen=True)
class Decision:
    """A choice among `options`, made once for all `count` places it stands for.

    kind           "unit", "parameter", "input" or "output"
    block, name    whose: a unit, parameter, input or output of this block
    count          how often it occurs in a micro-batch: once for each call of the block
    runs_again     level -> how often backward runs it again for each call, in the mean
    inner_kept_at  levels at which its inner tensors are kept

    Of units only:

    place        its place among the units of its block, in the order in which they run
    region       a number that it shares with the units that are compiled together with it; None: it is none of these
    fused        whether it is a cluster of cheap operators that runs as one kernel
    elementwise  of a fused one: whether it combines no elements of a tensor, such as those of a row
    reads        whether its backward reads any tensor
    later        of a product that `nnscaler.later.factors` knows: the place of what it multiplies among its inputs
    """

    kind: str  # unit, parameter, input, output
    block: str
    name: str
    options: tuple[Option, ...]
    count: int = 1
    runs_again: Mapping[Level, float] = field(default_factory=dict)
    inner_kept_at: frozenset[Level] = frozenset()
    place: int = -1
    region: int | None = None
    fused: bool = False
    elementwise: bool = False
    reads: bool = True
    later: int | None = None


@dataclass
class Flow:
    """A tensor that `producer` makes and `consumers` use, `count` times in a micro-batch.

    What backward needs of it depends on the level, and on the layouts that are chosen (see `Keeping`):

    as_made         levels that keep it in the layout in which it is made
    as_used         level -> consumers; it is kept in the layout in which each of them uses it
    as_resharded    level -> consumers; likewise, but only where it was resharded for them
    copied          level -> consumers that keep a copy in fp8 wherever the tensor is
    is_parameter    it is a parameter, which is kept anyway in the layout in which it is stored
    needed          backward of its block reads it, whether it is kept or computed again
    read_by         the places of the units of its block whose backward reads it, or makes it again for others
    freed_first     backward reads it before that of any call of a block begins, and not later
    used_last       it is a parameter that is used after the last call of any block
    reshards_again  level -> how often backward reshards it again for each call, in the mean
    """

    tensor: str
    block: str
    meta: TensorMeta
    producer: Port
    consumers: list[Port] = field(default_factory=list)
    count: int = 1
    as_made: set[Level] = field(default_factory=set)
    as_used: dict[Level, list[Port]] = field(default_factory=dict)
    as_resharded: dict[Level, list[Port]] = field(default_factory=dict)
    copied: dict[Level, list[Port]] = field(default_factory=dict)
    is_parameter: bool = False
    needed: bool = False
    read_by: frozenset[int] = frozenset()
    freed_first: bool = False
    used_last: bool = False
    reshards_again: Mapping[Level, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Divisible:
    """A stretch of units of a block that may be computed in pieces (see `nnscaler.pieces`).

    decisions         those of its units
    sizes             for each option of each decision, a number that the number of pieces must divide: the greatest
                      common divisor of the divided dimension's local sizes; 0 where nothing is divided
    dims, ends_block  those of the stretch;  whole: the greatest common divisor of whole sizes; 1: no piece is resharded
    within            the name of the stretch within it, which comes before its registered operator; None: it has none
    adds_up           inputs that are used whole, of which gradients are added up in their own type rather than in fp32
    """

    block: str
    name: str
    decisions: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    whole: int
    dims: Mapping[str, int]
    ends_block: bool
    within: str | None = None
    adds_up: frozenset[str] = frozenset()

    def allows(self, level: Level) -> bool:
        """Whether it may be in pieces at a level: which keeps nothing of it but its inputs."""
        return level.in_pieces and (self.within is None or level.of_each.call is not None)


@dataclass(frozen=True)
class Stack:
    """Calls of a block of which each takes what the one before it makes: levels may take groups of them.

    lengths  how many calls there are in each of the block's chains (see `nnscaler.chains`)
    taken    the decision on how that lies which a call takes from the one before it
    given    the decision on how that lies which it makes
    """

    block: str
    lengths: tuple[int, ...]
    taken: int
    given: int


@dataclass
class Problem:
    """Everything that the mixed-integer program is made from.

    root              the block that calls the others
    calls             block -> how often it runs in a micro-batch
    levels            block -> the recompute levels that its calls may have
    parameter_of      (block, tensor) -> index of the decision about the parameter
    divisible         stretches of units that may be computed in pieces
    stacks            blocks of which groups of calls may be computed again together
    micro_batches     how many a step has
    exchange_buffers  most bytes that the buffers for exchanging gradients take: none for those that are exchanged once
                      a step in fp32, as they lie
    gathered_early    bytes of weights that are gathered before they are needed, if any are gathered
    in_flight         micro-batches whose activations are held at a time: 1, or more in a stage of a pipeline
    waiting           of a stage whose backward runs in two parts: see `nnscaler.schedules.waiting`
    host              bytes of the host's memory that the plan may use for each device; 0: none
    optimizer_state   bytes a device of master weights and moments
    staging           where some of these lie on the host: bytes on the device for those that are being updated
    gradients, slots  likewise of gradients: bytes a device where each rank keeps what it owns; where some lie on the
                      host, bytes on the device for those that backward adds to
    resharding        (tensor, whether it is a parameter, in fp8, from, to) -> seconds, None: impossible; a cache
    """

    costs: CostModel
    root: str
    decisions: list[Decision] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    levels: dict[str, tuple[Level, ...]] = field(default_factory=dict)
    parameter_of: dict[tuple[str, str], int] = field(default_factory=dict)
    divisible: list[Divisible] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    micro_batches: int = 1
    exchange_buffers: float = 0.0
    gathered_early: float = 0.0
    in_flight: int = 1
    waiting: Sequence[tuple[int, int]] = ()
    host: float = 0.0
    optimizer_state: float = 0.0
    staging: float = 0.0
    gradients: float = 0.0
    slots: float = 0.0
    resharding: dict[tuple[TensorMeta, bool, bool, Placements, Placements], Seconds | None] = field(
        default_factory=dict
    )

    def has_calls(self, block: str) -> bool:
        """Whether other blocks are called from this one."""
        return block == self.root and len(self.levels) > 1


@dataclass(frozen=True)
class Recomputing:
    """What the user wants recomputed.

    free   True: the user said nothing, and the planner chooses a level for each call
    nodes  else: block -> the names of its nodes that backward computes again, and no others
    """

    free: bool = True
    nodes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def levels(self, block: Block) -> tuple[Level, ...]:
        """The levels that calls of a block may have."""
        if self.free:
            return ON_DEVICE
        named = self.nodes.get(block.name, frozenset())
        if not named:
            return (KEEPS_ALL,)
        return (RECOMPUTES_ALL,) if len(named) == len(block.nodes) else (recomputes(named),)


def build_problem(
    graph: Graph,
    costs: CostModel,
    recomputing: Recomputing,
    micro_batches: int,
    layouts: Mapping[str, Placements] | None = None,
    in_flight: int = 1,
    host: float = 0.0,
    sparing: bool = True,
    groups: bool = True,
    known: Bodies | None = None,
) -> Problem:
    """States the planning problem of a graph.

    micro_batches  how many a step has; the time of the optimizer's update is spread over them
    layouts        name of a parameter, or of an input or output of the graph -> its layout, where that is given. Other
                   stages of a pipeline have such a parameter too, and add to its gradient
    in_flight      micro-batches whose activations are held at a time
    host           bytes of the host's memory that the plan may use for each device; 0: none
    sparing        whether what saves memory at a price may be done: stretches of units computed in pieces, and weights
                   stored as their master weights alone
    groups         whether groups of calls may be computed again together, and pieces resharded
    known          what is known of blocks: see `body_of`
    """
    trained = [meta for meta in graph.parameters.values() if meta.requires_grad]
    elements = sum(meta.numel for meta in trained)
    buffers = costs.exchange_buffers(elements)
    problem = Problem(
        costs, graph.root.name, micro_batches=micro_batches, exchange_buffers=buffers, in_flight=in_flight, host=host
    )
    problem.optimizer_state, problem.staging = costs.state_memory(trained), costs.staging_memory(elements)
    if trained:
        problem.gradients = costs.gradient_memory(trained, micro_batches)
        problem.slots = costs.slots_memory(trained, micro_batches)
    problem.gathered_early = min(PREFETCH_BYTES, sum(meta.nbytes for meta in trained))
    builder = _Builder(
        graph, problem, recomputing, layouts or {}, sparing, groups and recomputing.free, {} if known is None else known
    )
    builder.decide_parameters()
    for block in [*graph.blocks.values(), graph.root]:
        body = _Body(builder, block)
        body.build()
        if sparing:
            body.divide_stretches()
    return builder.problem


@dataclass
class _Builder:
    """What the bodies of all blocks share."""

    graph: Graph
    problem: Problem
    recomputing: Recomputing
    layouts: Mapping[str, Placements]
    sparing: bool
    groups: bool
    known: Bodies
    interface: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (block, side, index) -> decision

    @property
    def mesh(self) -> Mesh:
        return self.problem.costs.mesh

    def decide(self, decision: Decision) -> int:
        self.problem.decisions.append(decision)
        return len(self.problem.decisions) - 1

    def decide_parameters(self) -> None:
        """One decision for each set of parameters that must be stored alike: the same tensor of all calls of a block,
        and whatever is tied to it."""
        groups: list[tuple[set[str], set[tuple[str, str]]]] = []
        for block, tensor, path in self.graph.parameter_uses():
            paths, uses = {path}, {(block.name, tensor)}
            for group in [group for group in groups if group[0] & paths or group[1] & uses]:
                groups.remove(group)
                paths |= group[0]
                uses |= group[1]
            groups.append((paths, uses))
        for paths, uses in groups:
            meta = self.graph.parameters[min(paths)]
            given = [self.layouts[path] for path in paths if path in self.layouts]
            stored = given or self._stored(meta, paths)
            shared = bool(given)
            options = tuple(option for layout in stored for option in self._parameter_options(meta, layout, shared))
            index = self.decide(Decision("parameter", *min(uses), options, len(paths)))
            self.problem.parameter_of.update(dict.fromkeys(uses, index))

    def _stored(self, meta: TensorMeta, paths: set[str]) -> list[Placements]:
        """The layouts in which a tensor of the model may be stored: buffers, which are small, only whole."""
        if paths & self.graph.buffers.keys():
            return [(REPLICATE,) * len(self.mesh.sizes)]
        found = layouts_of(meta.shape, self.mesh, SHARED if meta.requires_grad else REPLICATE)
        for path in sorted(paths & self.graph.stored.keys()):
            dims = self.graph.stored[path]
            found = [layout for layout in found if self._is_stored_along(layout, dims)]
            if not found:
                along = " or ".join(map(str, dims))
                raise CannotBePinned(
                    f"on {self.mesh} the policy cannot store '{path}' {list(meta.shape)} along {along}"
                )
        return found

    def _is_stored_along(self, layout: Placements, dims: Sequence[int | None]) -> bool:
        places = [place for place, devices in zip(layout, self.mesh.sizes) if devices > 1]
        return all((place.dim if isinstance(place, Shard) else None) in dims for place in places)

    def _parameter_options(self, meta: TensorMeta, layout: Placements, shared: bool) -> Iterator[Option]:
        """The ways to train a parameter that is stored so: exchange its gradient in each micro-batch, or once a step;
        and store its master weight alone, where a rank owns all of its shard.

        shared  whether other stages of a pipeline have it too
        """
        costs, micro_batches = self.problem.costs, self.problem.micro_batches
        if not meta.requires_grad:
            yield Option((), (layout,), memory=costs.parameter_memory(meta, layout, micro_batches))
            return
        alone, exchange = costs.owners(layout) == 1, costs.gradient_exchange(meta, layout)
        gathered = alone and any(isinstance(place, Shard) for place in layout)
        may_be_only = self.sparing and gathered and master_bytes(meta) > 0
        for once, master_only in product(sorted({alone, alone or micro_batches > 1}), sorted({False, may_be_only})):
            update = costs.update(meta, layout, micro_batches, once, master_only)
            yield Option(
                (),
                (layout,),
                Seconds(update, 0.0 if once else exchange),
                costs.parameter_memory(in_fp32(meta) if master_only else meta, layout, micro_batches, once),
                last_exchange=exchange if once else 0.0,
                exchange_buffers=0.0 if once and costs.sums == IN_FP32 else costs.exchange_buffer(meta, layout),
                exchanged_once=once and not alone,
                master_only=master_only,
                gradient_may_leave=not shared and (alone or not once),
            )


class _Body:
    """Builds the decisions and flows inside one block."""

    def __init__(self, builder: _Builder, block: Block) -> None:
        self.builder, self.block = builder, block
        self.problem = builder.problem
        self.is_root = block is builder.graph.root
        self.count = builder.graph.count(block)
        body = body_of(block, builder.problem.costs, builder.known)
        self.units, self.options, self.regions = body.units, body.options, regions_of(body.units)
        self.chains = [chain for chain in chains(builder.graph) if chain[0].block == block.name and len(chain) > 1]
        self.levels = (KEEPS_ALL,) if self.is_root else builder.recomputing.levels(block)
        if builder.groups and len({handed_on(chain) for chain in self.chains}) == 1:
            longest = max(map(len, self.chains))
            self.levels += tuple(level for level in IN_GROUPS if level.size <= longest)
        if self.problem.host and not self.is_root:
            self.levels += tuple(SAME_ON_HOST[level] for level in self.levels if level in SAME_ON_HOST)
        self.kept_at = {level: body.keeps(level) for level in self.levels}
        self.problem.calls[block.name], self.problem.levels[block.name] = self.count, self.levels
        everything = body.keeps(KEEPS_ALL)
        uses = everything.as_used | everything.as_resharded
        self.needed = everything.as_made | {name for _, name in uses}
        read = [(place, name) for place, unit in enumerate(self.units) for name in needed_by(unit, block)]
        self.read_by: dict[str, set[int]] = {}
        for place, name in [*read, *uses]:
            self.read_by.setdefault(name, set()).add(place)
        self.last_call = max((place for place, unit in enumerate(self.units) if unit.kind == "call"), default=-1)
        self.flows: dict[str, Flow] = {}
        self.nodes = {node.name: node for node in block.nodes}
        self.decisions: dict[int, int] = {}  # index of a unit -> its decision

    def build(self) -> None:
        for index, tensor in enumerate(self.block.inputs):
            self._open(tensor, (self._boundary("input", index, tensor), 0)).count = self._distinct_arguments(index)
        for tensor in self.block.parameters:
            self._open(tensor, (self.problem.parameter_of[self.block.name, tensor], 0)).is_parameter = True
        for index, unit in enumerate(self.units):
            if unit.kind == "call":
                self._call(unit)
            else:
                self._unit(index, unit)
        for index, tensor in enumerate(self.block.outputs):
            self.flows[tensor].consumers.append((self._boundary("output", index, tensor), 0))
        self._stack()
        self._close()

    def _stack(self) -> None:
        if any(level.size > 1 for level in self.levels):
            interface, name = self.builder.interface, self.block.name
            taken, given = interface[name, "input", handed_on(self.chains[0])], interface[name, "output", 0]
            self.problem.stacks.append(Stack(name, tuple(map(len, self.chains)), taken, given))

    def divide_stretches(self) -> None:
        if len(self.levels) > 1 and any(level.in_pieces for level in self.levels):
            found = stretches(self.block)
            self.problem.divisible += map(self._divisible, [*found, *with_registered(self.block, found)])

    def _divisible(self, stretch: Stretch) -> Divisible:
        decisions = tuple(self.decisions[index] for index in stretch.units)
        sizes = tuple(tuple(self._divided_by(stretch, o) for o in self.problem.decisions[d].options) for d in decisions)
        within = stretch.within.name if stretch.within else None
        adds_up = frozenset(name for name in stretch.inputs if stretch.adds_up(name, self.block))
        whole = gcd(*(self.block.tensors[t].shape[d] for t, d in stretch.dims.items())) if self.builder.groups else 1
        return Divisible(
            self.block.name, stretch.name, decisions, sizes, whole, stretch.dims, stretch.ends_block, within, adds_up
        )

    def _divided_by(self, stretch: Stretch, option: Option) -> int:
        """The greatest number that divides the local size of every tensor of a unit along its divided dimension."""
        sizes = []
        for name, way in option.ways:
            node = self.nodes[name]
            for tensor, layout in zip((*node.inputs, *node.outputs), (*way.inputs, *way.outputs)):
                if (dim := stretch.dims.get(tensor)) is not None:
                    sizes.append(self.block.tensors[tensor].shape[dim] // shards(layout, dim, self.builder.mesh.sizes))
        return gcd(*sizes)

    def _open(self, tensor: str, producer: Port) -> Flow:
        flow = Flow(tensor, self.block.name, self.block.tensors[tensor], producer, count=self.count)
        flow.as_made = {level for level, kept in self.kept_at.items() if tensor in kept.as_made}
        flow.reshards_again = {level: kept.reshards_so_often for level, kept in self.kept_at.items()}
        flow.needed = tensor in self.needed and tensor not in self.block.parameters
        flow.read_by = frozenset(self.read_by.get(tensor, ()))
        self.flows[tensor] = flow
        return flow

    def _boundary(self, side: str, index: int, tensor: str) -> int:
        """Makes the decision on how one input or output of the block lies, for its callers and its body alike."""
        mesh, shape = self.builder.mesh, self.block.tensors[tensor].shape
        whole = (REPLICATE,) * len(mesh.sizes)
        choices = [self.builder.layouts.get(tensor, whole)] if self.is_root else layouts_of(shape, mesh, REPLICATE)
        options = tuple(Option((layout,), (layout,)) for layout in choices)
        decision = self.builder.decide(Decision(side, self.block.name, tensor, options))
        self.builder.interface[self.block.name, side, index] = decision
        return decision

    def _distinct_arguments(self, index: int) -> int:
        """How many different tensors the calls of this block pass as one of its inputs."""
        return 1 if self.is_root else len({call.inputs[index] for call in self.builder.graph.calls(self.block.name)})

    def _call(self, unit: Unit) -> None:
        call = unit.main
        assert isinstance(call, Call)
        for index, tensor in enumerate(call.inputs):
            self.flows[tensor].consumers.append((self.builder.interface[call.block, "input", index], 0))
        for index, tensor in enumerate(call.outputs):
            flow = self._open(tensor, (self.builder.interface[call.block, "output", index], 0))
            flow.freed_first = flow.needed and self.units[self.last_call] is unit

    def _unit(self, index: int, unit: Unit) -> None:
        options, fused = self.options[index], self.problem.costs.fused
        runs_again = {level: kept.runs_again(index) for level, kept in self.kept_at.items()}
        inner_kept_at = frozenset(
            level
            for level, kept in self.kept_at.items()
            if not runs_again[level] and (kept.keeps_inner or fused or unit.kind == "registered")
        )
        cheap = fused and unit.kind == "cheap"
        found = factors(unit.main, self.block)
        decision = self.decisions[index] = self.builder.decide(Decision(
            "unit", self.block.name, unit.name, options, 0 if is_alias(unit) else self.count, runs_again, inner_kept_at,
            place=index, region=self.regions[index] if pure(unit) else None,
            fused=cheap, elementwise=cheap and is_elementwise(unit, self.block),
            reads=bool(needed_by(unit, self.block)), later=unit.inputs.index(found[0]) if found else None,
        ))  # fmt: skip
        for position, tensor in enumerate(unit.inputs):
            flow, use = self.flows[tensor], (decision, position)
            flow.consumers.append(use)
            flow.used_last |= flow.is_parameter and 0 <= self.last_call < index
            for level, kept in self.kept_at.items():
                for how in ("as_used", "as_resharded", "copied"):
                    if (index, tensor) in getattr(kept, how):
                        getattr(flow, how).setdefault(level, []).append(use)
        for position, tensor in enumerate(unit.outputs):
            flow = self._open(tensor, (decision, position))
            flow.freed_first = flow.needed and 0 <= self.last_call < index

    def _close(self) -> None:
        """Adds the flows to the problem. Equal ones, as between repeated blocks, become one with a higher count."""
        merged: dict[object, Flow] = {}
        for flow in self.flows.values():
            flow.consumers = list(dict.fromkeys(flow.consumers))
            if flow.consumers:
                same = merged.setdefault((flow.producer, tuple(flow.consumers)), flow)
                if same is not flow:
                    same.count += flow.count
        self.problem.flows.extend(merged.values())
