"""The options of a unit: every way to lay its tensors on the mesh, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import product

from nnscaler.annotation import Bound, Split
from nnscaler.errors import UserError
from nnscaler.graph import Block, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.operators import bind, operator_of
from nnscaler.placement import Placement, Placements, Shard, local_shape
from nnscaler.plan import NodePlan
from nnscaler.planner.costs import NO_TIME, CostModel, Local, Seconds
from nnscaler.reshard import without_gradient
from nnscaler.units import Unit


@dataclass(frozen=True)
class Option:
    """One way to decide: the layouts of inputs and outputs, and their costs in one place and one micro-batch.

    inputs, outputs  a layout for each tensor of the unit, in order
    seconds          of forward and of backward. Of a parameter: of its update (as `forward`), and of exchanging its
                     gradient in each micro-batch, which runs beside backward (as `backward`)
    memory           bytes that are held all the time, by what they are
    transient        bytes that are held while it runs
    inner_bytes      bytes of inner tensors that backward keeps: those of a cluster that is not fused, of an operator
                     whose function communicates, and what operators keep beside their tensors
    ways             (node name, how it runs) of each node of the unit
    rounded          places of inputs of which backward keeps a copy in fp8, and not the input itself
    weights          place of an input that is the weight of a product in fp8 -> seconds of rounding it: where it has
                     been gathered in fp8, these are saved

    Of parameters only:

    exchanged_once    True: the gradient is exchanged once a step, in its last micro-batch. False: in each micro-batch.
    last_exchange     seconds of that one exchange, which runs beside the last micro-batch's backward
    exchange_buffers  bytes of the buffers for exchanging the gradient in each micro-batch
    master_only       only its master weight is stored, in fp32; it is cast when it is gathered, in which way alone it
                      can be used
    gradient_may_leave  whether its gradient may lie on the host between micro-batches
    """

    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    seconds: Seconds = NO_TIME
    memory: Mapping[str, float] = field(default_factory=dict)
    transient: float = 0.0
    inner_bytes: float = 0.0
    ways: tuple[tuple[str, NodePlan], ...] = ()
    rounded: frozenset[int] = frozenset()
    weights: Mapping[int, Seconds] = field(default_factory=dict)
    exchanged_once: bool = False
    last_exchange: float = 0.0
    exchange_buffers: float = 0.0
    master_only: bool = False
    gradient_may_leave: bool = False

    @property
    def held(self) -> float:
        """Bytes held all the time."""
        return sum(self.memory.values())


Assignment = tuple[Split, ...]  # for one mesh axis: how each node of the unit is split


class CannotBePinned(UserError):  # noqa: N818
    """A policy pins what no plan on a mesh can do."""


def unit_options(unit: Unit, block: Block, costs: CostModel) -> list[Option]:
    """All options of a unit. Of those that lead to the same layouts of inputs and outputs, the first is taken.

    Raises CannotBePinned where a policy leaves none.
    """
    bounds = [bind(node, block) for node in unit.nodes]
    splits = list(assignments(unit, block, bounds))
    whole = [assignment for assignment in splits if all(split.name is None for split in assignment)]
    allowed = [assignment for assignment in splits if _is_as_pinned(unit, assignment)]
    found: dict[object, Option] = {}
    for chosen in product(*(allowed if devices > 1 else whole for devices in costs.mesh.sizes)):
        option = _option(unit, block, bounds, chosen, costs)
        if option is not None:
            found.setdefault((option.inputs, option.outputs), option)
    if not found:
        raise _cannot_be_pinned(unit, bounds, costs.mesh)
    return list(found.values())


def _is_as_pinned(unit: Unit, assignment: Assignment) -> bool:
    return all(node.pinned is None or split.name in node.pinned for node, split in zip(unit.nodes, assignment))


def _cannot_be_pinned(unit: Unit, bounds: Sequence[Bound], mesh: Mesh) -> CannotBePinned:
    pins = [
        f"{node.op} '{node.name}' to {' or '.join(map(str, node.pinned))} (its sizes are {bound.sizes})"
        for node, bound in zip(unit.nodes, bounds)
        if node.pinned is not None
    ]
    return CannotBePinned(f"on {mesh} the policy cannot pin {', and '.join(pins)}")


def assignments(unit: Unit, block: Block, bounds: Sequence[Bound]) -> Iterator[Assignment]:
    """The ways to split all nodes of a unit on one axis such that no tensor inside it needs resharding."""
    # Not by recursion: a forward that loops makes units of more operators than Python has levels.
    order = _neighbours_first(unit)
    layouts: list[dict[str, Placement]] = [{}]  # before each node
    chosen: list[Split] = []
    untried = [iter(bounds[order[0]].splits(1))]  # of each node
    while untried:
        way = next(untried[-1], None)
        if way is None:
            untried.pop()
            layouts.pop()
            del chosen[-1:]
            continue
        node, known = unit.nodes[order[len(chosen)]], dict(layouts[-1])
        places = [(name, _seen(place, block.tensors[name])) for name, place in zip(node.inputs, way.inputs)]
        places += zip(node.outputs, way.outputs)
        if any(known.setdefault(name, place) != place for name, place in places):
            continue
        if len(chosen) + 1 == len(unit.nodes):
            yield tuple(split for _, split in sorted(zip(order, (*chosen, way)), key=lambda one: one[0]))
            continue
        chosen.append(way)
        layouts.append(known)
        untried.append(iter(bounds[order[len(chosen)]].splits(1)))


def _neighbours_first(unit: Unit) -> list[int]:
    """The unit's nodes by number, such that each has, if it can, a tensor of those before it, which leaves it few ways.

    Ways that contradict each other are so met early: not only at a node that joins the results of many.
    """
    users: dict[str, list[int]] = {}
    for number, node in enumerate(unit.nodes):
        for name in {*node.inputs, *node.outputs}:
            users.setdefault(name, []).append(number)
    order: dict[int, None] = {}
    near: list[int] = []
    for first in range(len(unit.nodes)):
        heappush(near, first)
        while near:
            number = heappop(near)
            if number in order:
                continue
            order[number] = None
            for name in (*unit.nodes[number].inputs, *unit.nodes[number].outputs):
                for user in users.pop(name, ()):
                    heappush(near, user)
    return list(order)


def _seen(place: Placement, meta: TensorMeta) -> Placement:
    return place if meta.requires_grad else without_gradient((place,))[0]


def _option(
    unit: Unit, block: Block, bounds: Sequence[Bound], chosen: tuple[Assignment, ...], costs: CostModel
) -> Option | None:
    """The option of one assignment for each mesh axis. None where a size does not divide by the devices."""
    layouts: dict[str, Placements] = {}
    ways: list[tuple[str, NodePlan]] = []
    locals_: list[Local] = []
    for index, (node, bound) in enumerate(zip(unit.nodes, bounds)):
        splits = [assignment[index] for assignment in chosen]
        sizes = local_sizes(bound, splits, costs.mesh)
        along = tuple(axis for axis, split in enumerate(splits) if split.name in operator_of(node).along)
        if sizes is None or len({splits[axis].name for axis in along}) > 1:  # no function knows of two names
            return None
        for side, names in (("inputs", node.inputs), ("outputs", node.outputs)):
            for i, name in enumerate(names):
                meta = block.tensors[name]
                layouts[name] = tuple(_seen(getattr(split, side)[i], meta) for split in splits)
                if not divides(meta.shape, layouts[name], costs.mesh):
                    return None
        inputs, outputs = ([layouts[name] for name in names] for names in (node.inputs, node.outputs))
        local = [costs.local_bytes(block.tensors[name], layouts[name]) for name in (*node.inputs, *node.outputs)]
        way = splits[along[0]] if along else None
        exchanged = [isinstance(place, Shard) for place in (*way.inputs, *way.outputs)] if way else []
        metas = [
            replace(block.tensors[name], shape=local_shape(block.tensors[name].shape, layouts[name], costs.mesh.sizes))
            for name in node.inputs
        ]
        group = costs.mesh.devices(*along)
        group_sizes = {name: size * group if way and name in way.names else size for name, size in sizes.items()}
        one = Local(node, sizes, metas, local, along, way.name if way else None, group_sizes, exchanged)
        locals_.append(costs.fastest(one, block))
        text, in_fp8 = ",".join(split.name or "-" for split in splits), locals_[-1].fp8 is not None
        ways.append((node.name, NodePlan(text, tuple(inputs), tuple(outputs), in_fp8)))
    seconds, transient, inner = costs.unit(unit, block, layouts, locals_)
    return Option(
        tuple(layouts[name] for name in unit.inputs),
        tuple(layouts[name] for name in unit.outputs),
        seconds,
        transient=transient,
        inner_bytes=inner,
        ways=tuple(ways),
        rounded=frozenset(unit.inputs.index(one.node.inputs[0]) for one in locals_ if one.fp8 is not None),
        weights={
            unit.inputs.index(one.node.inputs[1]): Seconds(*one.fp8.of_weight(costs.hardware))
            for one in locals_
            if one.fp8 is not None
        },
    )


def local_sizes(bound: Bound, splits: Sequence[Split], mesh: Mesh) -> dict[str, int] | None:
    """The size of each annotated name on one device. None where one does not divide by the devices."""
    sizes = dict(bound.sizes)
    for split, devices in zip(splits, mesh.sizes, strict=True):
        for name in split.names:
            if sizes[name] % devices:
                return None
            sizes[name] //= devices
    return sizes


def layouts_of(shape: Sequence[int], mesh: Mesh, whole: Placement) -> list[Placements]:
    """All ways to lay a tensor of this shape on the mesh.

    On each axis it is either `whole` (R or R*), or sharded along a dimension that divides. On an axis of one device it
    is whole.
    """
    per_axis = [[whole, *(Shard(dim) for dim in range(len(shape)) if devices > 1)] for devices in mesh.sizes]
    return [layout for layout in product(*per_axis) if divides(shape, layout, mesh)]


def divides(shape: Sequence[int], layout: Placements, mesh: Mesh) -> bool:
    """Whether every sharded dimension is a multiple of the number of devices that it is sharded over."""
    left = list(shape)
    for placement, size in zip(layout, mesh.sizes, strict=True):
        if isinstance(placement, Shard):
            if left[placement.dim] % size:
                return False
            left[placement.dim] //= size
    return True


def is_alias(unit: Unit) -> bool:
    """Whether a unit computes nothing: all its results are views."""
    return unit.kind == "cheap" and all(operator_of(node).alias for node in unit.nodes)
