"""Lines, rows and words of reports on values written by hand, beside those of `test_figures` and `test_page`."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from nnscaler import report
from nnscaler.errors import UserError
from nnscaler.graph import TensorMeta
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.plan import GIB, Key
from nnscaler.planner.costs import CostModel, in_fp32
from nnscaler.report.about import plan_title
from nnscaler.report.block_section import _exchanged
from nnscaler.report.comparison import compare
from nnscaler.report.limits import limits_of
from nnscaler.report.markup import table, tag
from nnscaler.report.origins import measuring, origins_of
from nnscaler.report.page import plan_page
from nnscaler.report.parameters import parameter_groups
from nnscaler.report.pipeline import _crossing, of_stage
from nnscaler.report.spelling import LEGEND, devices, short_name
from nnscaler.report.text import explain, exposed, in_fp8, main_limits, recompute
from nnscaler.report.values import Work, rounded, speed_of
from tests import tiny
from tests.report.test_figures import collective, values_of
from tests.report.test_page import page_values, rows_of


def test_a_table_as_it_is_written():
    found = table(["a", ">b"], [[1, "<"], ["x", tag("i", "y", style="z")]], ["move", ""])
    assert found == (
        '<div class="scroll"><table><thead><tr class=""><th class="">a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr class="move"><td class="">1</td><td class="right">&lt;</td></tr>'
        '<tr class=""><td class="">x</td><td class="right"><i style="z">y</i></td></tr></tbody></table></div>'
    ).replace('<thead><tr class="">', "<thead><tr>")
    assert table(["a"], [["x"]]).count('<tr class="">') == 1
    for rows, kinds in (([["x", "y"]], [""]), ([["x"]], ["", ""])):
        with pytest.raises(ValueError, match="zip"):
            table(["a"], rows, kinds)


def test_what_plans_lay_out_differently_is_named_or_that_nothing_is():
    a, b = page_values(), page_values()
    same = compare(a, b).splitlines()
    assert same[-4:] == [f"{what}: no difference" for what in ("setting", "recompute", "placement", "parameter")]
    assert [line.split()[0] for line in same[-8:-4]] == ["parameters", "moments", "memory", "optimizer"], (
        "bytes, of the device and of the host, the last figures"
    )
    b["mesh"] = {"sizes": [4], "names": ["devices"], "replicas": 1}
    b["hardware"], b["predicted"]["memory_limit_bytes"] = "H200", 60 * GIB
    up, _, y = b["costs"]["layer"]["units"]
    b["costs"]["layer"]["units"] = [{**up, "outputs": {"u": "R", "x": "S(0)"}}, {**y, "name": "new"}]
    weight, *others = b["costs"]["layer"]["parameters"]
    b["costs"]["layer"]["parameters"] = [{**weight, "layout": "R*", "master_only": False}, *others]
    del b["predicted"]["seconds_by_category"]["optimizer"]
    lines = compare(a, b).splitlines()
    assert ["optimizer", "5.00", "s", "0.00", "µs", "0.000"] in [line.split() for line in lines]
    assert lines[-8:] == [
        "setting mesh: 2 copies x 2 devices  |  1 copy x 4 devices", "setting hardware: H100  |  H200",
        "setting memory limit: 40.0 GiB  |  60.0 GiB", "recompute: no difference",
        "placement layer.up: R, S(0) -> S(1), S(0)  |  R, S(0) -> R, S(0)",
        "placement layer.y: S(1) -> S(1)  |  none", "placement layer.new: none  |  S(1) -> S(1)",
        "parameter layer.w: S(0), fp32  |  R*",
    ]  # fmt: skip
    for pair in (({"pipeline": {}}, {}), ({}, {"pipeline": {}})):
        with pytest.raises(UserError, match=r"cannot be compared; nnscaler.report explains each by itself$"):
            compare(*pair)


def test_limits_that_there_are_not():
    values = values_of()
    values["costs"], values["collectives"] = {}, []
    predicted = values["predicted"]
    for exposed_, hidden, text in (
        (0.0, 0.0, "there is none"),
        (0.0, 6.0, "0.00 µs by which computation takes longer; 6.00 s are hidden behind it"),
        (2.0, 0.0, "2.00 s by which computation takes longer; 0.00 µs are hidden behind it"),
    ):
        predicted["seconds_by_category"] |= {"communication exposed": exposed_, "copies to the host exposed": 0.0}
        predicted["hidden_seconds"] = {"communication hidden": hidden}
        found = {one["limit"]: (one["share"], one["text"]) for one in limits_of(values)}
        assert found["communication"] == (exposed_ / 100, text)
    assert found["memory"] == (0.0, "30.0 GiB of 40.0 GiB are used; nothing is done twice")
    assert found["memory bandwidth"] == (0.08, "operators that read and write more than they compute")
    assert found["optimizer"] == (0.05, "reading and writing the optimizer's state")
    predicted["seconds_by_category"] |= {"casts of master weights": 4.0}
    casts = "nothing is done twice, 4.00 s of casting master weights"
    assert limits_of(values)[3]["share"] == 0.04
    assert limits_of(values)[3]["text"].endswith(casts)
    predicted["seconds_by_category"] = {"memory-bound": 1.0, "communication exposed": 0.0, "optimizer": 0.0}
    assert {one["limit"]: one["text"] for one in limits_of(values)}["arithmetic"].startswith("nothing, at the rates")


def test_what_is_to_be_measured_is_the_largest_of_computation_and_all_of_communication():
    values = values_of()
    values["collectives"].append(collective("all_gather", "forward", 70.0, origin="roofline"))
    found = origins_of(values)
    assert [(one["what"], one["origin"]) for one in found[:2]] == [("all_gather", "roofline"), ("matmul", "measured")]
    values["origins"] = [
        {"what": what, "origin": origin, "share": share}
        for what, origin, share in (
            ("all_gather", "roofline", 0.7), ("x", "profile", 0.2), ("y", "roofline", 0.1),
            ("all_gather", "profile", 0.01), ("reduce_scatter", "roofline", 0.009), ("all_gather", "measured", 0.5),
        )
    ]  # fmt: skip
    assert measuring(values, timed=False) == [
        {
            "change": "profile x", "helps": True, "text": "20.0 % of the step's time rests on a profile figure: "
            "planning where the device is present measures it",
        },
        {
            "change": "profile communication", "helps": True, "text": "71.0 % of the step's time rests on unmeasured "
            "communication: torchrun --nproc_per_node=<devices> -m nnscaler.profiler.benchmark_comm",
        },
    ]  # fmt: skip


HEADINGS = [
    "Time of a step", "Memory of a device", "Memory of the host", "What limits the plan, and what would help",
    "Operators, block by block", "Communication", "Where the figures come from",
]  # fmt: skip


def test_headings_classes_and_the_way_that_gradients_go():
    values = page_values()
    values["predicted"]["hidden_seconds"] = {"communication hidden": 200.0}
    text = plan_page(values)
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert page.find("head/title").text == "".join(page.find("body/main/h1").itertext()) == plan_title(values)
    assert ["".join(each.itertext()) for each in page.iter("h2")] == HEADINGS
    assert ["".join(each.itertext()) for each in page.iter("h3")] == ["layer called 8 times", "model called once"]
    classes = {(each.tag, each.get("class")) for each in page.iter() if each.get("class")}
    assert classes == {
        ("div", "cards"), ("div", "bar"), ("div", "marked"), ("div", "mark"), ("div", "scroll"), ("ul", "legend"),
        ("ul", "notation"), ("p", "about"), ("p", "faint"), ("span", "faint"), ("tr", "move"), ("tr", "call"),
        ("td", "right"), ("th", "right"),
    }  # fmt: skip
    style = (Path(report.__file__).parent / "style.css").read_text()
    assert {name for _, name in classes} <= set(re.findall(r"\.([a-z]+)", style))
    rows = rows_of(page)
    assert ["operator", "split", "layouts in → out", "forward", "backward", "again", "of the step", "kept"] in rows
    for way, direction in (("forward", "S(0) → R"), ("backward", "R → S(0)"), ("again", "S(0) → R")):
        assert any(row[1:4] == ["layer.x", way, direction] for row in rows)
    for hidden, width in ((200.0, "width:100.000%"), (25.0, "width:25.000%")):
        values["predicted"]["hidden_seconds"] = {"communication hidden": hidden}
        again = ElementTree.fromstring(plan_page(values).removeprefix("<!DOCTYPE html>"))
        (part,) = (each for each in again.iter("span") if "communication hidden" in each.get("title", ""))
        assert part.get("style").startswith(width), "of the step, or of itself where it is longer"
    names = [
        "".join(card[1].itertext()) for card in next(each for each in page.iter("div") if each.get("class") == "cards")
    ]
    assert names[2:4] == ["step", "memory a device"]
    stage = {**values, "stage": {"index": 1, "of_step_seconds": 250.0}}
    assert "<span>work of this stage, in a step of 250 s</span>" in plan_page(stage)
    assert {"S(d)", "R", "R*", "P"} == LEGEND.keys()
    assert all(f"<li><code>{name}</code> {meaning}</li>" in text for name, meaning in LEGEND.items())


@pytest.mark.parametrize(("trained", "owners", "once", "resharded", "said"), [
    (False, 2, True, True, ""), (True, 2, True, False, "once a step"), (True, 2, False, True, "each micro-batch"),
    (True, 1, False, True, "each micro-batch, above"), (True, 1, True, False, "never: one rank uses it"),
])  # fmt: skip
def test_when_a_gradient_is_exchanged(trained, owners, once, resharded, said):
    parameter = {"trained": trained, "owners": owners, "exchanged_once": once}
    assert _exchanged(parameter, resharded) == said


def test_a_weight_that_forward_alone_gathers_has_a_gradient_of_its_own_rank():
    values = page_values()
    values["collectives"][-1] |= {"what": "w", "collective": "all_gather", "phase": "forward"}
    page = ElementTree.fromstring(plan_page(values).removeprefix("<!DOCTYPE html>"))
    (row,) = (row for row in rows_of(page) if row[0] == "w")
    assert row[3:5] == ["1", "never: one rank uses it"]


def test_figures_of_parameters_that_owners_exchange(tmp_path):
    """Of three copies of two devices: two weights whose master alone is stored, and another whose gradient travels in
    each micro-batch. An update is what is left of its time without the exchange of weights."""
    link = {"bandwidth": 1e3, "latency": 0.0}
    costs = CostModel(load_hardware(tiny.write_hardware(tmp_path, intra=link, inter=link)), Mesh((2,), 3))
    tensors = {name: TensorMeta((8, 4), torch.bfloat16, name != "u") for name in ("w", "v", "u")}
    block = SimpleNamespace(name="layer", tensors=tensors)
    layouts = {"a.w": (Shard(0),), "b.w": (Shard(0),), "a.v": (SHARED,), "a.u": (REPLICATE,)}
    memory = {
        Key("parameter", "layer", "w", "parameters"): 2 * 16 * 4.0,
        Key("parameter", "layer", "v", "parameters"): 32 * 2.0,
        Key("parameter", "layer", "u", "parameters"): 32 * 2.0, Key("saved", "layer", "v", "parameters"): 1e9,
        Key("parameter", "layer", "v", "gradients"): 1e9,
    }  # fmt: skip
    plan = SimpleNamespace(
        graph=SimpleNamespace(
            parameter_uses=lambda: [(block, path[-1], path) for path in layouts], all_blocks=lambda: [block]
        ),
        parameters=layouts, memory=memory,
        seconds={Key("update", "layer", "w"): 0.25, Key("update", "layer", "v"): 0.5},
        exchanged_once={"a.w", "b.w"}, master_only={"a.w", "b.w"}, micro_batches=4,
    )  # fmt: skip
    weight, other, frozen = parameter_groups(plan, costs)
    assert (weight.count, weight.owners, weight.master_only, weight.exchanged_once, weight.elements) == (
        2,
        3,
        True,
        True,
        16,
    )
    assert (other.count, other.owners, other.master_only, other.exchanged_once, other.elements) == (
        1,
        6,
        False,
        False,
        32,
    )
    assert weight.memory["parameters"] == 128
    assert weight.memory == {
        what: 2 * size for what, size in costs.parameter_memory(in_fp32(tensors["w"]), (Shard(0),), 4, True).items()
    }
    for found, layout in ((weight, (Shard(0),)), (other, (SHARED,))):
        exchange = found.count * costs.weight_exchange(tensors["w"], layout)
        assert exchange > 0.01
        assert found.update_seconds == pytest.approx({"w": 1.0, "v": 2.0}[found.tensor] - exchange)
    assert (frozen.count, frozen.owners, frozen.trained, frozen.update_seconds) == (1, 6, False, 0.0)


def test_lines_of_what_is_exposed_limits_and_levels():
    """Four by name, and the others together; local ones, and what is hidden, are waited for by nobody."""
    values = values_of()
    times = [(f"c{number}", float(number), 0.0) for number in range(1, 7)] + [("hidden", 9.0, 9.0)]
    values["collectives"] = [collective(name, "forward", time, hidden=hidden) for name, time, hidden in times]
    values["collectives"].append(collective("slice", "forward", 50.0, local=True))
    lines = exposed(values)
    assert [line.split()[0] for line in lines] == ["c6", "c5", "c4", "c3", "2"]
    assert lines[-1] == "2 more: computation waits 3.00 s for them"
    limits = [{"limit": name, "share": share} for name, share in (("a", 0.01), ("b", 0.0099), ("memory", 0.0))]
    assert main_limits({"limits": limits}) == [limits[0], limits[2]]
    layer = values["costs"]["layer"]
    layer["parameters"] = [{"master_only": True}, {"master_only": False}, {"master_only": True}]
    assert recompute(values)[0].endswith("; up to y in 8 pieces; 2 of 3 weights stored in fp32 alone")
    values["about"] = {"precision": "fp8"}
    values["blocks"]["layer"]["nodes"] = {"a": {"in_fp8": True}, "b": {"in_fp8": False}, "c": {"in_fp8": True}}
    values["blocks"]["last"] = {"nodes": {"a": {"in_fp8": False}}, "gathered_in_fp8": []}
    values["blocks"]["layer"]["gathered_in_fp8"] = []
    assert in_fp8(values) == ["layer: 2 products multiply in fp8"]
    values["blocks"]["layer"]["gathered_in_fp8"] = ["v", "w"]
    assert in_fp8(values) == ["layer: 2 products multiply in fp8; 2 weights gathered in it"]
    del values["blocks"]["layer"]
    assert in_fp8(values) == ["no product is faster in fp8 than in bf16"]
    values["about"] = {"precision": "bf16"}
    assert in_fp8(values) == []


def pipeline_values() -> dict:
    """Two ranks of two stages each."""
    first = values_of()
    second = {**values_of(), "costs": {}, "blocks": {}}
    stages = [
        {"rank": rank, "blocks": {"layer": 8, "norm": 1}, "forward_seconds": 1.0, "backward_seconds": 2.0,
         "later_seconds": later, "in_flight": 3, "memory_bytes": 5 * GIB, "host_bytes": host}
        for rank, host, later in ((0, 0.0, 0.0), (1, 2 * GIB, 0.0), (1, 0.0, 0.5), (0, 0.0, 0.0))
    ]  # fmt: skip
    return {
        "model": "Llama", "hardware": "H100", "mesh": {"sizes": [2], "names": ["devices"], "replicas": 1},
        "micro_batches": 4, "about": {"model": "org/Llama"},
        "predicted": {
            "step_seconds": 10.0, "update_seconds": 2.5, "memory_bytes": 30 * GIB, "memory_limit_bytes": 40 * GIB,
            "gap": 0.2, "bound_seconds": 8.0,
        },
        "pipeline": {
            "schedule": {"kind": "zb-v", "ranks": 2, "stages": 4, "micro_batches": 4}, "computing": [0.5, 0.25],
            "stages": stages,
        },
        "stages": [first, second, second, second],
        "advice": [{"change": "a", "helps": True, "text": "b"}, {"change": "c", "helps": False, "text": "d"}],
    }  # fmt: skip


def test_a_pipeline_is_explained_stage_by_stage():
    values = pipeline_values()
    head = "rank {}: 8 layer, 1 norm; forward 1.00 s, backward 2.00 s; 5.00 GiB"
    levels = "; layer: 3 keeps all, 5 recomputes all; up to y in 8 pieces"
    lines = explain(values).splitlines()
    assert lines[0] == "plan       org/Llama on 1 copy x 2 pipeline ranks x 2 devices of H100"
    assert lines[1] == "schedule   zb-v, 4 stages on 2 ranks, 4 micro-batches"
    assert lines[2:] == [
        "step       10.0 s a step", "           for 4 micro-batches, a copy",
        "           2.50 s of it update parameters; ranks compute 50.0 %, 25.0 %",
        "memory     30.0 GiB of 40.0 GiB that the plan may use, on the rank that needs most",
        "search     no pipeline of these stages, with this schedule, takes less than 8.00 s, which is 20.00 % less: so "
        "long its busiest rank works",
        f"stage 0    {head.format(0)}, 3 in flight{levels}",
        f"stage 1    {head.format(1)} and 2.00 GiB of the host, 3 in flight",
        f"stage 2    {head.format(1).replace('2.00 s', '2.00 s, 500 ms of it later')}, 3 in flight",
        f"stage 3    {head.format(0)}, 3 in flight",
        "would help a: b", "would not  c: d",
    ]  # fmt: skip
    values["predicted"] |= {"host_bytes": 2 * GIB, "host_limit_bytes": 8 * GIB}
    assert explain(values).splitlines()[6:8] == [
        "host       2.00 GiB of 8.00 GiB a device that the plan may use, likewise", lines[6]
    ]  # fmt: skip
    stage = of_stage(values, 1)
    assert stage["stage"] == {"index": 1, "of_step_seconds": 10.0}
    assert (stage["about"], stage["costs"], stage["model"]) == ({"model": "org/Llama"}, {}, "Llama")


def test_what_crosses_between_stages_is_as_the_devices_of_both_have_it():
    tensors = {"x": TensorMeta((8, 6), torch.bfloat16, True), "mask": TensorMeta((4,), torch.int64)}
    sender = SimpleNamespace(name="model", outputs=["mask", "other", "x"])
    receiver = SimpleNamespace(name="model", inputs=["x", "mask", "ids"])
    stages = [
        SimpleNamespace(
            graph=SimpleNamespace(root=sender), outputs={"model": [(REPLICATE,), (REPLICATE,), (Shard(1),)]}
        ),
        SimpleNamespace(graph=SimpleNamespace(root=receiver), inputs={"model": [(Shard(0),), (REPLICATE,), (SHARED,)]}),
    ]
    assert _crossing(*stages, tensors) == [  # type: ignore[arg-type]
        {"name": "x", "whole": [8, 6], "dtype": "bfloat16", "gradient": True, "sent": "S(1)", "received": "S(0)"},
        {"name": "mask", "whole": [4], "dtype": "int64", "gradient": False, "sent": "R", "received": "R"},
    ]


def test_how_fast_a_plan_is():
    """A micro-batch of 100 tokens that takes two devices a quarter of a second each, of 80 operations a second."""
    work = Work(100, (40.0, 20.0), 80.0)
    operations = {"micro_batch_flops": 40.0, "micro_batch_flops_causal": 20.0}
    assert speed_of(0.5, work) == {"tokens_per_second_per_gpu": 200.0, **operations, "mfu": 1.0, "mfu_causal": 0.5}
    assert speed_of(0.5, Work(100, (40.0, 20.0), None)) == {"tokens_per_second_per_gpu": 200.0, **operations}
    assert speed_of(0.5, None) == {}
    assert rounded({"a": (1.23456789, [1e-9 / 3]), "b": 12345678, "c": "x", "d": None, "e": True}) == {
        "a": [1.23457, [3.33333e-10]], "b": 12345678, "c": "x", "d": None, "e": True
    }  # fmt: skip


def test_devices_and_operators_have_short_names():
    mesh = {"sizes": [2, 4], "names": ["outer", "inner"], "replicas": 3}
    assert devices({"mesh": mesh}) == "3 copies x 2 outer x 4 inner devices"
    assert devices({"mesh": {"sizes": [1], "names": ["devices"], "replicas": 1}}) == "1 copy x 1 device"
    names = ("aten.linear.default", "nnscaler.dropout.default", "attention", "aten.add.Tensor")
    assert [short_name(name) for name in names] == ["linear", "dropout", "attention", "add"]
