"""The simulated step of a pipeline for chrome://tracing and https://ui.perfetto.dev, with a row for each rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.report.timeline import KINDS, drawn

MICROSECONDS = 1e6


def chrome_trace(values: Mapping[str, Any]) -> dict[str, Any]:
    """Trace events in the format that both programs read, from the values of a pipeline's plan.json."""
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(values))}


def _events(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    predicted, ranks = values["predicted"], values["pipeline"]["schedule"]["ranks"]
    yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "simulated step"}}
    for rank in range(ranks):
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}}
    for rank, kind, stage, micro_batch, start, end in drawn(values["pipeline"]):
        facts = {"stage": stage, "micro-batch": micro_batch}
        yield _span(rank, f"{KINDS[kind][0]} {micro_batch}", start, end, facts)
    end = predicted["step_seconds"]
    for rank in range(ranks):
        yield _span(rank, "update of parameters", end - predicted["update_seconds"], end, {})


def _span(rank: int, name: str, start: float, end: float, facts: Mapping[str, int]) -> dict[str, Any]:
    times = {"ts": round(start * MICROSECONDS, 3), "dur": round((end - start) * MICROSECONDS, 3)}
    return {"ph": "X", "pid": 0, "tid": rank, "name": name, **times, "args": dict(facts)}
