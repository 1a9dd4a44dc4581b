"""Specifications of devices and links: bundled as JSON, and joined by what was measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnscaler.errors import UserError
from nnscaler.hardware.communication import NO_TIMES, CommunicationTimes, Estimate, Group, Link, Network
from nnscaler.hardware.local import measured_on, measured_on_kind

_SPECS = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Hardware:
    """One kind of device in nodes of `devices_per_node`.

    memory            bytes of device memory
    memory_bandwidth  bytes/s that pointwise kernels reach, reads and writes together
    flops             dtype name -> peak dense FLOP/s by the data sheet
    efficiency        operator name -> fraction of the peak that is reached; `default` for those not named
    launch            seconds that an operator takes however small it is
    interference      seconds that computation loses for each second of communication beside it
    intra, inter      the links between devices of a node, and of different nodes
    source            where the figures come from
    profile           how long collectives take on this kind of hardware
    measured          how long they took on this machine
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
    profile: CommunicationTimes = NO_TIMES
    measured: CommunicationTimes = NO_TIMES

    def flops_per_second(self, operator: str, dtype: torch.dtype) -> float:
        """FLOP/s that `operator` reaches on `dtype`; a type without a figure runs as float32."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return peak * self.efficiency.get(operator, self.efficiency["default"])

    def collective_seconds(
        self, collective: str, size: float, group_size: int, spans_nodes: bool, per_node: int = 1
    ) -> Estimate:
        """How long a collective of `size` bytes over `group_size` devices takes, and what says so.

        collective   one of `nnscaler.hardware.communication.COLLECTIVES`
        size         bytes of the larger of one device's input and output (see that module)
        spans_nodes  whether the group has devices of more than one node
        per_node     how many it has on each node, where it spans nodes
        """
        if group_size == 1:
            return Estimate(0.0, "roofline")
        group = Group(group_size, per_node if spans_nodes else group_size)
        network = Network(self.intra, self.inter)
        if (seconds := self.measured.seconds(collective, size, group, network)) is not None:
            return Estimate(seconds, "measured")
        if (seconds := self.profile.seconds(collective, size, group, network)) is not None:
            return Estimate(seconds, "profile")
        return Estimate(network.latency(group) + size * network.seconds_per_byte(collective, group), "roofline")

    def identity(self) -> str:
        """A short text that differs where anything differs that costs depend on, what was measured here included."""
        return f"{self.name} {hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"


def hardware_names() -> list[str]:
    return sorted(path.stem for path in _SPECS.glob("*.json"))


def load_hardware(name: str) -> Hardware:
    """The bundled specification of `name` (case does not matter), or the one in a JSON file of that path.

    A bundled one comes with what was measured on a device of its name on this machine; a file is taken as it is.
    Raises UserError for what is neither, and for a file whose fields are not those of `Hardware`.
    """
    bundled = not name.endswith(".json")
    path = _bundled(name) if bundled else Path(name)
    if not path.exists():
        raise UserError(f"hardware is '{name}'; known are {', '.join(hardware_names())}, and paths of .json files")
    hardware = _read(path)
    return replace(hardware, measured=measured_on_kind(name)) if bundled else hardware


def device_name() -> str:
    """What this process's device calls itself."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def detect_hardware() -> Hardware:
    """The specification of this machine's accelerator, or of its CPU, with what was measured on it.

    A device's memory is what the device says; one of a kind that is not bundled is taken for an A100.
    """
    device = device_name()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties().total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = [name for name in hardware_names() if name in device.lower().replace(" ", "")]
    hardware = _read(_bundled(known[-1] if known else "a100"))
    return replace(hardware, memory=float(memory), measured=measured_on(device))


def _bundled(name: str) -> Path:
    return _SPECS / f"{name.lower()}.json"


def _read(path: Path) -> Hardware:
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["intra"], fields["inter"] = Link(**fields["intra"]), Link(**fields["inter"])
        for times in {"profile", "measured"} & set(fields):
            fields[times] = CommunicationTimes.from_json(fields[times])
        return Hardware(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"hardware file '{path}' does not describe a machine ({error}); see {_SPECS}") from error
