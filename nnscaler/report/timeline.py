"""The simulated step of a pipeline as a picture: a row a rank, a rectangle for each micro-batch's work in a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.report.charts import swatch
from nnscaler.report.markup import Markup, tag
from nnscaler.report.spelling import percent, seconds

_KINDS = {
    "F": ("forward", "#3d6fb4"),
    "B": ("backward", "#e3a83b"),
    "I": ("backward, for the stage's input", "#e3a83b"),
    "W": ("backward, for the stage's weights", "#2d9c8f"),
}
_ROW, _BAR, _LEFT = 26, 20, 60  # pixels
_NARROWEST, _LEAST = 12, 1100  # pixels of a rectangle on average, and of the whole


def timeline(pipeline: Mapping[str, Any]) -> Iterator[Markup]:
    """The picture and its legend. `pipeline`: that part of a plan.json."""
    ranks, spans = pipeline["schedule"]["ranks"], list(_drawn(pipeline))
    end = max(span[5] for span in spans)
    scale = max(_LEAST, _NARROWEST * len(spans) / ranks) / end
    width = _LEFT + end * scale
    stages = [sorted({stage for rank, _, stage, *_ in spans if rank == row}) for row in range(ranks)]
    rows = [tag("text", f"rank {rank}", x=0, y=rank * _ROW + 15) for rank in range(ranks)]
    rectangles = (_rectangle(span, scale, stages[span[0]].index(span[2]) / len(stages[span[0]])) for span in spans)
    picture = tag(
        "svg", *rows, *rectangles, xmlns="http://www.w3.org/2000/svg", width=f"{width:.0f}", height=ranks * _ROW,
        viewBox=f"0 0 {width:.0f} {ranks * _ROW}", class_="timeline",
    )  # fmt: skip
    yield tag("div", picture, class_="scroll")
    drawn = {kind for _, kind, *_ in spans}
    several = [tag("li", tag("span", "paler: a rank's later stages"))] if any(len(own) > 1 for own in stages) else []
    entries = [tag("li", swatch(colour), tag("span", name)) for kind, (name, colour) in _KINDS.items() if kind in drawn]
    yield tag("ul", *entries, *several, class_="legend")
    computing = ", ".join(f"rank {rank} {percent(share)}" for rank, share in enumerate(pipeline["computing"]))
    yield tag("p", f"{seconds(end)}. Of the whole step, ranks compute: {computing}.", class_="faint")


def _drawn(pipeline: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The work that takes time. Where a stage does not split backward, its first part is all of it."""
    for rank, kind, stage, micro_batch, start, end in pipeline["timeline"]:
        if end > start:
            whole = kind == "I" and not pipeline["splits"][stage]
            yield [rank, "B" if whole else kind, stage, micro_batch, start, end]


def _rectangle(span: list[Any], scale: float, paleness: float) -> Markup:
    """`paleness`: 0 for a rank's first stage, towards 1 for its last."""
    rank, kind, stage, micro_batch, start, end = span
    text = f"{_KINDS[kind][0]}, stage {stage}, micro-batch {micro_batch}: {seconds(end - start)} from {seconds(start)}"
    return tag(
        "rect", tag("title", text), x=f"{_LEFT + start * scale:.1f}", y=rank * _ROW,
        width=f"{max((end - start) * scale - 0.5, 0.5):.1f}", height=_BAR, fill=_KINDS[kind][1],
        **{"fill-opacity": f"{1 - 0.6 * paleness:.2f}"},
    )  # fmt: skip
