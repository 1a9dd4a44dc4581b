"""Seconds that operators, collectives and the optimizer take on given hardware.

Every figure here is a roofline: arithmetic over the rate the device reaches, or bytes over its bandwidth, whichever is
longer, plus a launch. Times are for one device; all devices work on equal shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnscaler.graph import Block, Node, TensorMeta
from nnscaler.hardware import Hardware, Link
from nnscaler.mesh import Mesh
from nnscaler.operators import Operator, operator_of
from nnscaler.placement import Placements, local_shape
from nnscaler.reshard import Step

MASTER_BYTES = 4  # fp32 master weight
MOMENT_BYTES = 8  # two fp32 moments of Adam
GRADIENT_BYTES = 4  # gradients are accumulated, and exchanged, in fp32


@dataclass(frozen=True)
class Seconds:
    """Time of one micro-batch's forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)


NO_TIME = Seconds()


@dataclass(frozen=True)
class CostModel:
    """Prices work on a mesh of one kind of hardware."""

    hardware: Hardware
    mesh: Mesh

    def local_bytes(self, meta: TensorMeta, placements: Placements) -> int:
        """Bytes of one device's part of a tensor."""
        size = meta.dtype.itemsize
        for length in local_shape(meta.shape, placements, self.mesh.sizes):
            size *= length
        return size

    def operator(self, node: Node, block: Block, sizes: dict[str, int], local_bytes: Sequence[int]) -> Seconds:
        """Time of a node whose annotated names have the local `sizes` and whose tensors the `local_bytes`."""
        operator = operator_of(node)
        if operator.alias:
            return Seconds()
        metas = [block.tensors[name] for name in (*node.inputs, *node.outputs)]
        flops = operator.flops(sizes, node)
        rate = self.hardware.flops_per_second(node.op, metas[0].dtype) if flops else 1.0
        moved = sum(local_bytes)
        forward = self._roofline(flops / rate, moved)
        if not any(block.tensors[name].requires_grad for name in node.outputs):
            return Seconds(forward)
        needed = [meta.requires_grad for meta in metas[: len(node.inputs)]]
        # Backward reads the outputs' gradients and what was saved, and writes the inputs' gradients.
        written = sum(size for size, needs in zip(local_bytes, needed) if needs)
        read = moved if self._saves(operator, node, block) else sum(local_bytes[len(node.inputs) :])
        ratio = sum(needed) if operator.backward is None else operator.backward
        return Seconds(forward, self._roofline(ratio * flops / rate, written + read))

    @staticmethod
    def _saves(operator: Operator, node: Node, block: Block) -> bool:
        inputs = [block.tensors[name] for name in node.inputs]
        return bool(operator.saves(node, inputs, [block.tensors[name] for name in node.outputs]))

    def _roofline(self, arithmetic: float, moved: float) -> float:
        return self.hardware.launch + max(arithmetic, moved / self.hardware.memory_bandwidth)

    def steps(self, meta: TensorMeta, source: Placements, steps: Sequence[Step]) -> Seconds:
        """Time of the collectives that reshard a tensor; backward's only where it has a gradient."""
        total = Seconds()
        current = list(source)
        for step in steps:
            before = self.local_bytes(meta, tuple(current))
            current[step.axis] = step.target
            whole = max(before, self.local_bytes(meta, tuple(current)))
            forward, backward = step.collectives
            total += Seconds(
                self.collective(forward, whole, step.axis),
                self.collective(backward, whole, step.axis) if meta.requires_grad else 0.0,
            )
        return total

    def collective(self, name: str, whole: float, axis: int) -> float:
        """Seconds of a collective over one mesh axis. `whole` is the bytes of the tensor on its less sharded side."""
        link = self._link(self.mesh.spans_nodes(axis, self.hardware.devices_per_node))
        size = self.mesh.sizes[axis]
        if size == 1 or name == "identity":
            return 0.0
        share = whole / size
        if name in ("slice", "pad", "divide"):
            return self.hardware.launch + 2 * share / self.hardware.memory_bandwidth
        # all_to_all moves (size - 1) / size of what a device holds, which is one share of the whole tensor.
        factor = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}[name]
        return link.latency + factor * (size - 1) * share / link.bandwidth

    def _link(self, spans_nodes: bool) -> Link:
        return self.hardware.inter if spans_nodes else self.hardware.intra

    def owners(self, placements: Placements) -> int:
        """How many ranks hold the same shard of a parameter: they exchange its gradient and share its optimizer."""
        held = self.mesh.replicas
        for axis, placement in zip(self.mesh.axes, placements, strict=True):
            held *= 1 if str(placement).startswith("S") else self.mesh.sizes[axis]
        return held

    def optimizer(self, meta: TensorMeta, placements: Placements, micro_batches: int) -> float:
        """Seconds a micro-batch of gradient exchange, update and parameter exchange of one trained parameter."""
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        owners = self.owners(placements)
        link = self._link(self.mesh.runtime_ngpus > self.hardware.devices_per_node)
        sent = elements * (owners - 1) / owners / link.bandwidth
        exchange = sent * GRADIENT_BYTES + sent * meta.dtype.itemsize / micro_batches
        state = 2 * (MASTER_BYTES + MOMENT_BYTES) + GRADIENT_BYTES + meta.dtype.itemsize
        update = elements / owners * state / self.hardware.memory_bandwidth / micro_batches
        return exchange + update

    def parameter_memory(self, meta: TensorMeta, placements: Placements) -> float:
        """Bytes that a trained parameter takes all the time: itself, and the owned part of gradient and state."""
        stored = self.local_bytes(meta, placements)
        if not meta.requires_grad:
            return stored
        elements = stored / meta.dtype.itemsize
        master = 0 if meta.dtype.itemsize == MASTER_BYTES else MASTER_BYTES
        return stored + elements * (GRADIENT_BYTES + master + MOMENT_BYTES) / self.owners(placements)
