"""Pipelines whose stages run backward in two parts: where that is faster it is planned, where it does not fit it is
not."""

from __future__ import annotations

import re

import pytest

from nnscaler.mesh import Mesh
from nnscaler.pipeline import search
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, find_pipeline
from nnscaler.planner.later import WAITING
from nnscaler.report.pipeline import pipeline_report, pipeline_sections
from nnscaler.report.spelling import seconds
from tests.pipeline.test_cut import llama
from tests.pipeline.test_search import hardware


def found(folder, wanted: Wanted, **given) -> PipelinePlan:
    plan = find_pipeline(llama(8), [Mesh((2,))], hardware(folder), wanted, micro_batches=4, fused=True, **given)
    assert isinstance(plan, PipelinePlan)
    return plan


def test_zero_bubble_is_taken_in_compiled_regions_because_it_splits(tmp_path, monkeypatch):
    plan = found(tmp_path, Wanted(alone=False))
    assert (plan.schedule.kind, plan.splits) == ("zb-v", [True] * 4)
    assert [stage.splits for stage in plan.stages] == plan.splits
    parts = [span for span in plan.timeline.spans if span.work.kind == "W"]
    assert parts
    assert all(span.end > span.start for span in parts)
    assert all(stage.memory[WAITING] > 0 for stage in plan.stages)
    values = {**pipeline_report(plan), "about": {}}
    page = "".join(map(str, pipeline_sections(values, "a model")))
    begin = page.rindex("<tr", 0, page.index(">stage<")) + 1
    head, *rows = (re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in page[begin:].split("<tr"))
    for index, stage in enumerate(values["pipeline"]["stages"]):
        (later,) = {round(span.end - span.start, 9) for span in parts if span.work.stage == index}
        assert stage["later_seconds"] == pytest.approx(later, rel=1e-4)
        assert 0 < later < stage["backward_seconds"] / 2
        assert dict(zip(head, rows[index]))["later"] == seconds(later)
    assert {span.work.stage for span in parts} == set(range(4))
    monkeypatch.setattr(search, "_ways", lambda schedule: (False,))
    before, same = (found(tmp_path, wanted) for wanted in (Wanted(alone=False), Wanted(schedule="zb-v")))
    assert before.schedule.kind != "zb-v"
    assert plan.step_seconds < 0.96 * before.step_seconds
    assert plan.step_seconds < 0.9 * same.step_seconds
    assert not any(same.splits)
    assert not any(WAITING in stage.memory for stage in same.stages)


def test_what_waits_may_not_fit(tmp_path, monkeypatch):
    wanted = Wanted(schedule="zb-v")
    free = found(tmp_path, wanted, recompute_modules=())
    with monkeypatch.context() as patch:
        patch.setattr(search, "_ways", lambda schedule: (False,))
        at_once = found(tmp_path, wanted, recompute_modules=())
    assert all(free.splits)
    assert at_once.memory_bytes < free.memory_bytes
    limit = (at_once.memory_bytes + free.memory_bytes) / 2
    tight = found(tmp_path, wanted, recompute_modules=(), memory=limit)
    assert not any(tight.splits)
    assert tight.memory_bytes <= limit
    assert tight.step_seconds == pytest.approx(at_once.step_seconds)
