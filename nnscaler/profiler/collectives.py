"""How long collectives take on this machine. `nnscaler.profiler.benchmark_comm` is the command that measures this."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nnscaler.errors import UserError
from nnscaler.hardware.communication import COLLECTIVES, CommunicationTimes, Curve, Group, without_noise
from nnscaler.hardware.local import communication_path, write_text
from nnscaler.hardware.spec import device_name
from nnscaler.profiler.copies import measure_copies
from nnscaler.profiler.timing import slowest_median
from nnscaler.runtime.collectives import all_gather_single, reduce_scatter_single

logger = logging.getLogger(__name__)

COMMAND = "torchrun --nnodes=<nodes> --nproc_per_node=<devices of a node> -m nnscaler.profiler.benchmark_comm"
SMALLEST = 2**10
LARGEST = {"nccl": 2**30, "gloo": 2**26}  # bytes
SLOW = 0.5  # seconds; what is larger than a message that takes longer is left to extrapolation


@dataclass(frozen=True)
class World:
    """The processes that measure: the same number on each node, and the ranks of a node one after the other."""

    rank: int
    size: int
    per_node: int
    backend: str
    device: torch.device

    @property
    def device_name(self) -> str:
        return device_name() if self.device.type == "cuda" else "cpu"

    @property
    def nodes(self) -> int:
        return self.size // self.per_node


def measure_and_keep(backend: str | None) -> None:
    """Measures, keeps the times on every node, and prints them. Collective.

    backend  "nccl" or "gloo"; None: nccl where there are GPUs
    Raises UserError where torchrun has not started several processes, or the times cannot be kept.
    """
    world = find_world(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    dist.init_process_group(world.backend, device_id=world.device if world.device.type == "cuda" else None)
    try:
        times = measure(world)
        if world.device.type == "cuda":
            times = replace(times, copies=measure_copies(world.device))
        elif world.rank == 0:
            logger.info("there is no GPU here, and so no copies to the host and back to be measured")
        if world.rank % world.per_node == 0:
            write_text(communication_path(world.device_name), times.dumps())
        if world.rank == 0:
            sys.stdout.write(table(times) + "\n")
            logger.info("written to %s", communication_path(world.device_name))
    finally:
        dist.destroy_process_group()


def find_world(backend: str) -> World:
    """The processes that torchrun has started. Raises UserError where it is not several, with a device for each."""
    rank, size, local_rank, per_node = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if size < 2:
        raise UserError(f"communication takes at least 2 processes; start them with: {COMMAND}")
    if size % per_node:
        raise UserError(f"nodes have different numbers of processes ({size} in all, {per_node} here)")
    if backend == "gloo":
        return World(rank, size, per_node, backend, torch.device("cpu"))
    if per_node > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node is {per_node}; this node has {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return World(rank, size, per_node, backend, torch.device("cuda", local_rank))


def measure(world: World) -> CommunicationTimes:
    """The times of every collective in every kind of group; they are the same on all ranks."""
    sizes = [SMALLEST << step for step in range((LARGEST[world.backend] // SMALLEST).bit_length())]
    kinds = groups(world.size, world.per_node)
    curves: dict[tuple[str, Group], Curve] = {}
    total = len(kinds) * len(COLLECTIVES) * len(sizes)
    with tqdm(total=total, desc="collectives", unit="message", dynamic_ncols=True, disable=world.rank != 0) as bar:
        for group, ranks in kinds.items():
            process_group, _ = dist.new_subgroups_by_enumeration(ranks)
            for collective in COLLECTIVES:
                bar.set_postfix_str(f"{collective} of {_described(group)}")
                points: list[tuple[int, float]] = []
                for size in sizes:
                    # Once it is slow, the rest is only counted.
                    if not points or points[-1][1] < SLOW:
                        elements = size // 4 // group.size * group.size
                        call = _prepared(collective, elements, group.size, process_group, world.device)
                        points.append((4 * elements, slowest_median(call, world.device)))
                    bar.update()
                curves[collective, group] = without_noise(points)
    source = (
        f"measured over {world.backend} on {world.nodes} x {world.per_node} {world.device_name}, "
        f"torch {torch.__version__}, {date.today()}"
    )
    return CommunicationTimes(curves, source)


def groups(world: int, per_node: int) -> dict[Group, list[list[int]]]:
    """Kind of group to measure -> the ranks of all groups of that kind. Every rank is in one group of each kind.

    Inside a node, the ranks of a group are neighbours. Across nodes they are as far apart as possible, with the same
    number on each node.
    """
    kinds: dict[Group, list[list[int]]] = {}
    for size in _sizes(per_node):
        kinds[Group(size, size)] = [list(range(first, first + size)) for first in range(0, world, size)]
    nodes = world // per_node
    if nodes > 1:
        for size in (size for size in _sizes(world) if size <= nodes or size % nodes == 0):
            apart = world // size
            kinds[Group(size, max(1, size // nodes))] = [list(range(first, world, apart)) for first in range(apart)]
    return kinds


def _sizes(devices: int) -> list[int]:
    """The sizes of groups of so many devices: 2, 4, 8, ..., if they divide the number, and the number itself."""
    powers = [2**power for power in range(1, devices.bit_length()) if devices % 2**power == 0]
    return sorted({*powers, devices} - {1})


def _prepared(collective: str, elements: int, size: int, group: Any, device: torch.device) -> Callable[[], Any]:
    """A call of the collective on buffers of its own, with `elements` numbers in fp32 in the larger one."""
    whole = torch.zeros(elements, device=device)
    part = whole.new_zeros(elements // size)
    other = torch.zeros_like(whole) if collective == "all_to_all" else part
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: all_gather_single(whole, part, group=group),
        "reduce_scatter": lambda: reduce_scatter_single(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    return calls[collective]


def table(times: CommunicationTimes) -> str:
    """For every kind of group, the seconds and GB/s of each collective, by bytes; and the rates of copies."""
    lines = []
    for group in sorted({group for _, group in times.curves}):
        curves = [dict(times.curves[collective, group]) for collective in COLLECTIVES]
        lines += ["", _described(group), " " * 12 + "".join(f"{collective:>22}" for collective in COLLECTIVES)]
        lines.append(f"{'bytes':>12}" + f"{'seconds':>14}{'GB/s':>8}" * len(COLLECTIVES))
        for size in sorted({size for curve in curves for size in curve}):
            cells = [_cell(size, curve[size]) if size in curve else " " * 22 for curve in curves]
            lines.append(f"{size:>12}" + "".join(cells))
    if times.copies is not None:
        there, back, both = (f"{rate / 1e9:.1f} GB/s" for rate in times.copies)
        lines += ["", f"copies to the host {there}, back {back}, at once {both} each way"]
    return "\n".join(lines)


def _cell(size: int, seconds: float) -> str:
    return f"{seconds:>14.3e}{size / seconds / 1e9:>8.2f}"


def _described(group: Group) -> str:
    return (
        f"{group.size} devices, {group.per_node} on each node"
        if group.spans_nodes
        else f"{group.size} devices of a node"
    )
