"""What reports make of a plan's figures, on values written by hand: every number said is worked out here."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from nnscaler.graph import Block, Node, TensorMeta
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.plan import GIB, Key
from nnscaler.planner.costs import CostModel
from nnscaler.recompute import KEEPS_ALL
from nnscaler.report.about import UNITS, code_facts, facts, headed, work_of
from nnscaler.report.categories import category_of
from nnscaler.report.charts import bar, headline, legend
from nnscaler.report.collectives import _gradients, _steps, _weights
from nnscaler.report.comparison import compare
from nnscaler.report.limits import limits_of
from nnscaler.report.origins import measuring, origins_of
from nnscaler.report.parameters import parameter_groups
from nnscaler.report.spelling import gib, percent, seconds, step
from nnscaler.report.text import explain, recompute, transfer
from nnscaler.report.timeline import timeline
from nnscaler.report.would_help import apart, would_help
from nnscaler.units import Unit
from tests import tiny

AGAIN = "recomputes all"


def collective(name: str, phase: str, time: float, **changes) -> dict:
    one = {
        "block": "layer", "what": "x", "phase": phase, "collective": name, "move": "S(0) -> R", "devices": 4,
        "size": 3 * 2.0**20, "calls": 6, "seconds": time, "hidden": 0.0, "origin": "profile", "local": False,
    }  # fmt: skip
    return {**one, **changes}


def unit(category: str, origin: str, *times: float) -> dict:
    return {"category": category, "origin": origin, "seconds": dict(zip(("forward", "backward", "again"), times))}


def values_of() -> dict:
    """A step of 100 s on two copies of two devices."""
    levels = {
        KEEPS_ALL.name: {"calls": 3, "again_seconds": 4.0, "saved_bytes": 9.0},
        AGAIN: {"calls": 5, "again_seconds": 7.0, "saved_bytes": 1.0},
    }
    units = [unit("matmul", "measured", 20.0, 30.0, 9.0), unit("attention", "roofline", 5.0, 6.0, 2.0)]
    return {
        "model": "Llama",
        "hardware": "H100",
        "mesh": {"sizes": [2], "names": ["devices"], "replicas": 2},
        "micro_batches": 4,
        "blocks": {"layer": {"pieces": {"y": 8}}},
        "predicted": {
            "step_seconds": 100.0,
            "memory_bytes": 30 * GIB,
            "memory_limit_bytes": 40 * GIB,
            "gap": 0.0123,
            "bound_seconds": 98.77,
            "tokens_per_second_per_gpu": 1234.4,
            "mfu": 0.5,
            "mfu_causal": 0.25,
            "seconds_by_category": {
                "matmul": 50.0, "attention": 11.0, "memory-bound": 8.0, "recompute": 11.0,
                "communication exposed": 12.0, "optimizer": 5.0, "copies to the host exposed": 3.0,
            },
            "hidden_seconds": {"communication hidden": 6.0},
            "bytes_by_category": {"parameters": 10 * GIB, "moments": 20 * GIB},
            "host_bytes": 2 * GIB,
            "host_limit_bytes": 8 * GIB,
            "host_bytes_by_category": {"optimizer state": 2 * GIB},
            "hidden_copies_seconds": 9.5,
        },
        "costs": {
            "layer": {"calls": 8, "levels": levels, "units": [{"calls_block": "inner"}, *units], "parameters": []}
        },
        "collectives": [
            collective("all_gather", "forward", 10.0, hidden=4.0),
            collective("reduce_scatter", "backward", 5.0, hidden=2.0),
            collective("all_gather", "again", 3.0),
        ],
        "advice": [],
    }  # fmt: skip


def test_limits_are_shares_of_the_step():
    """What is done again to hold less: 7 s by a level that does not keep all, 3 s of gathering; and 3 s of copies."""
    found = {one["limit"]: one for one in limits_of(values_of())}
    assert {name: one["share"] for name, one in found.items()} == pytest.approx(
        {"arithmetic": 0.61, "memory": 0.13, "communication": 0.12, "memory bandwidth": 0.08, "optimizer": 0.05}
    )
    assert list(found) == ["arithmetic", "memory", "communication", "memory bandwidth", "optimizer"]
    assert found["arithmetic"]["text"] == "matmul and attention, at the rates that the device reaches"
    more = values_of()
    more["predicted"]["seconds_by_category"] |= {"linear_loss": 20.0}
    assert limits_of(more)[0]["text"] == "matmul, linear_loss and attention, at the rates that the device reaches"
    more["predicted"]["seconds_by_category"] = {
        name: value
        for name, value in more["predicted"]["seconds_by_category"].items()
        if name != "linear_loss" and name != "attention"
    }
    assert limits_of(more)[0]["text"].startswith("matmul, at")
    assert found["communication"]["text"].startswith("12.0 s by which computation takes longer; 6.00 s are hidden")
    assert found["memory"]["text"] == (
        "30.0 GiB of 40.0 GiB are used; 10.0 s of computing and gathering again what is not kept, 3.00 s of copies to "
        "the host and back that nothing hides"
    )
    full = values_of()
    full["predicted"]["memory_bytes"] = 39.8 * GIB
    assert "39.8 GiB of 40.0 GiB are used, 99.5 % of it; " in str(limits_of(full))
    full["predicted"]["memory_bytes"] = 39.5 * GIB
    assert "39.5 GiB of 40.0 GiB are used; " in str(limits_of(full))
    full["predicted"]["host_bytes"] = 7.95 * GIB
    assert "39.5 GiB of 40.0 GiB are used, and 7.95 GiB of 8.00 GiB of the host; " in str(limits_of(full))


def test_origins_are_the_parts_of_the_step_that_rest_on_a_kind_of_figure():
    values = values_of()
    values["collectives"][1]["origin"] = "measured"
    values["origins"] = origins_of(values)
    assert [(one["what"], one["origin"], one["seconds"], one["share"]) for one in values["origins"]] == [
        ("matmul", "measured", 59.0, 0.59),
        ("attention", "roofline", 13.0, 0.13),
        ("all_gather", "profile", 13.0, 0.13),
        ("reduce_scatter", "measured", 5.0, 0.05),
        ("optimizer", "roofline", 5.0, 0.05),
    ]
    computed, moved = measuring(values, timed=False)
    assert computed["change"] == "profile attention"
    assert computed["text"].startswith("13.0 % of the step's time rests on a roofline figure")
    assert moved["text"].startswith("13.0 % of the step's time rests on unmeasured communication: torchrun")
    assert measuring(values, timed=True) == [moved]
    assert [computed["helps"], moved["helps"]] == [True, True]
    values["origins"] = [{**one, "share": 0.0099} for one in values["origins"]]
    assert measuring(values, timed=False) == [], "what is less than a hundredth of the step"


def test_lines_have_the_figures():
    values = values_of()
    values["limits"] = [
        {"limit": "memory", "share": 0.001, "text": "a"},
        {"limit": "optimizer", "share": 0.009, "text": "b"},
    ]
    lines = explain(values).splitlines()
    assert lines[0] == "plan       Llama on 2 copies x 2 devices of H100"
    assert lines[1] == (
        "step       1,234 tokens/s/GPU, causal MFU 25.0 % (50.0 % by the document's formula), 100 s a step"
    )
    assert lines[3].split() == ["time", "matmul", "50.0", "s", "50.0", "%"]
    assert "           communication hidden              6.00 s" in lines
    assert "memory     30.0 GiB of 40.0 GiB that the plan may use" in lines
    assert lines[lines.index("memory     30.0 GiB of 40.0 GiB that the plan may use") + 1].split()[1:] == [
        "10.0", "GiB", "25.0", "%"
    ]  # fmt: skip
    host = "host       2.00 GiB of 8.00 GiB a device that the plan may use; copies of 9.50 s a step are hidden behind "
    assert f"{host}computation" in lines
    assert lines[lines.index(f"{host}computation") + 1].split() == ["optimizer", "state", "2.00", "GiB", "25.0", "%"]
    assert f"recompute  layer: 3 {KEEPS_ALL.name}, 5 {AGAIN}; up to y in 8 pieces" in lines
    assert "search     no plan without a pipeline takes less than 98.8 s, which is 1.23 % less" in lines
    assert lines[-1] == "limits     memory, 0.1 %: a", "others from 1 % of the step"
    first, second = (line[11:] for line in lines if " of layer.x " in line and "(again)" not in line)
    assert first == "all_gather of layer.x (forward) over 4: 6 x 3 MiB, 10.0 s, 40.0 % of it hidden (profile)"
    assert second == "reduce_scatter of layer.x (backward) over 4: 6 x 3 MiB, 5.00 s, 40.0 % of it hidden (profile)"
    assert transfer(values["collectives"][2]) == "all_gather of layer.x (again) over 4: 6 x 3 MiB, 3.00 s (profile)"
    values["costs"]["layer"]["calls"] = 1
    assert recompute(values) == []


def test_numbers_are_written_with_three_digits():
    assert [seconds(value) for value in (123.4, 1.0, 0.9994, 0.0123, 1e-3, 4.5e-5)] == [
        "123 s", "1.00 s", "999 ms", "12.3 ms", "1.00 ms", "45.0 µs"
    ]  # fmt: skip
    assert [gib(value) for value in (29.14 * GIB, GIB, GIB - 2**20, 2.0**20, 2.0**10, 1023)] == [
        "29.1 GiB", "1.00 GiB", "1023 MiB", "1 MiB", "1 KiB", "1023 B"
    ]  # fmt: skip
    assert percent(0.48149) == "48.1 %"
    assert step({"step_seconds": 2.0}) == "2.00 s a step"


def test_an_mfu_above_100_percent_says_why():
    """Not where only the formula's, in which attention counts twice, is above."""
    high = {**values_of()["predicted"], "mfu": 1.3}
    assert "above" not in step(high) + str(headline(high, "memory"))
    higher = {**high, "mfu_causal": 1.2}
    why = "above 100 %: every weight counts as multiplied, those of an embedding too, and fp8 by the peak in bf16"
    assert f"causal MFU 120.0 % (130.0 % by the document's formula; {why}), 100 s a step" in step(higher)
    assert str(headline(higher, "memory")).endswith(f"MFU {why}.</p>")


def test_plans_are_compared_row_by_row():
    a, b = values_of(), values_of()
    b["predicted"] |= {"step_seconds": 80.0, "tokens_per_second_per_gpu": 1543.0, "memory_bytes": 33 * GIB}
    b["predicted"]["seconds_by_category"] |= {"matmul": 40.0, "attention": 0.0, "linear_loss": 2.0}
    b["predicted"]["hidden_seconds"] = {"communication hidden": 3.0}
    b["predicted"] |= {"hidden_copies_seconds": 4.75, "host_bytes": 5 * GIB, "host_bytes_by_category": {
        "optimizer state": 3 * GIB, "gradients": 2 * GIB}}  # fmt: skip
    del b["predicted"]["host_limit_bytes"]
    b["micro_batches"], b["costs"]["layer"]["levels"] = 2, {AGAIN: {"calls": 8}}
    lines = compare(a, b).splitlines()
    rows = {line[:36].strip(): " ".join(line[36:].split()) for line in lines}
    assert rows[""] == "A B B / A"
    assert rows["step"] == "100 s 80.0 s 0.800"
    assert rows["tokens/s/GPU"] == "1234 1543 1.250"
    assert rows["matmul"] == "50.0 s 40.0 s 0.800"
    assert rows["attention"] == "11.0 s 0.00 µs 0.000"
    assert rows["linear_loss"] == "0.00 µs 2.00 s new"
    assert rows["communication hidden"] == "6.00 s 3.00 s 0.500"
    assert rows["memory a device"] == "30.0 GiB 33.0 GiB 1.100"
    assert rows["copies to the host hidden"] == "9.50 s 4.75 s 0.500"
    assert rows["memory of the host a device"] == "2.00 GiB 5.00 GiB 2.500"
    assert rows["optimizer state"] == "2.00 GiB 3.00 GiB 1.500"
    assert "setting limit of the host: 8.00 GiB  |  0 B" in lines
    assert "setting micro-batches: 4  |  2" in lines
    assert f"recompute layer: 3 {KEEPS_ALL.name}, 5 {AGAIN}  |  8 {AGAIN}" in lines
    for one, other in ((a, b), (b, a)):
        without = {**one, "predicted": {k: v for k, v in one["predicted"].items() if "tokens" not in k}}
        assert "tokens/s" not in compare(without, other) + compare(other, without), "of both, or of none"


def plan_of(step_seconds: float, memory: float, devices: int, replicas: int, host: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        step_seconds=step_seconds, memory_bytes=memory, memory_limit=40 * GIB, mesh=Mesh((devices,), replicas),
        host_bytes=host, host_limit=100 * GIB,
    )  # fmt: skip


def test_a_change_helps_by_the_samples_a_second_that_it_gives():
    """Of a plan of 10 s on 2 copies of 2 devices. In 4 copies a step has twice the samples."""
    asked = []
    found = [plan_of(10.003, 30 * GIB, 2, 2), plan_of(4.0, 20 * GIB, 4, 2), plan_of(12.5, 30 * GIB, 2, 4)]

    def replan(change):
        asked.append(change)
        return found[len(asked) - 1]

    advice = would_help(plan_of(10.0, 30 * GIB, 2, 2), replan)
    assert asked == [
        {"gpu_mem_constraint": 60.0}, {"plan_ngpus": 4, "runtime_ngpus": 8}, {"runtime_ngpus": 8},
    ]  # fmt: skip
    assert [one["change"] for one in advice] == [
        "+20 GiB a device", "+4 devices, each copy split over 4", "+4 devices, in 4 copies"
    ]  # fmt: skip
    assert [one["text"] for one in advice] == [
        "no faster: 10 s a step, 30.0 GiB a device",
        "2.5 x as fast (1.25 x a device): 4 s a step, 20.0 GiB a device",
        "1.6 x as fast (0.80 x a device): 12.5 s a step of twice the samples, 30.0 GiB a device",
    ]
    assert [one["helps"] for one in advice] == [False, True, True]
    assert [one["speed"] for one in advice] == pytest.approx([10 / 10.003, 2.5, 1.6])
    assert [one["devices"] for one in advice] == [4, 8, 8]


def test_twice_the_hosts_memory_is_asked_for_where_a_plan_uses_nearly_all():
    asked = []

    def replan(change):
        asked.append(change)
        return plan_of(8.0, GIB, 2, 2)

    for used, wants in ((0.0, False), (89.0, False), (91.0, True)):
        asked.clear()
        would_help(plan_of(10.0, GIB, 2, 2, used * GIB), replan)
        assert ({"host_mem_constraint": 200.0} in asked) == wants
    advice = would_help(plan_of(10.0, GIB, 2, 2, 100 * GIB), replan)
    assert (advice[1]["change"], advice[1]["speed"]) == ("+100 GiB of the host a device", 1.25)


def test_what_helps_and_what_does_not_are_told_apart():
    """What does not say so, helps."""
    yes, no, also = {"change": "a", "helps": True}, {"change": "b", "helps": False}, {"change": "c"}
    assert apart([no, yes, also]) == ([yes, also], [no])


def test_bars_are_as_long_as_their_shares():
    parts = {"matmul": 30.0, "odd": 0.0, "memory-bound": 10.0, "other": 60.0}
    spans = list(ElementTree.fromstring(str(bar(parts, 120.0, seconds))))
    widths = [span.get("style").partition(";")[0] for span in spans]
    assert widths == ["width:25.000%", "width:8.333%", "width:50.000%"]
    assert [span.get("title") for span in spans] == ["matmul: 30.0 s", "memory-bound: 10.0 s", "other: 60.0 s"]
    entries = list(ElementTree.fromstring(str(legend(parts, 120.0, seconds))))
    assert ["".join(entry.itertext()) for entry in entries] == [
        "matmul30.0 s25.0 %",
        "memory-bound10.0 s8.3 %",
        "other60.0 s50.0 %",
    ]
    colours = [part.get("style").rpartition("background:")[2] for part in spans]
    assert [next(entry.iter("i")).get("style") for entry in entries] == [f"background:{each}" for each in colours]
    cards = ElementTree.fromstring(str(headline(values_of()["predicted"], "memory")))
    assert [(card[0].text, card[1].text.partition(",")[0]) for card in cards] == [
        ("1,234", "tokens/s a device"), ("25.0 %", "MFU"), ("100 s", "step"), ("30.0 GiB", "memory"),
        ("50.0 %", "MFU by the document's formula"),
    ]  # fmt: skip


def test_what_a_plan_is_for_is_said_at_the_head_of_everything():
    values = values_of()
    assert work_of(values) == "4 micro-batches"
    values["about"] = {
        "sequence_length": 8192, "sequences_per_micro_batch": 2, "document_length": 1000, "precision": "bf16",
        "model": "org/Model", "versions": {"torch": "2.11", "transformers": "5.1"}, "command": "train.py --a 1",
    }  # fmt: skip
    work = "4 micro-batches of 2 sequences of 8,192 tokens in documents of 1,000, in bf16"
    assert work_of(values) == work
    for products, said in ((7, "fp8"), (0, "bf16, as no product is faster in fp8")):
        about = {"precision": "fp8", "products_in_fp8": products}
        assert work_of({"micro_batches": 4, "about": about}) == f"4 micro-batches, in {said}"
    assert work_of({"micro_batches": 1, "about": {"sequence_length": 8, "sequences_per_micro_batch": 1}}) == (
        "1 micro-batch of 1 sequence of 8 tokens"
    )
    assert list(headed({"model": "Llama"}, values["about"]).items()) == [
        ("schema", 2), ("units", UNITS), ("about", values["about"]), ("model", "Llama"),
    ]  # fmt: skip
    said = dict(code_facts(values))
    assert said == {
        "model": "org/Model as Llama", "step": f"{work}, a copy", "mesh": "2 copies x 2 devices of H100",
        "predicted": "1,234 tokens/s/GPU, causal MFU 25.0 % (50.0 % by the document's formula), 100 s a step, 30.0 GiB "
        "a device", "command": "train.py --a 1", "versions": "torch 2.11, transformers 5.1",
    }  # fmt: skip
    stages = [{"predicted": {"step_seconds": time, "memory_bytes": time * GIB}} for time in (20.0, 30.0, 40.0)]
    assert dict(code_facts({**values, "stages": stages}, 1))["stage"] == (
        "1 of 3, counted from 0; it works for 30.0 s of the step, and takes 30.0 GiB of a device"
    )
    paragraph = "".join(ElementTree.fromstring(str(facts({**values, "stage": {"index": 2}}, "So it is."))).itertext())
    assert paragraph.startswith(f"Stage 2 of a pipeline. Each copy trains {work}, a step.train.py --a 1")
    assert paragraph.endswith("torch 2.11, transformers 5.1All figures are predictions. So it is.")


def test_a_timeline_is_drawn_to_scale():
    """A step of 10 s on two ranks: 1042 units are 10 s, and 60 are left of it. Rank 0 has stages 0 and 3."""
    spans = [
        [0, "F", 0, 0, 0.0, 2.0], [0, "F", 3, 0, 3.0, 4.0], [1, "I", 1, 0, 4.0, 6.5], [1, "W", 2, 1, 6.5, 8.0],
        [1, "W", 1, 1, 8.0, 8.0],
    ]  # fmt: skip
    values = {
        "predicted": {"step_seconds": 10.0, "update_seconds": 2.0},
        "pipeline": {
            "schedule": {"ranks": 2}, "timeline": spans, "splits": [True, False, True, True], "computing": [0.3, 0.4],
        },
    }  # fmt: skip
    picture, kinds, note = (ElementTree.fromstring(str(part)) for part in timeline(values))
    name = "{http://www.w3.org/2000/svg}"
    rectangles = list(picture.iter(f"{name}rect"))
    assert [float(each.get("x")) for each in rectangles] == pytest.approx([60.0, 372.6, 476.8, 737.3])
    assert [float(each.get("width")) for each in rectangles] == pytest.approx([207.9, 103.7, 260.0, 155.8])
    assert [each.get("y") for each in rectangles] == ["0", "0", "26", "26"]
    assert [each.get("fill-opacity") for each in rectangles] == ["1.00", "0.70", "1.00", "0.70"]
    assert [each[0].text for each in rectangles] == [
        "forward, stage 0, micro-batch 0: 2.00 s from 0.00 µs", "forward, stage 3, micro-batch 0: 1.00 s from 3.00 s",
        "backward, stage 1, micro-batch 0: 2.50 s from 4.00 s",
        "backward, for the stage's weights, stage 2, micro-batch 1: 1.50 s from 6.50 s",
    ]  # fmt: skip
    values["predicted"]["update_seconds"] = 0.0
    (short, *_) = ElementTree.fromstring(str(next(timeline(values)))).iter(f"{name}path")
    assert short.get("d") == "M1102.00 0h1.00v46h-1.00z", "it is seen, however short it is"
    update, *marks = picture.iter(f"{name}path")
    assert update.get("d") == "M893.60 0h208.40v46h-208.40z"
    assert update[0].text == "update of parameters: 2.00 s"
    texts = [each for each in picture.iter(f"{name}text") if each.get("text-anchor")]
    assert [each.text for each in texts] == ["0", "2.50 s", "5.00 s", "7.50 s", "10.0 s"]
    assert [float(each.get("x")) for each in texts] == pytest.approx([60, 320.5, 581, 841.5, 1102])
    assert [mark.get("d").split()[0] for mark in marks] == [f"M{float(each.get('x')):.2f}" for each in texts]
    assert [part.text for part in kinds.iter("span")] == [
        "forward", "backward", "backward, for the stage's weights", "update of parameters",
        "paler: a rank's later stages",
    ]  # fmt: skip
    assert note.text.startswith(
        "The step ends after 10.0 s, the last 2.00 s of which update parameters. Of it, ranks compute: "
        "rank 0 30.0 %, rank 1 40.0 %."
    )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("category", "name", "bytes_each"), [
    ("reshard", "all_gather", 2), ("reshard again", "all_gather", 2), ("reshard backward", "reduce_scatter", 4),
])  # fmt: skip
def test_a_gathered_weight_in_bf16_or_fp8_comes_back_in_fp32(tmp_path, category, name, bytes_each, narrow):
    """[32, 8] on two devices, half of which travels; six times, of which a quarter is hidden."""
    link = {"bandwidth": 1e6, "latency": 0.0}
    machine = load_hardware(tiny.write_hardware(tmp_path, memory_bandwidth=1e30, intra=link, inter=link))
    block = SimpleNamespace(name="layer", tensors={"w": TensorMeta((32, 8), torch.bfloat16, True)})
    bytes_each = 1 if narrow and name == "all_gather" else bytes_each
    key, size = Key(category, "layer", "w", "S(0) -> R*"), 32 * 8 * bytes_each
    each = size / 2 / 1e6
    plan = SimpleNamespace(
        graph=SimpleNamespace(all_blocks=lambda: [block]), beside={key: 2 * each}, mesh=Mesh((2,)), micro_batches=3,
        gathered_in_fp8={("layer", "w", (SHARED,))} if narrow else {("layer", "w", (REPLICATE,))},
    )  # fmt: skip
    (found,) = _steps(plan, CostModel(machine, Mesh((2,))), key, 2 * each, 0.25)
    phase = {"reshard": "forward", "reshard again": "again", "reshard backward": "backward"}[category]
    assert (found.collective, found.phase, found.move, found.devices) == (name, phase, "S(0) -> R*", 2)
    assert (found.size, found.calls, found.origin, found.local) == (size, pytest.approx(6), "roofline", False)
    assert (found.seconds, found.hidden) == pytest.approx((6 * each, 1.5 * each))


@pytest.mark.parametrize(("kind", "op", "category"), [
    ("product", "aten.linear.default", "matmul"), ("product", "aten.bmm.default", "matmul"),
    ("product", "aten.conv2d.default", "conv2d"), ("registered", "attention", "attention"),
    ("registered", "experts", "experts"), ("cheap", "aten.silu.default", "memory-bound"),
])  # fmt: skip
def test_what_the_time_of_a_unit_is_for(kind, op, category):
    assert category_of(Unit(kind, [Node("y", op, (), {}, ("y",))])) == category


def test_groups_of_parameters_are_those_of_all_calls(tmp_path):
    """Of two calls of a layer with a weight [8, 4] and a frozen table [4], on two devices, in two micro-batches."""
    machine = load_hardware(tiny.write_hardware(tmp_path, memory_bandwidth=1e30))
    costs = CostModel(machine, Mesh((2,)))
    tensors = {"w": TensorMeta((8, 4), torch.bfloat16, True), "table": TensorMeta((4,), torch.bfloat16, False)}
    block = SimpleNamespace(name="layer", tensors=tensors)
    uses = [(block, name, f"layers.{index}.{name}") for name in tensors for index in range(2)]
    layouts = {path: (Shard(0),) if name == "w" else (REPLICATE,) for _, name, path in uses}
    memory = {
        Key("parameter", "layer", "w", "parameters"): 2 * 4 * 4 * 2.0, Key("parameter", "layer", "w", "moments"): 1.0,
        Key("saved", "layer", "x", "keeps all"): 3.0, Key("parameter", "layer", "table", "parameters"): 2 * 8.0,
    }  # fmt: skip
    plan = SimpleNamespace(
        graph=SimpleNamespace(parameter_uses=lambda: uses, all_blocks=lambda: [block]), parameters=layouts,
        memory=memory, seconds={Key("update", "layer", "w"): 0.25}, exchanged_once=set(), master_only=set(),
        micro_batches=2,
    )  # fmt: skip
    weight, table = parameter_groups(plan, costs)
    assert (weight.tensor, weight.count, weight.layout, weight.owners, weight.elements) == ("w", 2, (Shard(0),), 1, 16)
    assert weight.memory == {"parameters": 64, "gradients": 128, "master weights": 128, "moments": 256}
    assert (weight.trained, weight.update_seconds) == (True, 0.5)
    assert (table.tensor, table.count, table.owners, table.trained, table.memory) == (
        "table", 2, 2, False, {"parameters": 16}
    )  # fmt: skip


def test_what_owners_exchange_by_hand():
    """Of a block that is called three times: two weights in bf16 that four ranks have whole, and one that two have each
    half of, whose gradient is exchanged once a step of five micro-batches."""
    shapes = {"w": (4, 6), "u": (2, 5), "v": (8, 6), "frozen": (9, 9), "alone": (7, 7)}
    block = Block("layer", "Layer", {name: TensorMeta(shape, torch.bfloat16) for name, shape in shapes.items()})

    def group(name: str, elements: int, owners: int, **changes: object) -> SimpleNamespace:
        given = {"block": "layer", "tensor": name, "count": 3, "elements": elements, "owners": owners}
        return SimpleNamespace(**{**given, "layout": (SHARED,), "trained": True, "exchanged_once": False, **changes})

    groups = [
        group("w", 24, 4), group("u", 10, 4), group("v", 24, 2, layout=(Shard(0),), exchanged_once=True),
        group("frozen", 81, 4, trained=False), group("alone", 49, 1),
    ]  # fmt: skip
    beside = {Key("exchange", "layer", name): value for name, value in (("w", 0.5), ("u", 0.25), ("v", 0.125))}
    plan = SimpleNamespace(
        graph=SimpleNamespace(all_blocks=lambda: [block]), micro_batches=5, beside=beside, seconds={}
    )  # fmt: skip
    costs = CostModel(load_hardware("h100"), Mesh((2,), 2))
    gradients = [(one.devices, one.size, one.calls, one.seconds) for one in _gradients(plan, costs, groups)]
    assert gradients == [(4, 3 * (24 + 10) * 4, 5, 5 * 0.75), (2, 3 * 24 * 4, 1, 5 * 0.125)]
    weights = list(_weights(costs, groups, plan))
    assert [(one.devices, one.size, one.calls) for one in weights] == [(4, 3 * (24 + 10) * 2, 1), (2, 3 * 24 * 2, 1)]
    for one, names in zip(weights, ("wu", "v")):
        each = [costs.weight_exchange(block.tensors[name], next(g.layout for g in groups if g.tensor == name))
                for name in names]  # fmt: skip
        assert one.seconds == pytest.approx(3 * sum(each))
        assert (one.phase, one.collective, one.what) == ("update", "all_gather", "weights")
