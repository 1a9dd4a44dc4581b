"""What differs between two plans: totals by category, recompute levels and placements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nnscaler.errors import UserError
from nnscaler.report.categories import COPIES_HIDDEN
from nnscaler.report.spelling import devices, gib, seconds, three_digits


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """A text on two plans: their figures side by side, then what they lay out differently.

    a, b  the values of their plan.json. Raises UserError where one is a pipeline.
    """
    if "pipeline" in a or "pipeline" in b:
        raise UserError("plans with a pipeline cannot be compared; nnscaler.report explains each by itself")
    lines = [
        f"{'':<36} {'A':>12} {'B':>12} {'B / A':>8}",
        *_figures(a["predicted"], b["predicted"]),
        *_differing("setting", _settings(a), _settings(b)),
        *_differing("recompute", _levels(a), _levels(b)),
        *_differing("placement", _placements(a), _placements(b)),
        *_differing("parameter", _parameters(a), _parameters(b)),
    ]
    return "\n".join(lines)


def _figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    yield _row("step", a["step_seconds"], b["step_seconds"], seconds)
    rate = "tokens_per_second_per_gpu"
    if rate in a and rate in b:
        yield _row("tokens/s/GPU", a[rate], b[rate], three_digits)
    for group in ("seconds_by_category", "hidden_seconds"):
        yield from _rows(a[group], b[group], seconds)
    before, after = ({COPIES_HIDDEN: one.get("hidden_copies_seconds", 0.0)} for one in (a, b))
    yield from _rows(before, after, seconds)
    yield _row("memory a device", a["memory_bytes"], b["memory_bytes"], gib)
    yield from _rows(a["bytes_by_category"], b["bytes_by_category"], gib)
    if a.get("host_bytes") or b.get("host_bytes"):
        yield _row("memory of the host a device", a.get("host_bytes", 0.0), b.get("host_bytes", 0.0), gib)
        yield from _rows(a.get("host_bytes_by_category", {}), b.get("host_bytes_by_category", {}), gib)


def _rows(a: Mapping[str, float], b: Mapping[str, float], write: Callable[[float], str]) -> Iterator[str]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) or b.get(name):
            yield _row(f"  {name}", a.get(name, 0.0), b.get(name, 0.0), write)


def _row(name: str, a: float, b: float, write: Callable[[float], str]) -> str:
    ratio = f"{b / a:.3f}" if a else "new"
    return f"{name:<36} {write(a):>12} {write(b):>12} {ratio:>8}"


def _settings(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        "mesh": devices(values),
        "hardware": values["hardware"],
        "micro-batches": str(values["micro_batches"]),
        "memory limit": gib(values["predicted"]["memory_limit_bytes"]),
        "limit of the host": gib(values["predicted"].get("host_limit_bytes", 0.0)),
    }


def _levels(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: ", ".join(f"{level['calls']} {what}" for what, level in sorted(block["levels"].items()))
        for name, block in values["costs"].items()
    }


def _placements(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{name}.{unit['name']}": f"{', '.join(unit['inputs'].values())} -> {', '.join(unit['outputs'].values())}"
        for name, block in values["costs"].items()
        for unit in block["units"]
        if "name" in unit
    }


def _parameters(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{name}.{one['tensor']}": f"{one['layout']}{', fp32' if one['master_only'] else ''}"
        for name, block in values["costs"].items()
        for one in block["parameters"]
    }


def _differing(what: str, a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """A line for each name whose values differ; or one line that says that none does."""
    differing = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    if not differing:
        return [f"{what}: no difference"]
    return [f"{what} {name}: {a.get(name, 'none')}  |  {b.get(name, 'none')}" for name in differing]
