"""The plan: everything the code generator needs to know, and the figures that explain it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from nnscaler.graph import Graph
from nnscaler.mesh import Mesh
from nnscaler.placement import Placements, format_placements

if TYPE_CHECKING:
    from nnscaler.planner.costs import CostModel
    from nnscaler.recompute import Level

GIB = 2.0**30


class Key(NamedTuple):
    """What seconds or bytes are for.

    category  of seconds: forward, backward, again (computed again), reshard, reshard backward, reshard again, update,
              exchange, copies (to the host and back); of bytes: parameter, saved, inside (a unit's inner tensors),
              working, buffers, state (of the optimizer, that lies elsewhere)
    name      a unit, tensor or parameter of the block
    detail    the recompute level, the layouts between which a tensor is brought, or what of a parameter it is
    """

    category: str
    block: str = ""
    name: str = ""
    detail: str = ""


@dataclass(frozen=True)
class NodePlan:
    """How one node runs: the annotated name split on each axis (`-`: none), and the layouts that follow."""

    split: str
    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]


@dataclass
class Plan:
    """A graph laid over a mesh.

    nodes       (block, node name) -> how it runs
    inputs      block -> layouts of its inputs, as callers pass them; outputs likewise
    parameters  full name -> layout in which it is stored
    exchanged_once  full names of those whose gradient is exchanged once a step, not in each micro-batch
    levels      block -> how many of its calls have which recompute level
    recomputed  block -> nodes that the user wants computed again, alone
    pieces      (block, name of a run of its units, see `nnscaler.pieces`) -> how many it is computed in, if several
    gathered_again  (block, tensor) that backward gathers again rather than keep
    seconds     predicted time of one micro-batch; memory likewise, in bytes a device
    beside      seconds of what is exchanged beside computation; by how much that takes longer for it is in seconds
    costs       what the seconds and bytes were made with; None: nobody did
    weight_seconds  of the seconds, those in which backward makes gradients of weights
    memory_limit  bytes a device that the plan was to fit into
    bound       seconds that no plan of a step on the meshes that were tried is below
    host        bytes a device of the host's memory, of which it was to use no more than `host_limit`
    copies      seconds of copying there and back, beside computation
    """

    graph: Graph
    mesh: Mesh
    hardware: str
    nodes: dict[tuple[str, str], NodePlan] = field(default_factory=dict)
    inputs: dict[str, list[Placements]] = field(default_factory=dict)
    outputs: dict[str, list[Placements]] = field(default_factory=dict)
    parameters: dict[str, Placements] = field(default_factory=dict)
    exchanged_once: set[str] = field(default_factory=set)
    levels: dict[str, dict[Level, int]] = field(default_factory=dict)
    recomputed: dict[str, set[str]] = field(default_factory=dict)
    pieces: dict[tuple[str, str], int] = field(default_factory=dict)
    gathered_again: set[tuple[str, str]] = field(default_factory=set)
    micro_batches: int = 1
    seconds: dict[Key, float] = field(default_factory=dict)
    memory: dict[Key, float] = field(default_factory=dict)
    beside: dict[Key, float] = field(default_factory=dict)
    costs: CostModel | None = None
    memory_limit: float = inf
    bound: float = 0.0
    weight_seconds: float = 0.0
    host: dict[Key, float] = field(default_factory=dict)
    copies: dict[Key, float] = field(default_factory=dict)
    host_limit: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Predicted time of an optimizer step."""
        return sum(self.seconds.values()) * self.micro_batches

    @property
    def gap(self) -> float:
        """By how much of its time the plan may be slower than the best, at most: what was not searched or proven."""
        return max(0.0, 1 - self.bound / self.step_seconds) if self.step_seconds else 0.0

    @property
    def memory_bytes(self) -> float:
        """Predicted peak of memory a device."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> float:
        """Predicted memory of the host, a device."""
        return sum(self.host.values())

    @property
    def state_on_host(self) -> float:
        """Bytes of the optimizer's state, a device, that lie on the host."""
        return sum(size for key, size in self.host.items() if key.category == "state")

    def to_json(self) -> dict[str, Any]:
        """How everything lies and runs, as plain values, without the graph; `nnscaler.report` adds what it costs."""
        return {
            "model": self.graph.root.module_type,
            "mesh": self.mesh.to_json(),
            "hardware": self.hardware,
            "micro_batches": self.micro_batches,
            "inputs": list(self.graph.root.inputs),
            "parameters": {name: self._parameter_json(name) for name in self.graph.parameters},
            "tied": self.graph.tied,
            "state_on_host": self.state_on_host,
            "blocks": {
                block.name: {
                    "calls": self.graph.count(block),
                    "inputs": dict(zip(block.inputs, map(format_placements, self.inputs[block.name]))),
                    "outputs": dict(zip(block.outputs, map(format_placements, self.outputs[block.name]))),
                    "recompute": {level.name: n for level, n in self.levels.get(block.name, {}).items()},
                    "recomputed": sorted(self.recomputed.get(block.name, ())),
                    "pieces": {name: count for (where, name), count in self.pieces.items() if where == block.name},
                    "gathered_again": sorted(name for where, name in self.gathered_again if where == block.name),
                    "nodes": {
                        node.name: self._node_json(block.name, node.name, node.op)
                        for node in block.nodes
                        if (block.name, node.name) in self.nodes
                    },
                }
                for block in self.graph.all_blocks()
            },
        }

    def _parameter_json(self, name: str) -> dict[str, Any]:
        meta = self.graph.parameters[name]
        return {
            "shape": list(meta.shape),
            "dtype": str(meta.dtype).removeprefix("torch."),
            "trained": meta.requires_grad,
            "layout": format_placements(self.parameters[name]),
            "exchanged_once": name in self.exchanged_once,
        }

    def _node_json(self, block: str, name: str, op: str) -> dict[str, Any]:
        node = self.nodes[block, name]
        return {
            "op": op,
            "split": node.split,
            "inputs": [format_placements(layout) for layout in node.inputs],
            "outputs": [format_placements(layout) for layout in node.outputs],
        }
