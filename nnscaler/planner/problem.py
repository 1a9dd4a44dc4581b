"""The planning problem of a graph on a mesh: decisions, and the tensors that flow between them.

A `Decision` is one choice among options: how a node is split, how a parameter is stored, how a block's input or output
lies. A `Flow` is a tensor on its way from the decision that makes it to those that use it; where the layouts differ it
is resharded, once for each layout that is needed. Decisions inside a block are shared by all its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from nnscaler.annotation import Bound
from nnscaler.graph import Block, Call, Graph, Node, TensorMeta
from nnscaler.mesh import Mesh
from nnscaler.operators import bind, operator_of
from nnscaler.placement import REPLICATE, SHARED, Placement, Placements, Shard
from nnscaler.planner.costs import NO_TIME, CostModel, Seconds
from nnscaler.reshard import without_gradient

Use = tuple[int, int]  # (decision, index of its input)


@dataclass(frozen=True)
class Option:
    """One way to decide: layouts of inputs and outputs, and what it costs a micro-batch, once."""

    label: str
    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    seconds: Seconds = NO_TIME
    memory: float = 0.0  # bytes held all the time
    transient: float = 0.0  # bytes held while it runs


@dataclass(frozen=True)
class Decision:
    """A choice among `options`, made once for all `count` places it stands for."""

    kind: str  # node, parameter, input, output
    block: str
    name: str
    options: tuple[Option, ...]
    count: int = 1
    recomputed: bool = False


@dataclass
class Flow:
    """A tensor from `producer` (decision, output index) to its `consumers`, `count` times in a micro-batch.

    saved       the layout in which it is produced is kept for backward
    saved_by    consumers that keep the layout they use for backward
    again_by    consumers that keep it too, but only while their part is recomputed
    recomputed  some consumer's part is recomputed: resharding there happens twice
    view_of     index of the flow that this one is a view of, whose storage it shares
    held        a parameter: kept anyway in the layout in which it is stored
    """

    tensor: str
    block: str
    meta: TensorMeta
    producer: Use
    consumers: list[Use] = field(default_factory=list)
    count: int = 1
    saved: bool = False
    saved_by: list[Use] = field(default_factory=list)
    again_by: list[Use] = field(default_factory=list)
    recomputed: bool = False
    view_of: int | None = None
    held: bool = False


@dataclass
class Problem:
    """Everything the mixed-integer program is made from."""

    costs: CostModel
    decisions: list[Decision] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    parameter_of: dict[tuple[str, str], int] = field(default_factory=dict)  # (block, tensor) -> decision


def build_problem(graph: Graph, costs: CostModel, recomputed: dict[str, set[str]], micro_batches: int) -> Problem:
    """States the problem of a graph.

    recomputed     block name -> names of its nodes that are recomputed in backward
    micro_batches  micro-batches an optimizer step, over which the optimizer's time is spread
    """
    builder = _Builder(graph, Problem(costs), recomputed)
    builder.decide_parameters(micro_batches)
    for block in [*graph.blocks.values(), graph.root]:
        _Body(builder, block).build()
    return builder.problem


@dataclass
class _Builder:
    """What the bodies of all blocks share."""

    graph: Graph
    problem: Problem
    recomputed: dict[str, set[str]]
    interface: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (block, side, index) -> decision

    @property
    def mesh(self) -> Mesh:
        return self.problem.costs.mesh

    def decide(self, decision: Decision) -> int:
        self.problem.decisions.append(decision)
        return len(self.problem.decisions) - 1

    def decide_parameters(self, micro_batches: int) -> None:
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
            options = tuple(self._parameter_option(meta, layout, micro_batches) for layout in self._stored(meta))
            index = self.decide(Decision("parameter", *min(uses), options, len(paths)))
            self.problem.parameter_of.update(dict.fromkeys(uses, index))

    def _stored(self, meta: TensorMeta) -> list[Placements]:
        if not meta.requires_grad:
            return [(REPLICATE,) * len(self.mesh.sizes)]
        return layouts(meta.shape, self.mesh, SHARED)

    def _parameter_option(self, meta: TensorMeta, layout: Placements, micro_batches: int) -> Option:
        costs = self.problem.costs
        seconds = costs.optimizer(meta, layout, micro_batches) if meta.requires_grad else 0.0
        return Option("", (), (layout,), Seconds(0.0, seconds), costs.parameter_memory(meta, layout))


class _Body:
    """Builds the decisions and flows inside one block."""

    def __init__(self, builder: _Builder, block: Block) -> None:
        self.builder, self.block = builder, block
        self.is_root = block is builder.graph.root
        self.count = builder.graph.count(block)
        self.again = builder.recomputed.get(block.name, set())
        self.flows: dict[str, Flow] = {}

    def build(self) -> None:
        for index, tensor in enumerate(self.block.inputs):
            self._open(tensor, (self._boundary("input", index, tensor), 0)).count = self._distinct_arguments(index)
        for tensor in self.block.parameters:
            self._open(tensor, (self.builder.problem.parameter_of[self.block.name, tensor], 0)).held = True
        for node in self.block.nodes:
            if isinstance(node, Call):
                self._call(node)
            else:
                self._node(node)
        for index, tensor in enumerate(self.block.outputs):
            self.flows[tensor].consumers.append((self._boundary("output", index, tensor), 0))
        self._close()

    def _open(self, tensor: str, producer: Use) -> Flow:
        self.flows[tensor] = Flow(tensor, self.block.name, self.block.tensors[tensor], producer, count=self.count)
        return self.flows[tensor]

    def _boundary(self, side: str, index: int, tensor: str) -> int:
        """The decision how the block's callers and its body agree to lay one of its inputs or outputs."""
        mesh = self.builder.mesh
        shape = self.block.tensors[tensor].shape
        choices = [(REPLICATE,) * len(mesh.sizes)] if self.is_root else layouts(shape, mesh, REPLICATE)
        options = tuple(Option("", (layout,), (layout,)) for layout in choices)
        decision = self.builder.decide(Decision(side, self.block.name, tensor, options))
        self.builder.interface[self.block.name, side, index] = decision
        return decision

    def _distinct_arguments(self, index: int) -> int:
        """How many different tensors the calls of this block pass as one of its inputs."""
        return 1 if self.is_root else len({call.inputs[index] for call in self.builder.graph.calls(self.block.name)})

    def _call(self, node: Call) -> None:
        for index, tensor in enumerate(node.inputs):
            self.flows[tensor].consumers.append((self.builder.interface[node.block, "input", index], 0))
        for index, tensor in enumerate(node.outputs):
            self._open(tensor, (self.builder.interface[node.block, "output", index], 0))

    def _node(self, node: Node) -> None:
        operator = operator_of(node)
        options = node_options(node, self.block, bind(node, self.block), self.builder.problem.costs)
        recomputed = node.name in self.again
        decision = Decision("node", self.block.name, node.name, tuple(options), self.count, recomputed)
        index_of_decision = self.builder.decide(decision)
        inputs, outputs = ([self.block.tensors[name] for name in names] for names in (node.inputs, node.outputs))
        kept = operator.saves(node, inputs, outputs) if any(meta.requires_grad for meta in outputs) else []
        for index, tensor in enumerate(node.inputs):
            flow, use = self.flows[tensor], (index_of_decision, index)
            flow.consumers.append(use)
            flow.recomputed |= recomputed
            if tensor in kept:
                (flow.again_by if recomputed else flow.saved_by).append(use)
            if recomputed and not self._inside(flow):
                flow.saved = True  # what a recomputed part starts from
        for index, tensor in enumerate(node.outputs):
            flow = self._open(tensor, (index_of_decision, index))
            flow.saved = tensor in kept and not recomputed
            if operator.alias and node.inputs:
                flow.view_of = id(self.flows[node.inputs[0]])  # an index once all flows are known

    def _inside(self, flow: Flow) -> bool:
        """Whether a flow is produced by a recomputed part."""
        return self.builder.problem.decisions[flow.producer[0]].recomputed

    def _close(self) -> None:
        """Adds the flows; equal ones (the chain through repeated blocks) become one with a count."""
        merged: dict[object, Flow] = {}
        index_of: dict[int, int] = {}
        for flow in self.flows.values():
            flow.consumers = list(dict.fromkeys(flow.consumers))
            if not flow.consumers:
                continue
            same = merged.setdefault((flow.producer, tuple(flow.consumers)), flow)
            if same is not flow:
                same.count += flow.count
            else:
                index_of[id(flow)] = len(self.builder.problem.flows) + len(index_of)
        for flow in merged.values():
            flow.view_of = None if flow.view_of is None else index_of[flow.view_of]
        self.builder.problem.flows.extend(merged.values())


def layouts(shape: Sequence[int], mesh: Mesh, whole: Placement) -> list[Placements]:
    """All ways to lay a tensor on the mesh: on each axis `whole` or sharded along a dimension that divides."""
    per_axis = [[whole, *(Shard(dim) for dim in range(len(shape)))] for _ in mesh.axes]
    return [layout for layout in product(*per_axis) if _divides(shape, layout, mesh)]


def _divides(shape: Sequence[int], layout: Placements, mesh: Mesh) -> bool:
    left = list(shape)
    for placement, size in zip(layout, mesh.sizes, strict=True):
        if isinstance(placement, Shard):
            if left[placement.dim] % size:
                return False
            left[placement.dim] //= size
    return True


def node_options(node: Node, block: Block, bound: Bound, costs: CostModel) -> list[Option]:
    """Every way to split a node over the axes, with its cost; ways that come to the same layouts appear once."""
    mesh = costs.mesh
    inputs = [block.tensors[name] for name in node.inputs]
    outputs = [block.tensors[name] for name in node.outputs]
    found: dict[object, Option] = {}
    names = [way.name for way in bound.splits(1)]
    for chosen in product(names, repeat=len(mesh.sizes)):
        sizes = dict(bound.sizes)
        for name, devices in zip(chosen, mesh.sizes):
            if name is not None:
                sizes[name] = sizes[name] // devices if sizes[name] % devices == 0 else 0
        if not all(sizes[name] for name in chosen if name is not None):
            continue
        ways = [bound.split(name) for name in chosen]
        ins = [_layout(meta, [way.inputs[i] for way in ways if way]) for i, meta in enumerate(inputs)]
        outs = [_layout(meta, [way.outputs[i] for way in ways if way]) for i, meta in enumerate(outputs)]
        key = (tuple(ins), tuple(outs))
        if key in found or not all(_divides(meta.shape, lay, mesh) for meta, lay in zip(inputs + outputs, ins + outs)):
            continue
        local = [costs.local_bytes(meta, lay) for meta, lay in zip(inputs + outputs, ins + outs)]
        seconds = costs.operator(node, block, sizes, local)
        label = ",".join(name or "-" for name in chosen)
        transient = 0.0 if operator_of(node).alias else 2.0 * sum(local)
        found[key] = Option(label, key[0], key[1], seconds, 0.0, transient)
    return list(found.values())


def _layout(meta: TensorMeta, placements: list[Placement]) -> Placements:
    layout = tuple(placements)
    return layout if meta.requires_grad else without_gradient(layout)
