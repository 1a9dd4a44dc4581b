"""What work costs on given hardware: seconds of units, collectives and the optimizer, and bytes that they hold.

A product, or a registered operator, takes the longer of two times: its arithmetic at the rate that the device reaches,
and its bytes at the device's memory bandwidth (the roofline model). A cheap operator only moves bytes. A fused cluster
of cheap operators moves those that enter and leave it; one that is not fused moves those of each operator.

All devices do the same work on equal shards, so times are those of one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from nnscaler.graph import Block, Node, TensorMeta
from nnscaler.hardware import Hardware, Timing
from nnscaler.kernels.fp8 import E4M3
from nnscaler.mesh import Mesh
from nnscaler.operators import bind, operator_of
from nnscaler.placement import Placements, Shard, local_shape
from nnscaler.planner.fp8 import Fp8Product, fp8_product
from nnscaler.profiler.operators import OperatorTimes, Part
from nnscaler.reshard import Reshard
from nnscaler.sizes import BUCKET_ELEMENTS, GRADIENT_SLOTS, MOST_IN_FLIGHT, STATES_AHEAD
from nnscaler.sums import IN_FP32, GradientSum
from nnscaler.units import Unit, needed_by, node_kind, saved_by

MASTER_BYTES = 4  # fp32 master weight
MOMENT_BYTES = 8  # two fp32 moments of Adam
GRADIENT_BYTES = 4  # gradients are summed in fp32
TIMED_SECONDS = 1.0  # of a forward; where it takes longer, a part of it is timed
STRIDED = 3  # a copy that reorders a tensor takes so many times as long as one that does not (measured on H200)

STORED = "parameters"  # of the bytes that a parameter takes, those of itself
IN_FP8 = "shards in fp8"  # of what is gathered, where that is kept until the next update
GRADIENTS = "gradients"  # of its gradient
STATE = ("master weights", "moments")  # and those of the optimizer's state
LOCAL = ("slice", "pad", "divide")  # local: no other device takes part in these


def master_bytes(meta: TensorMeta) -> int:
    """Bytes an element of the fp32 master weight beside a parameter: one in fp32 is its own."""
    return 0 if meta.dtype.itemsize == MASTER_BYTES else MASTER_BYTES


def in_fp32(meta: TensorMeta) -> TensorMeta:
    """A parameter that is stored as its master weight alone, as it is stored."""
    return replace(meta, dtype=torch.float32)


def narrow(meta: TensorMeta) -> TensorMeta:
    """A parameter that is gathered in fp8, as it is gathered."""
    return replace(meta, dtype=E4M3)


@dataclass(frozen=True)
class Local:
    """A node as one device runs it.

    sizes        local size of each annotated name
    inputs       shapes and types of its local inputs
    bytes        local bytes of each input, then of each output
    axes         the mesh axes over which the node's own function communicates, as over one; none: it does not

    Where there are such axes:

    way          the name that is split along them
    group_sizes  size of each annotated name over all devices of the axes together; each device does an equal part
    exchanged    for each input and output, whether the function exchanges it

    fp8          the product in fp8 that it is; None: it is none
    """

    node: Node
    sizes: dict[str, int]
    inputs: list[TensorMeta]
    bytes: list[int]
    axes: tuple[int, ...] = ()
    way: str | None = None
    group_sizes: dict[str, int] = field(default_factory=dict)
    exchanged: Sequence[bool] = ()
    fp8: Fp8Product | None = None


@dataclass(frozen=True)
class Seconds:
    """Seconds of the forward and of the backward of one micro-batch."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)


NO_TIME = Seconds()


@dataclass(frozen=True)
class CostModel:
    """Prices work on a mesh of devices of one kind.

    fused  whether a cluster of cheap operators runs as one kernel, as `torch.compile` makes it
    times  measured times of operators, which are taken instead of the roofline; None: there are none
    sums   how devices add up their gradients
    """

    hardware: Hardware
    mesh: Mesh
    fused: bool = False
    times: OperatorTimes | None = None
    sums: GradientSum = IN_FP32
    _timed: dict[tuple[str, float, tuple[int, ...]], Timing] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # what `collective` has found

    def local_bytes(self, meta: TensorMeta, placements: Placements) -> int:
        """Bytes of one device's part of a tensor that lies so."""
        size = meta.nbytes
        for placement, devices in zip(placements, self.mesh.sizes, strict=True):
            size //= devices if isinstance(placement, Shard) else 1
        return size

    def unit(
        self, unit: Unit, block: Block, layouts: Mapping[str, Placements], nodes: Sequence[Local]
    ) -> tuple[Seconds, float, float]:
        """The cost of a unit with these layouts: (time, transient bytes, inner bytes).

        The transient bytes are held while backward of the unit runs: the gradients of its inputs and outputs. The inner
        bytes are those of inner tensors that backward keeps.
        """
        inside = sum(
            operator_of(local.node).keeps(local.sizes, local.node, local.inputs)
            for local in nodes
            if any(block.tensors[name].requires_grad for name in local.node.outputs)
        )
        if unit.kind == "cheap" and self.fused:
            return *self._cluster(unit, block, layouts), inside
        seconds, transient = NO_TIME, 0.0
        kept: set[str] = set()
        for local in nodes:
            node = local.node
            if operator_of(node).alias:
                continue
            seconds += self._node(local, block) + self._exchange(local, block)
            held = local.fp8.held if local.fp8 else operator_of(node).workspace(local.sizes, node, local.inputs)
            transient = max(transient, sum(local.bytes) + held)
            kept.update(saved_by(node, block))
            if local.axes:  # what it computes before the exchange is kept beside what it gives
                inside += self._travelling(local) or sum(local.bytes[len(node.inputs) :])
        if unit.kind == "cheap":  # what others save of themselves is their output, or what it is a view of
            inner = {name for node in unit.nodes for name in node.outputs} - set(unit.outputs)
            inside += sum(self.local_bytes(block.tensors[name], layouts[name]) for name in kept & inner)
        return seconds, transient, inside

    def _cluster(self, unit: Unit, block: Block, layouts: Mapping[str, Placements]) -> tuple[Seconds, float]:
        """The time and the transient bytes of a fused cluster.

        Forward reads its inputs and writes its outputs. Backward reads the tensors that it needs and the gradients of
        the outputs, and writes the gradients of the inputs.
        """
        if all(operator_of(node).alias for node in unit.nodes):
            return NO_TIME, 0.0
        size = {name: self.local_bytes(block.tensors[name], layouts[name]) for name in (*unit.inputs, *unit.outputs)}
        read, written = (sum(size[name] for name in names) for names in (unit.inputs, unit.outputs))
        forward = self._roofline(0.0, read + written)
        backward = 0.0
        if any(block.tensors[name].requires_grad for name in unit.outputs):
            needed = sum(size[name] for name in needed_by(unit, block))
            given = sum(size[name] for name in unit.outputs if block.tensors[name].requires_grad)
            made = sum(size[name] for name in unit.inputs if block.tensors[name].requires_grad)
            backward = self._roofline(0.0, needed + given + made)
        return Seconds(forward, backward), float(read + written)

    def fastest(self, local: Local, block: Block) -> Local:
        """The node as a product in fp8, where it may be one and that is faster; else as it is."""
        product = fp8_product(local.node, local.inputs, block, self.hardware)
        if product is None:
            return local
        narrow = replace(local, fp8=product)
        plain, rounded = self._node(local, block), self._node(narrow, block)
        return narrow if rounded.forward + rounded.backward < plain.forward + plain.backward else local

    def _node(self, local: Local, block: Block) -> Seconds:
        """Seconds of one node."""
        node, operator = local.node, operator_of(local.node)
        if local.fp8 is not None:
            return Seconds(local.fp8.forward(self.hardware), local.fp8.backward(self.hardware))
        flops = operator.flops(local.sizes, node)
        if local.axes:
            flops = operator.flops(local.group_sizes, node) / self.mesh.devices(*local.axes)
        if (measured := self._measured(local, block, flops)) is not None:
            return measured
        metas = [block.tensors[name] for name in (*node.inputs, *node.outputs)]
        rate = self.hardware.flops_per_second(node.op, metas[0].dtype) if flops else 1.0
        moved = sum(local.bytes)
        forward = self._roofline(flops / rate, moved)
        if not any(block.tensors[name].requires_grad for name in node.outputs):
            return Seconds(forward)
        needed = [meta.requires_grad for meta in metas[: len(node.inputs)]]
        # Backward reads the outputs' gradients and what was saved, and writes the inputs' gradients.
        written = sum(size for size, needs in zip(local.bytes, needed) if needs)
        read = moved if saved_by(node, block) else sum(local.bytes[len(node.inputs) :])
        ratio = operator.backward_ratio(node, metas[: len(node.inputs)])
        return Seconds(forward, self._roofline(ratio * flops / rate, written + read))

    def _measured(self, local: Local, block: Block, flops: float) -> Seconds | None:
        """Measured seconds of a node that does `flops` operations; None where it was not measured.

        What was timed is a call on the local inputs. Where the node's function communicates, the device does another
        number of operations than that call, and the time is scaled to it.
        """
        if self.times is None or node_kind(local.node) == "cheap":
            return None
        done = operator_of(local.node).flops(local.sizes, local.node)
        found = self.times.seconds(local.node, local.inputs, self._part(local, block, done))
        if found is None:
            return None
        share = flops / done if done else 1.0
        return Seconds(found[0] * share, found[1] * share)

    def _part(self, local: Local, block: Block, flops: float) -> Part | None:
        """The part of a call of so many operations that is timed in its place, if the call takes very long: that along
        a name which may be split without communication."""
        operator = operator_of(local.node)
        rate = self.hardware.flops_per_second(local.node.op, local.inputs[0].dtype) if flops else 1.0
        seconds = flops / rate
        if seconds <= TIMED_SECONDS:
            return None
        for way in bind(local.node, block).splits(1):
            size = local.sizes.get(way.name or "", 1)
            if size == 1 or way.name in operator.along:
                continue
            counts = (count for count in range(2, size) if size % count == 0 and seconds <= count * TIMED_SECONDS)
            count = next(counts, size)
            shapes = [local_shape(meta.shape, (place,), (count,)) for meta, place in zip(local.inputs, way.inputs)]
            metas = [replace(meta, shape=shape) for meta, shape in zip(local.inputs, shapes)]
            return Part(metas, flops / operator.flops({**local.sizes, way.name or "": size // count}, local.node))
        return None

    def node_origin(self, node: Node, inputs: Sequence[TensorMeta]) -> str:
        """Where the seconds of a node on these local inputs come from: "measured" or "roofline"."""
        if self.times is None or node_kind(node) == "cheap" or self.times.seconds(node, inputs) is None:
            return "roofline"
        return "measured"

    def _exchange(self, local: Local, block: Block) -> Seconds:
        """Seconds in which a node's own function exchanges its inputs and outputs with other devices."""
        if not local.axes:
            return NO_TIME
        if size := self._travelling(local):  # there and back
            seconds = 2 * self.collective("all_to_all", size, *local.axes).seconds
            return Seconds(seconds, seconds if saved_by(local.node, block) else 0.0)
        names = (*local.node.inputs, *local.node.outputs)
        moved = [(name, size) for name, size, exchanged in zip(names, local.bytes, local.exchanged) if exchanged]
        forward = sum(self.collective("all_to_all", size, *local.axes).seconds for _, size in moved)
        backward = sum(
            self.collective("all_to_all", size, *local.axes).seconds
            for name, size in moved
            if block.tensors[name].requires_grad
        )
        return Seconds(forward, backward)

    def _travelling(self, local: Local) -> float | None:
        """Bytes that an operator's function sends to other devices, where the operator says how many."""
        exchange = operator_of(local.node).exchanges.get(local.way or "")
        if exchange is None or not local.axes:
            return None
        return exchange(local.sizes, self.mesh.devices(*local.axes), local.inputs)

    def _roofline(self, arithmetic: float, moved: float) -> float:
        return self.hardware.launch + max(arithmetic, moved / self.hardware.memory_bandwidth)

    def resharding(self, meta: TensorMeta, source: Placements, reshards: Sequence[Reshard]) -> Seconds:
        """Seconds of changing a tensor's layout, in forward and in backward (0 where it has no gradient)."""
        return sum((seconds for _, _, seconds in self.each_reshard(meta, source, reshards)), NO_TIME)

    def each_reshard(
        self, meta: TensorMeta, source: Placements, reshards: Sequence[Reshard]
    ) -> Iterator[tuple[Reshard, int, Seconds]]:
        """(reshard, bytes of the larger of a device's input and output, seconds) of each of `reshards`."""
        current = list(source)
        for reshard in reshards:
            before = self.local_bytes(meta, tuple(current))
            current[reshard.axis] = reshard.target
            part = max(before, self.local_bytes(meta, tuple(current)))
            forward, backward = (self._moving(name, reshard, meta, part) for name in reshard.collectives)
            yield reshard, part, Seconds(forward, backward if meta.requires_grad else 0.0)

    def each_gradient(
        self, meta: TensorMeta, source: Placements, reshards: Sequence[Reshard]
    ) -> Iterator[tuple[Reshard, str, int, float]]:
        """(reshard, collective, bytes, seconds) in backward of each of the gathers of a weight: where its gradients are
        added up, that is done as `sums` says."""
        meta = replace(meta, dtype=self.sums.dtype(meta.dtype))
        for reshard, part, _ in self.each_reshard(meta, source, reshards):
            name = reshard.collectives[1]
            name = self.sums.collective if name == "reduce_scatter" else name
            yield reshard, name, part, self._moving(name, reshard, meta, part) if meta.requires_grad else 0.0

    def _moving(self, name: str, reshard: Reshard, meta: TensorMeta, size: float) -> float:
        """Seconds of one collective, and of the copies that bring slices into order before and after it."""
        dims = {place.dim for place in (reshard.source, reshard.target) if isinstance(place, Shard)}
        copies = 1 if name == "all_reduce" else 0
        if name in ("all_gather", "reduce_scatter", "all_to_all"):
            copies = sum(prod(meta.shape[:dim]) > 1 for dim in dims)  # else the slices lie so already
        moved = 2 * STRIDED * copies * size if self.mesh.sizes[reshard.axis] > 1 else 0.0
        return self.collective(name, size, reshard.axis).seconds + moved / self.hardware.memory_bandwidth

    def collective(self, name: str, size: float, *axes: int) -> Timing:
        """Time of a collective over a mesh axis, or over neighbouring axes as over one. `size`: bytes of the larger of
        a device's input and output."""
        asked = name, size, axes
        if asked not in self._timed:
            self._timed[asked] = self._collective(*asked)
        return self._timed[asked]

    def _collective(self, name: str, size: float, axes: tuple[int, ...]) -> Timing:
        devices = self.mesh.devices(*axes)
        if devices == 1 or name == "identity":
            return Timing(0.0, "roofline")
        if name in LOCAL:
            seconds = self.hardware.launch + 2 * size / devices / self.hardware.memory_bandwidth
            return Timing(seconds, "roofline")
        per_node = self.mesh.on_a_node(self.hardware.devices_per_node, axes)
        return self.hardware.collective_seconds(name, size, devices, per_node < devices, per_node)

    def owners(self, placements: Placements) -> int:
        """How many ranks hold the same shard of a parameter. They exchange its gradient, and share its optimizer
        state."""
        held = self.mesh.replicas
        for placement, size in zip(placements, self.mesh.sizes, strict=True):
            held *= 1 if isinstance(placement, Shard) else size
        return held

    def gradient_exchange(self, meta: TensorMeta, placements: Placements) -> float:
        """Seconds of exchanging a parameter's gradient once. This runs beside backward's computation."""
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        size = elements * self.sums.itemsize
        return self.among_owners(self.sums.collective, size, placements).seconds

    def cast(self, meta: TensorMeta, placements: Placements) -> float:
        """Seconds of casting a shard of a parameter from fp32, where that is all that is stored of it."""
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        return self._roofline(0.0, elements * (MASTER_BYTES + meta.dtype.itemsize))

    def rounding(self, meta: TensorMeta, placements: Placements) -> float:
        """Seconds of rounding a shard of a parameter to fp8."""
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        return self._roofline(0.0, elements * (meta.dtype.itemsize + E4M3.itemsize))

    def weight_exchange(self, meta: TensorMeta, placements: Placements) -> float:
        """Seconds in which the owners of a parameter send each other the parts that they updated."""
        return self.among_owners("all_gather", self.local_bytes(meta, placements), placements).seconds

    def update(
        self,
        meta: TensorMeta,
        placements: Placements,
        micro_batches: int,
        exchanged_once: bool,
        master_only: bool = False,
    ) -> float:
        """Seconds of a parameter's update, as a part of one micro-batch's time.

        Once a step, the owners update their parts and send them to each other; these seconds are divided by
        `micro_batches`. In each micro-batch, the gradient is written to a buffer, or to the sum of the micro-batches
        before if it is exchanged once.
        """
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        owned = elements / self.owners(placements)
        gradient = self.gradient_bytes(meta, micro_batches)
        # The gradient is read for its norm, scaled, and read again.
        state = 2 * (MASTER_BYTES + MOMENT_BYTES) + 4 * gradient
        if master_bytes(meta) and not master_only:  # which is read once more, and written as the parameter
            state += MASTER_BYTES + meta.dtype.itemsize
        update = owned * state / self.hardware.memory_bandwidth
        # But for the first micro-batch's, the sum is read, too; or what comes of the exchange and the sum are read, and
        # the sum written.
        added = (elements if exchanged_once else owned * 3) * (1 - 1 / micro_batches)
        copied = elements * (meta.dtype.itemsize + gradient) + added * gradient
        once = self.weight_exchange(meta, placements) + update
        return once / micro_batches + copied / self.hardware.memory_bandwidth

    def among_owners(self, name: str, size: float, placements: Placements) -> Timing:
        """Time of a collective over all ranks that hold the same shard of a parameter, on `size` bytes.

        Parameters are exchanged a bucket at a time. So the time is that of a whole bucket, times the share that `size`
        has of it.
        """
        owners = self.owners(placements)
        if owners == 1:
            return Timing(0.0, "roofline")
        bucket = BUCKET_ELEMENTS * GRADIENT_BYTES
        axes = tuple(axis for axis, place in enumerate(placements) if not isinstance(place, Shard))
        per_node = self.mesh.on_a_node(self.hardware.devices_per_node, axes, copies=True)
        timing = self.hardware.collective_seconds(name, bucket, owners, per_node < owners, per_node)
        return timing._replace(seconds=timing.seconds * size / bucket)

    def exchange_buffer(self, meta: TensorMeta, placements: Placements) -> float:
        """Bytes of the buffer in which a parameter's gradient is exchanged, and of the part that comes back.

        In bf16 it is as much: all terms come back by themselves, and are added up.
        """
        elements = self.local_bytes(meta, placements) / meta.dtype.itemsize
        return GRADIENT_BYTES * elements * (1 + 1 / self.owners(placements))

    def exchange_buffers(self, elements: int) -> float:
        """Most bytes that the buffers for exchanging gradients take, in a model with `elements` trained elements.

        These are the buckets whose exchange is under way, with the parts that come back, and two that are being filled.
        """
        bucket = min(BUCKET_ELEMENTS, elements) * GRADIENT_BYTES
        buckets = -(-elements // BUCKET_ELEMENTS)
        received = min(MOST_IN_FLIGHT, buckets) / self.mesh.runtime_ngpus
        return bucket * (min(MOST_IN_FLIGHT + 2, buckets) + received)

    def state_memory(self, trained: Sequence[TensorMeta]) -> float:
        """Bytes a device of master weights and moments. All ranks own equal parts of them."""
        return sum(meta.numel * (master_bytes(meta) + MOMENT_BYTES) for meta in trained) / self.mesh.runtime_ngpus

    def staging_memory(self, elements: int) -> float:
        """Bytes on the device for optimizer state that lies on the host, while it is updated there.

        `elements`: the number of trained elements of the model
        """
        bucket = min(BUCKET_ELEMENTS, elements) * (MASTER_BYTES + MOMENT_BYTES)
        return (STATES_AHEAD + 1) * bucket / self.mesh.replicas

    def gradient_memory(self, trained: Sequence[TensorMeta], micro_batches: int) -> float:
        """Bytes a device of gradients, where all ranks own equal parts of them."""
        sizes = (meta.numel * self.gradient_bytes(meta, micro_batches) for meta in trained)
        return sum(sizes) / self.mesh.runtime_ngpus

    def slots_memory(self, trained: Sequence[TensorMeta], micro_batches: int) -> float:
        """Bytes on the device for gradients that lie on the host, while backward adds to them."""
        elements = sum(meta.numel for meta in trained)
        bucket = min(BUCKET_ELEMENTS, elements) * max(self.gradient_bytes(meta, micro_batches) for meta in trained)
        return min(GRADIENT_SLOTS, -(-elements // BUCKET_ELEMENTS)) * bucket / self.mesh.replicas

    def gradient_bytes(self, meta: TensorMeta, micro_batches: int) -> int:
        """Bytes of an element of a parameter's gradient, between backward and the update."""
        return GRADIENT_BYTES if self.mesh.sums_gradients(micro_batches) else meta.dtype.itemsize

    def parameter_memory(
        self, meta: TensorMeta, placements: Placements, micro_batches: int, exchanged_once: bool = False
    ) -> dict[str, float]:
        """Bytes a device that a parameter takes all the time, by what they are.

        These are the parameter itself, and the owned part of its gradient, master weight and moments. A gradient that
        is exchanged once a step is held whole.
        """
        stored = self.local_bytes(meta, placements)
        if not meta.requires_grad:
            return {STORED: stored}
        elements = stored / meta.dtype.itemsize
        owned = elements / self.owners(placements)
        return {
            STORED: stored,
            GRADIENTS: (elements if exchanged_once else owned) * self.gradient_bytes(meta, micro_batches),
            "master weights": owned * master_bytes(meta),
            "moments": owned * MOMENT_BYTES,
        }
