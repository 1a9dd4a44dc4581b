"""The plan: everything that the code generator needs to know, and the figures that explain it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from nnscaler.graph import Graph
from nnscaler.mesh import Mesh
from nnscaler.placement import Placements, format_placements
from nnscaler.searched import Searched
from nnscaler.sums import IN_FP32, GradientSum

if TYPE_CHECKING:
    from nnscaler.recompute import Level

GIB = 2.0**30


class Key(NamedTuple):
    """What seconds or bytes are for.

    category  of seconds: "forward", "backward", "again" (recomputed in backward), "reshard", "reshard backward",
              "reshard again" (resharded again in backward), "cast" and "cast again" (of weights, to be gathered in
              another type), "update", "exchange" (communication that is not hidden), "copies" (to the host and back,
              not hidden); of bytes: "parameter", "saved" (kept for backward), "inside" (kept of a unit's inner
              tensors), "working" (held while an operator runs), "buffers" (of communication), "state" (of the
              optimizer, on the host), "gradients" (on the host)
    block     the name of the block
    name      the name of a unit, tensor or parameter in the block
    detail    the recompute level; the layouts between which a tensor is resharded; or what of a parameter it is
    """

    category: str
    block: str = ""
    name: str = ""
    detail: str = ""


@dataclass(frozen=True)
class NodePlan:
    """How one node runs.

    split            for each mesh axis, the annotated name that is split, or `-` for none; such as `b,-`
    inputs, outputs  the layout of each tensor
    in_fp8           whether it multiplies in fp8, see `nnscaler.kernels.fp8`
    """

    split: str
    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    in_fp8: bool = False


@dataclass
class Plan:
    """A graph laid over a mesh, and what that is predicted to cost.

    What the code generator needs:

    nodes           (block, name of a node) -> how it runs
    inputs          block -> the layouts of its inputs, in which its callers pass them
    outputs         block -> the layouts of its outputs
    parameters      full name -> the layout in which it is stored
    exchanged_once  full names of parameters whose gradient is exchanged once a step, rather than in each micro-batch
    master_only     full names of parameters of which only the fp32 master weight is stored; they are cast when they are
                    gathered
    levels          block -> recompute level -> how many of its calls have it
    recomputed      block -> names of the nodes that the user wants recomputed
    pieces          (block, name of a stretch) -> in how many pieces it is computed; see `nnscaler.pieces`
    gathered_again  (block, tensor): weights that backward gathers again rather than keep
    gathered_in_fp8  (block, tensor, layout): weights that are gathered in fp8 to this layout, in which only products in
                    fp8 use them
    splits          whether it is a stage of a pipeline whose backward runs in two parts; see `nnscaler.runtime.later`
    micro_batches   how many a step has
    sums            how devices add up their gradients

    Figures:

    seconds         predicted seconds of one micro-batch, by what they are for
    memory          predicted bytes of a device
    beside          seconds of what is exchanged beside computation; the time that this adds is in `seconds`
    costs           the planner's cost model that gave them; None: no planner made this plan
    memory_limit    bytes a device that the plan was to fit into
    bound           seconds of a step; no plan on the meshes that were tried takes less
    searched        how it was searched for; None: by no search, or as a stage of a pipeline
    host            bytes of the host's memory, for each device; `host_limit`: how many it was to use at most
    copies          seconds of copies to the host and back, beside computation
    """

    graph: Graph
    mesh: Mesh
    hardware: str
    nodes: dict[tuple[str, str], NodePlan] = field(default_factory=dict)
    inputs: dict[str, list[Placements]] = field(default_factory=dict)
    outputs: dict[str, list[Placements]] = field(default_factory=dict)
    parameters: dict[str, Placements] = field(default_factory=dict)
    exchanged_once: set[str] = field(default_factory=set)
    master_only: set[str] = field(default_factory=set)
    levels: dict[str, dict[Level, int]] = field(default_factory=dict)
    recomputed: dict[str, set[str]] = field(default_factory=dict)
    pieces: dict[tuple[str, str], int] = field(default_factory=dict)
    gathered_again: set[tuple[str, str]] = field(default_factory=set)
    gathered_in_fp8: set[tuple[str, str, Placements]] = field(default_factory=set)
    splits: bool = False
    micro_batches: int = 1
    sums: GradientSum = IN_FP32
    seconds: dict[Key, float] = field(default_factory=dict)
    memory: dict[Key, float] = field(default_factory=dict)
    beside: dict[Key, float] = field(default_factory=dict)
    costs: object = None
    memory_limit: float = inf
    bound: float = 0.0
    searched: Searched | None = None
    host: dict[Key, float] = field(default_factory=dict)
    copies: dict[Key, float] = field(default_factory=dict)
    host_limit: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of an optimizer step."""
        return sum(self.seconds.values()) * self.micro_batches

    @property
    def gap(self) -> float:
        """The largest part of its time, 0 to 1, that a better plan could save, as far as is proven."""
        return max(0.0, 1 - self.bound / self.step_seconds) if self.step_seconds else 0.0

    @property
    def memory_bytes(self) -> float:
        """Predicted peak of memory, in bytes a device."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> float:
        """Predicted bytes of the host's memory, for each device."""
        return sum(self.host.values())

    @property
    def state_on_host(self) -> float:
        """Bytes of the optimizer's state that lie on the host, for each device."""
        return sum(size for key, size in self.host.items() if key.category == "state")

    @property
    def gradients_on_host(self) -> float:
        """Bytes of gradients that lie on the host between backward and the update, for each device."""
        return sum(size for key, size in self.host.items() if key.category == "gradients")

    def to_json(self) -> dict[str, Any]:
        """How everything lies and runs, as plain values; `nnscaler.report` adds what it costs."""
        return {
            "model": self.graph.root.module_type,
            "mesh": self.mesh.to_json(),
            "hardware": self.hardware,
            "micro_batches": self.micro_batches,
            "splits": self.splits,
            "inputs": list(self.graph.root.inputs),
            "parameters": {name: self._parameter_json(name) for name in self.graph.parameters},
            "tied": self.graph.tied,
            "state_on_host": self.state_on_host,
            "gradients_on_host": self.gradients_on_host,
            "gradient_sum": asdict(self.sums),
            "blocks": {
                block.name: {
                    "calls": self.graph.count(block),
                    "inputs": dict(zip(block.inputs, map(format_placements, self.inputs[block.name]))),
                    "outputs": dict(zip(block.outputs, map(format_placements, self.outputs[block.name]))),
                    "recompute": {level.name: n for level, n in self.levels.get(block.name, {}).items()},
                    "recomputed": sorted(self.recomputed.get(block.name, ())),
                    "pieces": {name: count for (where, name), count in self.pieces.items() if where == block.name},
                    "gathered_again": sorted(name for where, name in self.gathered_again if where == block.name),
                    "gathered_in_fp8": sorted({name for where, name, _ in self.gathered_in_fp8 if where == block.name}),
                    "nodes": {
                        node.name: self._node_json(block.name, node.name, node.op)
                        for node in block.nodes
                        if (block.name, node.name) in self.nodes
                    },
                }
                for block in self.graph.all_blocks()
            },
        }

    @property
    def _paths_in_fp8(self) -> set[str]:
        uses = {(block, tensor) for block, tensor, _ in self.gathered_in_fp8}
        return {path for block, tensor, path in self.graph.parameter_uses() if (block.name, tensor) in uses}

    def _parameter_json(self, name: str) -> dict[str, Any]:
        meta = self.graph.parameters[name]
        return {
            "shape": list(meta.shape),
            "dtype": str(meta.dtype).removeprefix("torch."),
            "trained": meta.requires_grad,
            "layout": format_placements(self.parameters[name]),
            "exchanged_once": name in self.exchanged_once,
            "master_only": name in self.master_only,
            "gathered_in_fp8": name in self._paths_in_fp8,
        }

    def _node_json(self, block: str, name: str, op: str) -> dict[str, Any]:
        node = self.nodes[block, name]
        return {
            "op": op,
            "split": node.split,
            "inputs": [format_placements(layout) for layout in node.inputs],
            "outputs": [format_placements(layout) for layout in node.outputs],
            "in_fp8": node.in_fp8,
        }
