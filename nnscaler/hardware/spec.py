"""Specifications of devices and links, bundled as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnscaler.errors import UserError

_SPECS = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Link:
    """What one device sends over a link in a collective.

    bandwidth  bytes/s that a device sends, and receives, once messages are large
    latency    seconds that a collective takes however small it is
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """One kind of device in nodes of `devices_per_node`.

    memory            bytes of device memory
    memory_bandwidth  bytes/s that pointwise kernels reach, reads and writes together
    flops             dtype name -> peak dense FLOP/s by the data sheet
    efficiency        operator name -> fraction of the peak that is reached; `default` for those not named
    launch            seconds that an operator takes however small it is
    intra, inter      the links between devices of a node, and of different nodes
    source            where the figures come from
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

    def flops_per_second(self, operator: str, dtype: torch.dtype) -> float:
        """FLOP/s that `operator` reaches on `dtype`; a type without a figure runs as float32."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return peak * self.efficiency.get(operator, self.efficiency["default"])


def hardware_names() -> list[str]:
    return sorted(path.stem for path in _SPECS.glob("*.json"))


def load_hardware(name: str) -> Hardware:
    """The bundled specification of `name` (case does not matter), or the one in a JSON file of that path.

    Raises UserError for what is neither, and for a file whose fields are not those of `Hardware`.
    """
    path = Path(name) if name.endswith(".json") else _SPECS / f"{name.lower()}.json"
    if not path.exists():
        raise UserError(f"hardware is '{name}'; known are {', '.join(hardware_names())}, and paths of .json files")
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["intra"], fields["inter"] = Link(**fields["intra"]), Link(**fields["inter"])
        return Hardware(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"hardware file '{path}' does not describe a machine ({error}); see {_SPECS}") from error


def detect_hardware() -> Hardware:
    """The specification of this machine's accelerator, or of its CPU.

    A device's memory is what the device says; one of a kind that is not bundled is taken for an A100.
    """
    if not torch.cuda.is_available():
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return _with_memory(load_hardware("cpu"), pages * page)
    properties = torch.cuda.get_device_properties(0)
    known = [name for name in hardware_names() if name in properties.name.lower().replace(" ", "")]
    return _with_memory(load_hardware(known[-1] if known else "a100"), properties.total_memory)


def _with_memory(hardware: Hardware, memory: float) -> Hardware:
    return Hardware(**{**vars(hardware), "memory": float(memory)})
