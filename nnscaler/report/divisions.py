"""The ways to divide a step's sequences that the planner considered: the fastest, and why others lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import Any

from nnscaler.batch import Division
from nnscaler.division_search import Divided, Tried
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.spelling import gib, or_blank, percent, seconds

SHOWN = 8  # of them
HEAD = ("copies x devices", "micro-batches", "a step", "tokens/s/GPU", "memory", "")
Row = Mapping[str, Any]


def division_rows(divided: Divided, length: int) -> list[dict[str, Any]]:
    """A row for each, as plain values: that of the plan first, then the fastest.

    copies, plan_ngpus, micro_batch_size, micro_batches, pipeline  what it is
    step_seconds, tokens_per_second_per_gpu, memory_bytes          predicted; None: it has no plan
    bound_seconds  of a step, where there is no plan: none takes less on a mesh that was looked at; None: none fits, or
                   that is not known
    why            it lost; of the first, that it is the fastest

    length  tokens of a sequence; 0: sequences are not made of tokens
    """
    first, limit = divided.tried[0], divided.plan.memory_limit
    devices = divided.config.runtime_ngpus
    rows = []
    for one in divided.tried:
        division, plan = one.division, one.plan
        copies = devices // division.plan_ngpus
        sequences = copies * division.micro_batch_size * division.micro_batches
        rows.append(
            {
                **asdict(division),
                "copies": copies,
                "pipeline": one.pipeline,
                "step_seconds": one.step_seconds if plan else None,
                "tokens_per_second_per_gpu": sequences * length / one.step_seconds / devices if plan else None,
                "memory_bytes": plan.memory_bytes if plan else None,
                "bound_seconds": one.bound if not plan and 0 < one.bound < inf else None,
                "why": _why(one, first, limit),
            }
        )
    return rows


def _why(one: Tried, first: Tried, limit: float) -> str:
    """Why a division lost against the first."""
    if one is first:
        return "chosen"
    if one.refusal:
        return one.refusal
    if one.needed is not None:
        return f"does not fit: {gib(max(0.0, one.needed - limit))} too much, or more"
    if one.plan is None and not one.bound:
        return "no faster plan was found" if one.pipeline else "not tried: time was out"
    known, least = (one.bound, "at least ") if one.plan is None else (one.step_seconds, "")
    change = known / first.step_seconds - 1
    if one.plan is not None and change < 0:
        return f"{percent(-change)} faster, which is too little for {_more(one.division, first)}"
    if change <= 0:
        return "no faster plan was found"
    unseen = " on one mesh: time was out for others" if one.plan is None and one.left else ""
    return f"{least}{percent(change)} slower{unseen}"


def _more(division: Division, first: Tried) -> str:
    """In what a division is less simple than the first."""
    if division.plan_ngpus > first.division.plan_ngpus:
        return "more devices a copy"
    return "larger micro-batches" if division.micro_batch_size > first.division.micro_batch_size else "a pipeline"


def shown(values: Mapping[str, Any]) -> list[list[str]]:
    """The first rows of the table, as texts in the order of HEAD."""
    return [
        [
            f"{row['copies']} x {row['plan_ngpus']}{', pipeline' if row['pipeline'] else ''}",
            f"{row['micro_batches']} of {row['micro_batch_size']}",
            seconds(row["step_seconds"]) if row["step_seconds"] else or_blank(row["bound_seconds"] or 0.0, _least),
            or_blank(row["tokens_per_second_per_gpu"] or 0.0, lambda speed: f"{speed:,.0f}"),
            or_blank(row["memory_bytes"] or 0.0, gib),
            row["why"],
        ]
        for row in values["divisions"][:SHOWN]
    ]


def _least(value: float) -> str:
    return f"≥ {seconds(value)}"


def division_lines(values: Mapping[str, Any]) -> list[str]:
    """The table as lines of text; none where the planner did not choose."""
    if "divisions" not in values:
        return []
    rows = [list(HEAD), *shown(values)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    rest = len(values["divisions"]) - SHOWN
    return [*lines, *([f"{rest} more in plan.json"] if rest > 0 else [])]


def division_section(values: Mapping[str, Any]) -> Sequence[Markup]:
    """The table for plan.html; nothing where the planner did not choose."""
    if "divisions" not in values:
        return []
    head = [*(f">{name}" for name in HEAD[:-1]), "why"]
    note = "Each copy trains on its own sequences. Others that were considered are in plan.json."
    rows: list[list[object]] = [list(row) for row in shown(values)]
    return [tag("section", tag("h2", "How the batch is divided"), table(head, rows), tag("p", note, class_="faint"))]
