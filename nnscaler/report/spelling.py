"""How a report writes seconds, bytes, shares and layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nnscaler.mesh import devices_text
from nnscaler.plan import GIB

LEGEND = {
    "S(d)": "each device holds a slice along dimension d",
    "R": "each device holds the whole",
    "R*": "each device holds the whole, and a part of the sum that is its gradient",
    "P": "each device holds a part of a sum",
}


def seconds(value: float) -> str:
    """Seconds, such as `9.64 s`, `12.3 ms` or `45 µs`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{three_digits(value / factor)} {unit}"
    return f"{three_digits(value * 1e6)} µs"


def or_blank(value: float, write: Callable[[float], str]) -> str:
    """The value as `write` writes it; nothing for zero, in the cells of a table."""
    return write(value) if value else ""


def gib(size: float) -> str:
    """Bytes, such as `29.1 GiB`, `512 MiB` or `4 B`."""
    if size >= GIB:
        return f"{three_digits(size / GIB)} GiB"
    for factor, unit in ((2.0**20, "MiB"), (2.0**10, "KiB")):
        if size >= factor:
            return f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def percent(share: float, digits: int = 1) -> str:
    """A share, such as `48.1 %`."""
    return f"{100 * share:.{digits}f} %"


def three_digits(value: float) -> str:
    """A number, such as `9.64`, `12.3` or `1234`, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def devices(values: Mapping[str, Any]) -> str:
    """The devices of a plan, such as `2 copies x 8 devices` or `1 copy x 4 pipeline ranks x 2 outer x 4 inner
    devices`."""
    copies = values["mesh"]["replicas"]
    parts = ["1 copy" if copies == 1 else f"{copies} copies"]
    ranks = [values["mesh"]["sizes"]]
    if "pipeline" in values:
        of_ranks = {stage["rank"]: own["mesh"] for stage, own in zip(values["pipeline"]["stages"], values["stages"])}
        parts.append(f"{len(of_ranks)} pipeline ranks")
        ranks = [mesh["sizes"] for _, mesh in sorted(of_ranks.items())]
    several_axes = all(len(sizes) > 1 for sizes in ranks)
    return " x ".join([*parts, devices_text(ranks)]) + " devices" * several_axes


CAUSAL_MFU = "MFU, attention halved by causality"
FULL_MFU = "MFU by the document's formula, attention in full"


def above_peak(predicted: Mapping[str, Any]) -> str:
    """Why a device seems to do more than it can, where it does; else nothing."""
    why = "above 100 %: every weight counts as multiplied, those of an embedding too, and fp8 by the peak in bf16"
    return why if predicted.get("mfu_causal", 0.0) > 1 else ""


def step(predicted: Mapping[str, Any]) -> str:
    """`3,587 tokens/s/GPU, causal MFU 54.9 % (92.2 % by the document's formula), 18.3 s a step`, as far as known."""
    parts = []
    if "tokens_per_second_per_gpu" in predicted:
        parts.append(f"{predicted['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU")
    if "mfu" in predicted:
        causal, full = percent(predicted["mfu_causal"]), percent(predicted["mfu"])
        why = above_peak(predicted)
        parts.append(f"causal MFU {causal} ({full} by the document's formula{why and '; ' + why})")
    return ", ".join([*parts, f"{seconds(predicted['step_seconds'])} a step"])


def short_name(op: str) -> str:
    """An operator's name in short: `linear` for the overload `aten.linear.default`."""
    return op.removeprefix("aten.").removeprefix("nnscaler.").partition(".")[0]
