"""How long a collective takes: from tables of bytes and seconds, or by arithmetic where there is no table.

Bytes are those of the larger of the two buffers that one device holds, its input and its output:

    all_reduce       the tensor, which every device holds whole
    all_gather       the output: all shards, one after the other
    reduce_scatter   the input: all shards, one after the other
    all_to_all       the input, which is as large as the output: this device's shard. It is whole along another
                     dimension afterwards. Over all devices of the group that is `size` times as much.

Seconds are those of the slowest device, while all groups of the same kind on the machine are at work, as the groups
along one axis of a mesh are.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

Curve = tuple[tuple[int, float], ...]  # ((bytes, seconds), ...); bytes rise, and seconds do not fall


class Timing(NamedTuple):
    """Seconds, and where they come from.

    origin  "measured": on this machine; "profile": the bundled profile of this kind of device; "roofline": arithmetic
            over the rates of a data sheet
    """

    seconds: float
    origin: Literal["measured", "profile", "roofline"]


class Group(NamedTuple):
    """A group of `size` devices that communicate, `per_node` of them on each node."""

    size: int
    per_node: int

    @property
    def spans_nodes(self) -> bool:
        return self.per_node < self.size


@dataclass(frozen=True)
class Link:
    """A link between devices, as a collective uses it.

    bandwidth  bytes/s that a device sends, and at once receives, when messages are large
    latency    seconds that a collective takes however small it is
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Network:
    """The links of a cluster.

    intra  between devices of one node
    inter  between a device and those of other nodes
    """

    intra: Link
    inter: Link

    def latency(self, group: Group) -> float:
        return (self.inter if group.spans_nodes else self.intra).latency

    def seconds_per_byte(self, collective: str, group: Group) -> float:
        """Seconds that a byte of a large message takes.

        In a ring, every device passes on all shards but one. Across the border of a node run as many rings as it has
        devices in the group, each with its part of the message. In an all-to-all, every device sends each other its
        piece.
        """
        size, per_node = group
        if collective == "all_to_all":
            inside, outside = (per_node - 1) / size, (size - per_node) / size
        else:
            passed = (2 if collective == "all_reduce" else 1) * (size - 1) / size
            inside, outside = passed * (per_node > 1), passed / per_node * group.spans_nodes
        return max(inside / self.intra.bandwidth, outside / self.inter.bandwidth)


class CopyRates(NamedTuple):
    """How fast a device and its host copy to each other, while all devices of the node do.

    to_host    bytes/s at which a device copies to the host
    to_device  bytes/s at which it copies back
    both_ways  bytes/s each way, when both go at once
    """

    to_host: float
    to_device: float
    both_ways: float


@dataclass(frozen=True)
class CommunicationTimes:
    """Tables of collectives' times.

    curves  (collective, group) -> ((bytes, seconds), ...), from small messages to large
    source  where they come from, for people
    copies  of a device to its host and back; None: not measured
    """

    curves: Mapping[tuple[str, Group], Curve] = field(default_factory=dict)
    source: str = ""
    copies: CopyRates | None = None

    def seconds(self, collective: str, size: float, group: Group, network: Network) -> float | None:
        """Seconds of a collective of `size` bytes. None where no table is of its kind (inside a node, or across nodes).

        A group without a table takes that of the group most like it. Of this, the time of the smallest message grows
        with the depth of a tree over the devices, and the rest as `network` says of large messages.
        """
        alike = [at for name, at in self.curves if name == collective and at.spans_nodes == group.spans_nodes]
        if not alike:
            return None
        nearest = min(alike, key=lambda at: (_ratio(at.per_node, group.per_node), _ratio(at.size, group.size)))
        curve = self.curves[collective, nearest]
        floor = curve[0][1]
        depth = math.log2(group.size) / math.log2(nearest.size)
        rate = network.seconds_per_byte(collective, group) / network.seconds_per_byte(collective, nearest)
        return floor * depth + (interpolate(curve, size) - floor) * rate

    def dumps(self) -> str:
        """As JSON, with each table on a line."""
        tables = [
            json.dumps(
                {"collective": name, "group_size": group.size, "per_node": group.per_node, "bytes_seconds": curve}
            )
            for (name, group), curve in sorted(self.curves.items())
        ]
        copies = f'"copies": {json.dumps(self.copies._asdict())}, ' if self.copies else ""
        return f'{{"source": {json.dumps(self.source)}, {copies}"tables": [\n' + ",\n".join(tables) + "\n]}\n"

    @staticmethod
    def from_json(values: Any) -> CommunicationTimes:
        """From what `dumps` wrote, parsed. Raises ValueError, TypeError or KeyError for anything else."""
        curves = {}
        for table in values["tables"]:
            group = Group(table["group_size"], table["per_node"])
            if table["collective"] not in COLLECTIVES:
                raise ValueError(f"collective is '{table['collective']}'; known are {', '.join(COLLECTIVES)}")
            if group.size < 2 or group.per_node < 1 or group.size % group.per_node:
                raise ValueError(f"a group of {group.size} devices cannot have {group.per_node} on each node")
            curves[table["collective"], group] = _checked(table["bytes_seconds"])
        copies = CopyRates(**values["copies"]) if "copies" in values else None
        for name, rate in copies._asdict().items() if copies else ():
            if not 0 < rate < math.inf:
                raise ValueError(f"{name} of copies is {rate}; it must be more than 0")
        return CommunicationTimes(dict(sorted(curves.items())), str(values["source"]), copies)


NO_TIMES = CommunicationTimes()


def interpolate(curve: Curve, size: float) -> float:
    """Seconds of a message of `size` bytes, on the line between its neighbours in the table.

    A smaller message than any takes as long as the smallest: that is latency. A larger one runs at the largest one's
    rate.
    """
    at = bisect_left(curve, size, key=lambda point: point[0])
    if at == 0:
        return curve[0][1]
    if at == len(curve):
        return curve[-1][1] * size / curve[-1][0]
    (below, faster), (above, slower) = curve[at - 1], curve[at]
    # Weighted so that both ends are exact.
    part = (size - below) / (above - below)
    return faster * (1 - part) + slower * part


def without_noise(points: Iterable[tuple[int, float]]) -> Curve:
    """Measured points as a curve. No message takes longer than a larger one: that can only be a disturbance."""
    curve: list[tuple[int, float]] = []
    least = math.inf
    for size, seconds in sorted(points, reverse=True):
        least = min(least, seconds)
        curve.append((size, least))
    return tuple(reversed(curve))


def _checked(points: Any) -> Curve:
    curve = tuple((int(size), float(seconds)) for size, seconds in points)
    if not curve or curve[0][0] < 1 or not 0 < curve[0][1] <= curve[-1][1] < math.inf:
        raise ValueError("a table needs points of positive bytes and seconds")
    if any(a[0] >= b[0] or not a[1] <= b[1] for a, b in pairwise(curve)):
        raise ValueError("the bytes of a table must rise from point to point, and the seconds not fall")
    return curve


def _ratio(a: float, b: float) -> float:
    return abs(math.log(a / b))
