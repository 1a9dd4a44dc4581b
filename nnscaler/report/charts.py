"""Headline figures, and stacked bars with legends, made of plain HTML and inline styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nnscaler.report.categories import (
    BUFFERS,
    COPIES_HIDDEN,
    EXPOSED,
    HIDDEN,
    MATMUL,
    MEMORY_BOUND,
    OPTIMIZER,
    RECOMPUTE,
    WORKING,
)
from nnscaler.report.markup import Markup, tag
from nnscaler.report.spelling import CAUSAL_MFU, FULL_MFU, above_peak, gib, percent, seconds

_COLOURS = {
    MATMUL: "#3d6fb4",
    MEMORY_BOUND: "#e3a83b",
    RECOMPUTE: "#d0564d",
    EXPOSED: "#2d9c8f",
    HIDDEN: "#a9d8d0",
    COPIES_HIDDEN: "#b9d9a8",
    OPTIMIZER: "#8a8f98",
    "parameters": "#3d6fb4",
    "gradients": "#6f97cf",
    "master weights": "#8a8f98",
    "moments": "#b7bbc2",
    WORKING: "#d0564d",
    BUFFERS: "#2d9c8f",
}
_OTHERS = ("#7b57b2", "#b06fb5", "#57a55a", "#9ac26b", "#c98f6b", "#5e6f8f")  # operators by name, and recompute levels


def colours(names: Mapping[str, float]) -> dict[str, str]:
    """A colour for each category. Those that have none of their own take the next free one."""
    free = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(free) for name in names}


def bar(parts: Mapping[str, float], whole: float, write: Callable[[float], str]) -> Markup:
    """A bar of `parts`, each as long as its share of `whole`. `write`: how a value is written"""
    paint = colours(parts)
    return tag(
        "div",
        *(
            tag(
                "span", "", title=f"{name}: {write(value)}",
                style=f"width:{100 * value / whole:.3f}%;background:{paint[name]}",
            )
            for name, value in parts.items()
            if value
        ),
        class_="bar",
    )  # fmt: skip


def legend(parts: Mapping[str, float], whole: float, write: Callable[[float], str]) -> Markup:
    """The colour, name, value and share of `whole` of each part."""
    paint = colours(parts)
    return tag(
        "ul",
        *(
            tag(
                "li",
                swatch(paint[name]),
                tag("span", name),
                tag("b", write(value)),
                tag("span", percent(value / whole), class_="faint"),
            )
            for name, value in parts.items()
            if value
        ),
        class_="legend",
    )


def swatch(colour: str) -> Markup:
    """A small square of a colour."""
    return tag("i", "", style=f"background:{colour}")


def mark(at: float, text: str) -> Markup:
    """A line across the bar above it, at a fraction of its length."""
    return tag("div", tag("span", text), class_="mark", style=f"left:{100 * at:.3f}%")


def headline(predicted: Mapping[str, Any], memory: str, time: str = "step") -> Markup:
    """The most important figures, as cards. `memory` and `time` are the names of two of them."""
    cards = [(time, seconds(predicted["step_seconds"])), (memory, gib(predicted["memory_bytes"]))]
    if "mfu" in predicted:
        cards = [(CAUSAL_MFU, percent(predicted["mfu_causal"])), *cards, (FULL_MFU, percent(predicted["mfu"]))]
    if "tokens_per_second_per_gpu" in predicted:
        cards = [("tokens/s a device", f"{predicted['tokens_per_second_per_gpu']:,.0f}"), *cards]
    row = tag("div", *(tag("div", tag("b", value), tag("span", name)) for name, value in cards), class_="cards")
    why = above_peak(predicted)
    return Markup(row + tag("p", f"MFU {why}.", class_="faint")) if why else row
