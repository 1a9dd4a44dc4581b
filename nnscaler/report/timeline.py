"""The simulated step of a pipeline as a picture: a row for each rank, a rectangle for each micro-batch in a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.report.charts import swatch
from nnscaler.report.markup import Markup, tag
from nnscaler.report.spelling import percent, seconds

KINDS = {
    "F": ("forward", "#3d6fb4"),
    "B": ("backward", "#e3a83b"),
    "I": ("backward, for the stage's input", "#e3a83b"),
    "W": ("backward, for the stage's weights", "#2d9c8f"),
}
_UPDATE = ("update of parameters", "#8a8f98")
_ROW, _BAR, _LEFT, _RIGHT, _BELOW = 26, 20, 60, 30, 22  # units of the picture, which is as wide as the page
_WIDTH = 1132
_MARKS = 4  # into which the step is divided below the rows


def timeline(values: Mapping[str, Any]) -> Iterator[Markup]:
    """The picture and its legend, from the values of a pipeline's plan.json."""
    pipeline, end = values["pipeline"], values["predicted"]["step_seconds"]
    ranks, spans = pipeline["schedule"]["ranks"], list(drawn(pipeline))
    scale = (_WIDTH - _LEFT - _RIGHT) / end
    stages = [sorted({stage for rank, _, stage, *_ in spans if rank == row}) for row in range(ranks)]
    rows = [tag("text", f"rank {rank}", x=0, y=rank * _ROW + 15) for rank in range(ranks)]
    rectangles = (_rectangle(span, scale, stages[span[0]].index(span[2]) / len(stages[span[0]])) for span in spans)
    update = values["predicted"]["update_seconds"]
    last = _update(end - update, end, scale, ranks)
    height = ranks * _ROW + _BELOW
    yield tag(
        "svg", *rows, *rectangles, last, *_marks(end, scale, ranks * _ROW), xmlns="http://www.w3.org/2000/svg",
        width=_WIDTH, height=height, viewBox=f"0 0 {_WIDTH} {height}", class_="timeline",
    )  # fmt: skip
    kinds = {kind for _, kind, *_ in spans}
    several = [tag("li", tag("span", "paler: a rank's later stages"))] if any(len(own) > 1 for own in stages) else []
    entries = [entry for kind, entry in KINDS.items() if kind in kinds]
    legend = [tag("li", swatch(colour), tag("span", name)) for name, colour in [*entries, _UPDATE]]
    yield tag("ul", *legend, *several, class_="legend")
    computing = ", ".join(f"rank {rank} {percent(share)}" for rank, share in enumerate(pipeline["computing"]))
    text = f"The step ends after {seconds(end)}, the last {seconds(update)} of which update parameters."
    yield tag("p", f"{text} Of it, ranks compute: {computing}. trace.json shows the same in Perfetto.", class_="faint")


def drawn(pipeline: Mapping[str, Any]) -> Iterator[list[Any]]:
    """[rank, kind, stage, micro-batch, begin, end] of what takes time; times in seconds.

    Where a stage does not split its backward, the first part ("I") is all of it, and is drawn as "B".
    """
    for rank, kind, stage, micro_batch, start, end in pipeline["timeline"]:
        if end > start:
            whole = kind == "I" and not pipeline["splits"][stage]
            yield [rank, "B" if whole else kind, stage, micro_batch, start, end]


def _rectangle(span: list[Any], scale: float, paleness: float) -> Markup:
    """One rectangle. `paleness`: 0 for a rank's first stage, rising towards 1 for its last"""
    rank, kind, stage, micro_batch, start, end = span
    text = f"{KINDS[kind][0]}, stage {stage}, micro-batch {micro_batch}: {seconds(end - start)} from {seconds(start)}"
    gap = min(0.5, 0.2 * (end - start) * scale)
    return tag(
        "rect", tag("title", text), x=f"{_LEFT + start * scale:.2f}", y=rank * _ROW,
        width=f"{(end - start) * scale - gap:.2f}", height=_BAR, fill=KINDS[kind][1],
        **{"fill-opacity": f"{1 - 0.6 * paleness:.2f}"},
    )  # fmt: skip


def _update(start: float, end: float, scale: float, ranks: int) -> Markup:
    """The optimizer's update, on all ranks at once."""
    left, width = _LEFT + start * scale, max((end - start) * scale, 1.0)
    below = (ranks - 1) * _ROW + _BAR
    path = f"M{left:.2f} 0h{width:.2f}v{below}h{-width:.2f}z"
    return tag("path", tag("title", f"{_UPDATE[0]}: {seconds(end - start)}"), d=path, fill=_UPDATE[1])


def _marks(end: float, scale: float, top: int) -> Iterator[Markup]:
    """Times below the rows; the last is the step's end."""
    for index in range(_MARKS + 1):
        x = _LEFT + index * end / _MARKS * scale
        yield tag("path", d=f"M{x:.2f} 0v{top + 4}", class_="time")
        text = seconds(index * end / _MARKS) if index else "0"
        yield tag("text", text, x=f"{x:.2f}", y=top + 18, **{"text-anchor": "middle"})
