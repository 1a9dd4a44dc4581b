"""A compiled pipeline says what its stages and its schedule are: in plan.json, on its page, and in a few lines."""

from __future__ import annotations

import json
from math import prod
from xml.etree import ElementTree

import pytest
import torch

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.errors import UserError
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.report import compare, explain, read_plan
from nnscaler.report.spelling import seconds
from nnscaler.schedules import Compute, Schedule, actions
from tests import tiny

STAGES, RANKS, COUNT = 4, 2, 4
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = tiny.config(num_hidden_layers=4, tie_word_embeddings=True)
    prepare_config(config, tiny.LENGTH, "auto")
    inputs = {name: torch.empty((1, tiny.LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    source = Source(lambda: CausalLM(config), inputs, tokens=tiny.LENGTH)
    compute = ComputeConfig(
        4, 8, micro_batches=COUNT, hardware=tiny.write_hardware(folder),
        explore_pipeline=True, pipeline_schedule="zb-v", pipeline_nstages=STAGES,
    )  # fmt: skip
    return compile_model(source, compute, folder / "code")


def test_values_hold_schedule_and_stages(compiled):
    values = read_plan(compiled)
    pipeline = values["pipeline"]
    schedule = Schedule(**pipeline["schedule"])
    assert schedule == Schedule("zb-v", RANKS, STAGES, COUNT)
    done = [(rank, kind, stage, index) for rank, kind, stage, index, _, _ in pipeline["timeline"]]
    wanted = [
        (rank, step.kind, step.stage, step.micro_batch)
        for rank, program in enumerate(actions(schedule))
        for step in program
        if isinstance(step, Compute)
    ]
    assert sorted(done) == sorted(wanted), "the timeline is that of the schedule"
    end = max(span[5] for span in pipeline["timeline"])
    assert values["predicted"]["step_seconds"] == pytest.approx(end + values["predicted"]["update_seconds"])
    ranks = [[one for one in pipeline["stages"] if one["rank"] == rank] for rank in range(RANKS)]
    most = max(sum(stage["memory_bytes"] for stage in mine) for mine in ranks)
    assert values["predicted"]["memory_bytes"] == pytest.approx(most)
    tokens = COUNT * tiny.LENGTH / values["predicted"]["step_seconds"] / 4
    assert values["predicted"]["tokens_per_second_per_gpu"] == pytest.approx(tokens, rel=1e-5)
    assert pipeline["shared"] == {"model.model.embed_tokens.weight": [0, 3]}
    assert [one["in_flight"] for one in pipeline["stages"]] == [4, 3, 2, 1]


def test_stages_have_the_seconds_and_bytes_of_their_plans(compiled):
    """A micro-batch's, by what the stage's operators and collectives take in a step of COUNT micro-batches."""
    values = read_plan(compiled)
    pipeline, step = values["pipeline"], values["predicted"]["step_seconds"]
    for index, (stage, report) in enumerate(zip(pipeline["stages"], values["stages"], strict=True)):
        units = [unit["seconds"] for block in report["costs"].values() for unit in block["units"] if "seconds" in unit]
        moved = [one for one in report["collectives"] if one["phase"] != "update"]
        phases = {
            phase: sum(unit[phase] for unit in units)
            + sum(one["seconds"] - one["hidden"] for one in moved if one["phase"] == phase)
            for phase in ("forward", "backward", "again")
        }
        assert stage["forward_seconds"] == pytest.approx(phases["forward"] / COUNT, rel=1e-4)
        assert stage["backward_seconds"] == pytest.approx((phases["backward"] + phases["again"]) / COUNT, rel=1e-4)
        spans = [span for span in pipeline["timeline"] if span[2] == index]
        assert [span[5] - span[4] for span in spans if span[1] == "F"] == pytest.approx(
            [stage["forward_seconds"]] * COUNT, rel=1e-4
        )
        update = report["predicted"]["step_seconds"] / COUNT - stage["forward_seconds"] - stage["backward_seconds"]
        assert 0 < update * COUNT <= values["predicted"]["update_seconds"] * (1 + 1e-5)
        assert stage["memory_bytes"] == report["predicted"]["memory_bytes"]
        assert stage["host_bytes"] == 0
        assert stage["blocks"] == {"llama_decoder_layer": 1}
    for rank, share in enumerate(pipeline["computing"]):
        works = [span[5] - span[4] for span in pipeline["timeline"] if span[0] == rank]
        assert share == pytest.approx(sum(works) / step, rel=1e-4)
    assert 0 < min(pipeline["computing"]) <= max(pipeline["computing"]) < 1
    for sent, receiving in zip(pipeline["crossing"], values["stages"][1:], strict=True):
        (one,) = sent
        assert (one["dtype"], one["gradient"]) == ("bfloat16", True)
        assert one["whole"] == [1, tiny.LENGTH, 32]
        assert one["sent"] == one["received"]
        held = 1 if one["sent"] == "R" else 2
        assert (
            receiving["predicted"]["bytes_by_category"]["communication buffers"]
            >= COUNT * 2 * prod(one["whole"]) / held
        )


def test_the_page_draws_every_work_and_needs_nothing_else(compiled):
    text = (compiled / "plan.html").read_text()
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    (picture,) = page.iter(f"{SVG}svg")
    rectangles = list(picture.iter(f"{SVG}rect"))
    spans = [span for span in read_plan(compiled)["pipeline"]["timeline"] if span[5] > span[4]]
    assert len(rectangles) == len(spans)
    right = float(picture.get("width"))
    for rectangle, (rank, _, stage, index, *_) in zip(rectangles, spans, strict=True):
        assert f"stage {stage}, micro-batch {index}" in rectangle.find(f"{SVG}title").text
        assert float(rectangle.get("x")) + float(rectangle.get("width")) <= right + 1
        same = [other for other, span in zip(rectangles, spans) if span[0] == rank]
        assert {other.get("y") for other in same} == {rectangle.get("y")}, "a row a rank"
    links = [link.get("href") for link in page.iter("a")]
    assert links == [f"plan_stage{index}.html" for index in range(STAGES)]
    for link in links:
        ElementTree.fromstring((compiled / link).read_text().removeprefix("<!DOCTYPE html>\n"))
    assert not any(element.get("src") for element in page.iter())


def test_the_step_ends_on_the_page_and_in_the_trace(compiled):
    values = read_plan(compiled)
    step, update = (values["predicted"][name] for name in ("step_seconds", "update_seconds"))
    page = ElementTree.fromstring((compiled / "plan.html").read_text().removeprefix("<!DOCTYPE html>\n"))
    (picture,) = page.iter(f"{SVG}svg")
    marks = [mark for mark in picture.iter(f"{SVG}text") if mark.get("text-anchor")]
    assert marks[-1].text == seconds(step)
    assert float(marks[-1].get("x")) < float(picture.get("width"))
    events = json.loads((compiled / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    drawn = [span for span in values["pipeline"]["timeline"] if span[5] > span[4]]
    assert len(spans) == len(drawn) + RANKS
    for event, (rank, _, stage, index, start, end) in zip(spans, drawn):
        assert (event["tid"], event["args"]) == (rank, {"stage": stage, "micro-batch": index})
        assert (event["ts"], event["dur"]) == pytest.approx((1e6 * start, 1e6 * (end - start)), abs=1e-3)
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(1e6 * step, abs=1e-2)
    assert [event["dur"] for event in spans[-RANKS:]] == pytest.approx([1e6 * update] * RANKS, abs=1e-3)


def test_every_file_has_the_same_prediction(compiled):
    """That of the whole step; what a stage works of it is called so."""
    values = read_plan(compiled)
    step = f"{seconds(values['predicted']['step_seconds'])} a step"
    assert step in explain(values)
    for index, stage in enumerate(values["stages"]):
        code, own = (compiled / f"gencode_stage{index}.py").read_text(), seconds(stage["predicted"]["step_seconds"])
        assert step in code
        assert f"{index} of {STAGES}, counted from 0; it works for {own} of the step" in code
        page = (compiled / f"plan_stage{index}.html").read_text()
        assert f"work of this stage, in a step of {seconds(values['predicted']['step_seconds'])}" in page


def test_the_short_version_has_a_line_a_stage(compiled):
    values = read_plan(compiled)
    lines = explain(values).splitlines()
    assert "schedule   zb-v, 4 stages on 2 ranks, 4 micro-batches" in lines
    stages = [line for line in lines if line.startswith("stage ")]
    assert [line.split()[:4] for line in stages] == [
        ["stage", str(index), "rank", f"{rank}:"] for index, rank in enumerate((0, 1, 1, 0))
    ]
    assert all("1 llama_decoder_layer; forward " in line for line in stages)
    with pytest.raises(UserError, match="plans with a pipeline cannot be compared"):
        compare(values, values)
