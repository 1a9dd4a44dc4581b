"""What the planner knows of devices and links: bundled JSON files, with what was measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnscaler.errors import UserError
from nnscaler.hardware.communication import NO_TIMES, CommunicationTimes, Group, Link, Network, Timing
from nnscaler.hardware.local import is_kind, measured_on, measured_on_kind

if TYPE_CHECKING:  # who only asks for names need not wait for torch
    import torch

_WIDENED = 0.8  # of the rate in fp32, for products of 16 bits computed so: their inputs are copied (measured)
_SPECS = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Host:
    """The memory of a node's host, as far as one device has it to itself, and the way there.

    memory           bytes for each device
    to_host          bytes/s at which a device copies to the host
    to_device        bytes/s at which it copies back
    both_ways        bytes/s each way, when both go at once
    interference     seconds that computation loses for each second of such copies beside it
    both_ways_alone  bytes/s each way, when both go at once and no other device of the host copies; None: as `both_ways`
    """

    memory: float
    to_host: float
    to_device: float
    both_ways: float
    interference: float = 0.0
    both_ways_alone: float | None = None

    def alone(self) -> Host:
        """With the rates of a device beside which no other one of the host copies."""
        return replace(self, both_ways=self.both_ways_alone or self.both_ways, both_ways_alone=None)


@dataclass(frozen=True)
class Hardware:
    """One kind of device, in nodes of `devices_per_node`.

    memory            bytes of a device's memory
    memory_bandwidth  bytes/s that pointwise kernels reach, reads and writes counted together
    flops             name of a type, such as "bfloat16" -> peak dense FLOP/s by the data sheet
    efficiency        name of an operator, such as "aten.mm.default" -> the fraction of the peak that it reaches;
                      "default": for all others
    launch            seconds that an operator takes however small it is
    interference      seconds that computation loses for each second of communication beside it
    intra, inter      the links between devices of one node, and of different nodes
    workspaces        bytes of a device that libraries of kernels take for themselves, all the time or while they choose
                      among kernels in the first step
    host              the host's memory, which a plan may use too; None: there is none beside the device's, as for a CPU
    source            where these figures come from, for people
    borrowed          whether the rates are those of another kind of device, because none of this kind are known
    remark            what a user should know of the choice of these figures; empty: nothing
    profile           bundled times of collectives on this kind of hardware
    measured          times of collectives on this machine
    """

    name: str
    memory: float
    memory_bandwidth: float
    flops: Mapping[str, float]
    efficiency: Mapping[str, float]
    launch: float
    devices_per_node: int
    intra: Link
    inter: Link
    source: str
    interference: float = 0.0
    workspaces: float = 0.0
    host: Host | None = None
    borrowed: bool = False
    remark: str = ""
    profile: CommunicationTimes = NO_TIMES
    measured: CommunicationTimes = NO_TIMES

    def peak(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s of a device on this type, by its data sheet. None where that is not known."""
        return None if self.borrowed else self.flops.get(str(dtype).removeprefix("torch."))

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether a device has products of this type, as far as its data sheet is known."""
        return str(dtype).removeprefix("torch.") in self.flops

    def flops_per_second(self, operator: str, dtype: torch.dtype) -> float:
        """FLOP/s that an operator reaches on this type. A type without a figure counts as float32."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return peak * self.efficiency.get(operator, self.efficiency["default"])

    def collective_seconds(
        self, collective: str, size: float, group_size: int, spans_nodes: bool, per_node: int = 1
    ) -> Timing:
        """Time of a collective over `group_size` devices.

        collective   one of `nnscaler.hardware.communication.COLLECTIVES`
        size         bytes of the larger of one device's input and output; see that module
        spans_nodes  whether the group has devices of more than one node
        per_node     how many it has on each node, where it spans nodes
        """
        if group_size == 1:
            return Timing(0.0, "roofline")
        group = Group(group_size, per_node if spans_nodes else group_size)
        network = Network(self.intra, self.inter)
        if (seconds := self.measured.seconds(collective, size, group, network)) is not None:
            return Timing(seconds, "measured")
        if (seconds := self.profile.seconds(collective, size, group, network)) is not None:
            return Timing(seconds, "profile")
        return Timing(network.latency(group) + size * network.seconds_per_byte(collective, group), "roofline")

    def identity(self) -> str:
        """A short text that differs where anything differs that costs depend on, measurements on this machine
        included."""
        return f"{self.name} {hashlib.sha256(repr(replace(self, remark='')).encode()).hexdigest()[:16]}"


def hardware_names() -> list[str]:
    """The names of the bundled specifications."""
    return sorted(path.stem for path in _SPECS.glob("*.json"))


def find_hardware(name: str | None, devices_per_node: int | None = None) -> Hardware:
    """The hardware to plan for: the named one, or this computer's; and how many devices its nodes have.

    name              see `load_hardware`; None: this computer's
    devices_per_node  devices in a node; None: as many as torchrun started processes on each node, where it started
                      several nodes; else as many as this computer has, or as the named hardware says

    Raises UserError where there is no such hardware.
    """
    hardware = load_hardware(name) if name is not None else detect_hardware()
    here, everywhere = (int(os.environ.get(key, 1)) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if devices_per_node is None:
        devices_per_node = here if here < everywhere else hardware.devices_per_node
    return replace(hardware, devices_per_node=devices_per_node)


def load_hardware(name: str) -> Hardware:
    """The bundled specification of this name (case does not matter), or that in a JSON file.

    A bundled one comes with what was measured on this machine on a device of that kind. A file is taken as it is.
    Raises UserError for an unknown name, and for a file whose fields are not those of `Hardware`.
    """
    if name.endswith(".json") and Path(name).exists():
        return _read(Path(name))
    if name.lower() not in hardware_names():
        absent = ", which does not exist" if name.endswith(".json") else ""
        known = ", ".join(hardware_names())
        raise UserError(f"hardware is '{name}'{absent}; known are {known}, and paths of .json files")
    return _with_measured(_read(_bundled(name)), measured_on_kind(name))


def _with_measured(hardware: Hardware, measured: CommunicationTimes) -> Hardware:
    """Hardware with what was measured on this machine, which comes before what is bundled."""
    host = hardware.host
    if host is not None and measured.copies is not None:
        host = replace(host, **measured.copies._asdict(), both_ways_alone=None)
    return replace(hardware, measured=measured, host=host)


def device_name() -> str:
    """The name that this process's device gives itself."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def host_memory() -> int:
    """Bytes of this computer's memory, or of what a container may use of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory


def detect_hardware() -> Hardware:
    """The specification of this machine's GPUs, or of its CPU, with what was measured on it.

    Memory and the number of devices are those of the machine. A device of a kind that is not bundled takes the rates of
    the bundled kind that is most like it; `remark` says so.
    """
    import torch

    device = device_name()
    if not torch.cuda.is_available():
        remark = "planning for this computer's CPU, as it has no GPU; --hardware plans for another device"
        cpu = _read(_bundled("cpu"))
        flops = {**cpu.flops, **_flops_in_fp32(cpu)}
        return replace(cpu, memory=float(host_memory()), flops=flops, measured=measured_on(device), remark=remark)
    kinds = [name for name in hardware_names() if is_kind(name, device)]
    hardware = _read(_bundled(kinds[-1] if kinds else _most_alike()))
    remark, name = "", hardware.name
    if not kinds:
        name = f"{device} with the rates of {hardware.name}"
        remark = (
            f"no figures of {device} are bundled: planning with the rates of {hardware.name} and this device's memory; "
            "--hardware FILE.json gives other rates, nnscaler.profiler.benchmark_comm measures communication"
        )
    elif _OTHER_BOARD.search(device):
        remark = (
            f"the bundled figures of {hardware.name} are those of its SXM board, and {device} may be slower, also from "
            "device to device: nnscaler.profiler.benchmark_comm measures communication"
        )
    devices = torch.cuda.device_count()
    host = None if hardware.host is None else replace(hardware.host, memory=host_memory() / devices)
    here = replace(
        hardware,
        name=name,
        memory=float(torch.cuda.get_device_properties().total_memory),
        host=host,
        devices_per_node=devices,
        borrowed=not kinds,
        remark=remark,
    )
    return _with_measured(here, measured_on(device))


# A board of the same chip with other links and rates; or a part of one.
_OTHER_BOARD = re.compile(r"\b(PCIe|NVL|MIG)\b", re.IGNORECASE)


def _flops_in_fp32(cpu: Hardware) -> dict[str, float]:
    """The rates of types in which this CPU is slow. Such products are computed in fp32
    (`nnscaler.kernels.products`)."""
    import torch

    from nnscaler.kernels.products import are_slow

    slow = [name for name in cpu.flops if are_slow(torch.device("cpu"), getattr(torch, name))]
    return dict.fromkeys(slow, _WIDENED * cpu.flops["float32"])


def _most_alike() -> str:
    """The bundled kind whose rates an unknown GPU takes, by maker and generation."""
    import torch

    if torch.version.hip:
        return "mi300x"
    return "h200" if torch.cuda.get_device_capability() >= (9, 0) else "a100"


def _bundled(name: str) -> Path:
    return _SPECS / f"{name.lower()}.json"


def _read(path: Path) -> Hardware:
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["intra"], fields["inter"] = Link(**fields["intra"]), Link(**fields["inter"])
        fields["host"] = _host_of(fields["host"]) if fields.get("host") else None
        for times in {"profile", "measured"} & set(fields):
            fields[times] = CommunicationTimes.from_json(fields[times])
        hardware = Hardware(**fields)
        _check(hardware)
        return hardware
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"hardware file '{path}' does not describe a machine ({error}); see {_SPECS}") from error


def _host_of(given: Any) -> Host:
    """The host that a file describes. Raises ValueError where it is none, or fields are missing or unknown."""
    wanted = {one.name: one.default is MISSING for one in dataclass_fields(Host)}
    if not isinstance(given, dict) or not given.keys() <= wanted.keys():
        raise ValueError(f"host is {given}; it must have the fields {', '.join(wanted)}")
    if missing := [name for name, needed in wanted.items() if needed and name not in given]:
        raise ValueError(f"host has no {' and no '.join(missing)}")
    return Host(**given)


def _host(hardware: Hardware) -> dict[str, float]:
    return {} if hardware.host is None else {k: v for k, v in asdict(hardware.host).items() if v is not None}


def _check(hardware: Hardware) -> None:
    """Raises ValueError for a figure that no machine has."""
    more_than_0 = {
        "memory": hardware.memory,
        "memory_bandwidth": hardware.memory_bandwidth,
        "flops of float32": hardware.flops["float32"],
        "efficiency by default": hardware.efficiency["default"],
        **{f"flops of {dtype}": rate for dtype, rate in hardware.flops.items()},
        **{f"efficiency of {operator}": part for operator, part in hardware.efficiency.items()},
        "bandwidth of intra": hardware.intra.bandwidth,
        "bandwidth of inter": hardware.inter.bandwidth,
        "devices_per_node": hardware.devices_per_node,
        **{f"{name} of host": value for name, value in _host(hardware).items() if name != "interference"},
    }
    least_0 = {
        "launch": hardware.launch,
        "workspaces": hardware.workspaces,
        "interference": hardware.interference,
        "latency of intra": hardware.intra.latency,
        "latency of inter": hardware.inter.latency,
        **{f"{name} of host": value for name, value in _host(hardware).items() if name == "interference"},
    }
    for allowed, figures in (("more than 0", more_than_0), ("at least 0", least_0)):
        for name, figure in figures.items():
            if not isinstance(figure, (int, float)):
                raise ValueError(f"{name} is {figure!r}; it must be a number, {allowed}")
            if not 0 <= figure < math.inf or (figure == 0 and figures is more_than_0):
                raise ValueError(f"{name} is {figure}; it must be {allowed}")
    losses = {"interference": hardware.interference, "interference of host": _host(hardware).get("interference", 0.0)}
    for name, loss in losses.items():
        if loss > 1:
            raise ValueError(f"{name} is {loss}; it must be at most 1: of a second, no more than a second is lost")
    if hardware.devices_per_node != int(hardware.devices_per_node):
        raise ValueError(f"devices_per_node is {hardware.devices_per_node}; it must be a whole number")
