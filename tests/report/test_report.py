"""The report adds up to what the planner predicts, and says of small plans what a hand calculation says."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from nnscaler import planning
from nnscaler.command import run
from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.errors import UserError
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.plan import Key
from nnscaler.planner import costs, find_plan, search
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.report import __main__ as command
from nnscaler.report import compare, explain, plan_report, read_plan, would_help
from nnscaler.report.categories import COPIES
from nnscaler.report.collectives import _hidden
from nnscaler.report.page import plan_page
from nnscaler.report.spelling import seconds
from nnscaler.report.text import exposed, transfer
from nnscaler.report.values import Work
from nnscaler.trace import trace
from tests import tiny


def tiny_graph(dtype: torch.dtype = torch.bfloat16):
    config = tiny.config(num_hidden_layers=4)
    prepare_config(config, tiny.LENGTH, "auto")
    inputs = {name: torch.empty((8, tiny.LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    model, buffers = Source(lambda: CausalLM(config), inputs, dtype).build()
    return trace(model, inputs, buffers, "reuse_cache")


@pytest.fixture(scope="module")
def graph():
    return tiny_graph()


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Hardware on which everything costs something, communication most."""
    link = {"bandwidth": 1e8, "latency": 1e-6}
    folder = tmp_path_factory.mktemp("hardware")
    return load_hardware(tiny.write_hardware(folder, intra=link, inter=link, launch=1e-7))


PHASES = {"forward": "reshard", "backward": "reshard backward"}
CASES = [((1,), 1, False), ((2,), 1, False), ((2,), 2, False), ((1,), 4, True)]


def tight(predicted) -> float:
    """Bytes that leave room for four fifths of the activations that a plan keeps."""
    kept = [size for name, size in predicted["bytes_by_category"].items() if name.startswith("activations")]
    return predicted["memory_bytes"] - sum(kept) / 5


@pytest.fixture(scope="module", params=CASES, ids=str)
def planned(request, graph, slow):
    sizes, replicas, limited = request.param
    mesh = Mesh(sizes, replicas)
    fused = replicas == 1
    free = find_plan(graph, [mesh], slow, micro_batches=2, fused=fused)
    if not limited:
        return free
    limit = tight(plan_report(free)["predicted"])
    return find_plan(graph, [mesh], slow, memory=limit, micro_batches=2, fused=fused)


def test_hidden_copies_are_those_of_activations_state_and_gradients(graph, tmp_path, monkeypatch):
    """On a machine whose copies cost computation nothing: all bytes of the host over their rates, each micro-batch or,
    of the optimizer's state, once a step; of gradients, both."""
    monkeypatch.setattr(costs, "BUCKET_ELEMENTS", 1000)  # of several, so that the device need not hold all
    host = {"memory": 1e9, "to_host": 1e10, "to_device": 2e10, "both_ways": 5e9, "interference": 0.0}
    machine = load_hardware(tiny.write_hardware(tmp_path, memory_bandwidth=1e9, host=host))
    free = find_plan(graph, [Mesh((1,))], machine, micro_batches=3)
    plan = find_plan(graph, [Mesh((1,))], machine, micro_batches=3, memory=0.48 * free.memory_bytes, host=1e9)
    predicted = plan_report(plan)["predicted"]
    kinds = predicted["host_bytes_by_category"]
    state, gradients = kinds.pop("optimizer state"), kinds.pop("gradients")
    kept = sum(kinds.values())
    assert min(state, gradients, kept) > 0
    held = predicted["bytes_by_category"]
    assert sum(held.values()) == pytest.approx(plan.memory_bytes, rel=1e-4)
    weights = sum(meta.numel for meta in graph.parameters.values() if meta.requires_grad)
    away, everywhere = state / (12 * weights), {"master weights": 4 * weights, "moments": 8 * weights}
    assert {kind: held[kind] for kind in everywhere} == pytest.approx(
        {kind: size * (1 - away) for kind, size in everywhere.items()}, rel=1e-4
    )
    there = [predicted[name] for name in ("host_bytes", "host_limit_bytes")]
    assert there == pytest.approx([kept + state + gradients, 1e9], rel=1e-5)
    exposed = predicted["seconds_by_category"].get("copies to the host exposed", 0.0)
    seconds = 3 * kept * (1 / 1e10 + 1 / 2e10) + (state + 4 * gradients) / 5e9
    assert predicted["hidden_copies_seconds"] == pytest.approx(seconds - exposed, rel=1e-4)


def test_the_parts_add_up_to_the_plan(planned):
    values = plan_report(planned)
    predicted = values["predicted"]
    step, memory = planned.step_seconds, planned.memory_bytes
    assert predicted["step_seconds"] == pytest.approx(step, rel=1e-5)
    assert predicted["memory_bytes"] == pytest.approx(memory, rel=1e-5)
    assert sum(predicted["seconds_by_category"].values()) == pytest.approx(step, rel=1e-5)
    assert sum(predicted["bytes_by_category"].values()) == pytest.approx(memory, rel=1e-5)
    hidden = predicted["hidden_seconds"]["communication hidden"]
    assert sum(one["seconds"] for one in values["origins"]) == pytest.approx(step + hidden, rel=1e-5)
    beside = planned.micro_batches * sum(planned.beside.values())
    exposed = planned.micro_batches * planned.seconds.get(Key("exchange"), 0.0)
    assert hidden == pytest.approx(beside - exposed, rel=1e-5)


def test_copies_to_the_host_are_a_part_of_the_step(graph, slow):
    plan = find_plan(graph, [Mesh((1,))], slow, micro_batches=3)
    plan.host_limit = 1e9
    plan.seconds |= {Key("copies", "", side): seconds for side, seconds in (("forward", 1.0), ("update", 0.25))}
    plan.copies = {Key("copies", "layer", "x", "to the host"): 4.0, Key("copies", "", "state"): 0.5}
    predicted = plan_report(plan)["predicted"]
    assert predicted["seconds_by_category"][COPIES] == pytest.approx(3 * 1.25)
    assert sum(predicted["seconds_by_category"].values()) == pytest.approx(plan.step_seconds, rel=1e-5)
    assert predicted["hidden_copies_seconds"] == pytest.approx(3 * (4.5 - 1.25)), "those of the optimizer's state too"


def test_what_is_hidden_is_that_of_a_side():
    """Of 4 s of gathers forward takes 1 s longer; of 8 s of them and 8 s of gradients, backward 12 s."""
    gathers = {side: Key(category, "b", "w", "S(0) -> R*") for side, category in PHASES.items()}
    beside = {gathers["forward"]: 4.0, gathers["backward"]: 8.0, Key("exchange", "b", "w"): 8.0}
    seconds = {Key("exchange", "", "forward"): 1.0, Key("exchange", "", "backward"): 12.0}
    plan = SimpleNamespace(beside=beside, seconds=seconds)
    assert _hidden(plan, gathers["forward"]) == pytest.approx(3 / 4)
    assert _hidden(plan, gathers["backward"]) == pytest.approx(4 / 16)
    assert _hidden(plan, Key("exchange", "b", "w")) == pytest.approx(4 / 16)


def test_each_block_has_its_part(planned):
    values = plan_report(planned)
    predicted = values["predicted"]
    units = [unit for block in values["costs"].values() for unit in block["units"] if "name" in unit]
    again = sum(unit["seconds"]["again"] for unit in units)
    assert again == pytest.approx(predicted["seconds_by_category"]["recompute"], rel=1e-5)
    by_level = sum(level["again_seconds"] for block in values["costs"].values() for level in block["levels"].values())
    assert again == pytest.approx(by_level, rel=1e-4)
    for category in ("matmul", "attention"):
        own = sum(u["seconds"]["forward"] + u["seconds"]["backward"] for u in units if u["category"] == category)
        assert own == pytest.approx(predicted["seconds_by_category"][category], rel=1e-4)
    kept = sum(size for name, size in predicted["bytes_by_category"].items() if name.startswith("activations"))
    given = sum(size for block in values["costs"].values() for size in block["given_saved_bytes"].values())
    assert sum(unit["saved_bytes"] for unit in units) + given == pytest.approx(kept, rel=1e-4)
    for name, block in values["costs"].items():
        assert {level: one["calls"] for level, one in block["levels"].items()} == {
            level.name: calls for level, calls in planned.levels[name].items()
        }
    called = [
        unit["calls_block"] for block in values["costs"].values() for unit in block["units"] if "name" not in unit
    ]
    assert called == ["llama_decoder_layer"], "one row for all of its calls"
    assert all(sum(unit["seconds"].values()) or unit["saved_bytes"] for unit in units), (
        "views that nobody keeps are no row"
    )
    layers = values["costs"]["llama_decoder_layer"]["units"]
    assert [u["category"] for u in layers].count("matmul") == 7, "seven linear layers"
    assert [u["name"] for u in layers if u["category"] == "attention"] == ["attention"]


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum()


@pytest.mark.parametrize(("link", "micro_batches"), [(1e30, 1), (1e9, 1), (1e7, 1), (1e7, 3)])
def test_one_product_by_hand(tmp_path, link, micro_batches):
    """Two copies of x [64, 256] @ w.T [256, 512] in fp32: arithmetic, exchange of gradients, memory.

    Of several micro-batches over a slow link only the last exchanges gradients, which are kept whole until then.
    """
    rate = {"bandwidth": link, "latency": 0.0}
    hardware = load_hardware(tiny.write_hardware(tmp_path, memory_bandwidth=1e30, intra=rate, inter=rate))
    inputs = {"x": torch.empty((64, 256), device="meta")}
    model, buffers = Source(Weighted, inputs, torch.float32).build()
    plan = find_plan(trace(model, inputs, buffers, "meta"), [Mesh((1,), 2)], hardware, micro_batches=micro_batches)
    work = Work(64, (6e6, 3e6), 1e9)
    values = plan_report(plan, work)
    seconds = values["predicted"]["seconds_by_category"]
    product = 2 * 64 * 256 * 512 / 1e9
    matmul = micro_batches * 2 * product
    assert seconds["matmul"] == pytest.approx(matmul, rel=1e-5), "backward: only the weight's gradient"
    weight = 4 * 256 * 512
    exchange = weight / 2 / link  # half of it travels
    hidden = min(exchange, product)
    assert values["predicted"]["hidden_seconds"]["communication hidden"] == pytest.approx(hidden, rel=1e-4)
    assert seconds["communication exposed"] == pytest.approx(exchange - hidden + weight / 2 / link, rel=1e-4)
    assert seconds["recompute"] == 0
    moved = {one["what"]: one for one in values["collectives"]}
    figures = {what: [one[field] for field in ("phase", "devices", "calls", "size")] for what, one in moved.items()}
    assert figures == {"gradients": ["backward", 2, 1, weight], "weights": ["update", 2, 1, weight]}
    assert moved["gradients"]["seconds"] == pytest.approx(exchange, rel=1e-4)
    assert moved["gradients"]["hidden"] == pytest.approx(hidden, rel=1e-4)
    assert moved["weights"]["seconds"] == pytest.approx(weight / 2 / link, rel=1e-4)
    held = values["predicted"]["bytes_by_category"]
    assert held["parameters"] == weight
    assert held["gradients"] == (weight if micro_batches > 1 else weight / 2)
    assert held["moments"] == weight
    assert held["master weights"] == 0
    assert held["activations, keeps all"] == 64 * 256 * 4
    (parameter,) = values["costs"]["model"]["parameters"]
    assert parameter["exchanged_once"] == (micro_batches > 1)
    assert ("once a step" in plan_page(values)) == (micro_batches > 1)
    assert held["communication buffers"] == (0 if micro_batches > 1 else 1.5 * weight), "sent, and what comes back"
    step = sum(seconds.values())
    assert values["predicted"]["tokens_per_second_per_gpu"] == pytest.approx(micro_batches * 64 / step, rel=1e-4)
    assert values["predicted"]["mfu"] == pytest.approx(micro_batches * 6e6 / step / 1e9, rel=1e-4)
    assert values["predicted"]["mfu_causal"] == pytest.approx(values["predicted"]["mfu"] / 2, rel=1e-4)
    unknown = plan_report(plan, replace(work, peak=None))
    assert "mfu" not in unknown["predicted"]
    assert "MFU" not in explain(unknown) + plan_page(unknown)
    assert "tokens/s/GPU" in explain(unknown)


def test_collectives_say_what_moves(graph, slow):
    """Every collective has the size, group and origin of what the plan's layouts need."""
    values = plan_report(find_plan(graph, [Mesh((4,))], slow))
    moved = [one for one in values["collectives"] if one["move"] and not one["local"]]
    assert moved
    assert {one["devices"] for one in moved} == {4}
    assert {one["origin"] for one in moved} == {"roofline"}, "a file has no profile"
    shape = graph.blocks["llama_decoder_layer"].tensors
    for one in moved:
        if one["block"] == "llama_decoder_layer" and one["collective"] == "all_to_all":
            assert one["size"] == shape[one["what"]].nbytes / 4
            assert one["calls"] == 4
            assert one["seconds"] == pytest.approx(4 * (1e-6 + one["size"] * 3 / 4 / 1e8), rel=1e-2), "and copies"


def test_what_computation_waits_for_is_named_the_longest_first(graph, slow):
    values = plan_report(find_plan(graph, [Mesh((4,))], slow))
    moved = [one for one in values["collectives"] if not one["local"]]
    for one, hidden in zip(moved, (1.0, 0.6, *[0.0] * len(moved)), strict=False):  # the longest costs nothing
        one["hidden"] = hidden * one["seconds"]
    waits = sorted(((one["seconds"] - one["hidden"], transfer(one)) for one in moved[1:]), key=lambda pair: -pair[0])
    lines = exposed(values)
    assert lines[:4] == [text for _, text in waits[:4]]
    assert lines[4:] == [f"{len(waits) - 4} more: computation waits {seconds(sum(w for w, _ in waits[4:]))} for them"]
    assert f"exposed    {lines[0]}" in explain(values)
    for one in moved:
        one["hidden"] = one["seconds"]
    assert exposed(values) == []


def test_the_bundled_profile_is_named(graph):
    origins = plan_report(find_plan(graph, [Mesh((1,), 2)], load_hardware("h100")))["origins"]
    assert {one["origin"] for one in origins if one["what"] in ("reduce_scatter", "all_gather")} == {"profile"}
    assert {one["origin"] for one in origins if one["what"] in ("matmul", "attention")} == {"roofline"}


def test_memory_limits_where_something_is_done_twice(graph, slow):
    free = find_plan(graph, [Mesh((1,))], slow, fused=True)
    less = find_plan(graph, [Mesh((1,))], slow, fused=True, memory=tight(plan_report(free)["predicted"]))
    of_free, of_less = (
        next(one for one in plan_report(plan)["limits"] if one["limit"] == "memory") for plan in (free, less)
    )
    assert of_free["share"] == 0
    assert "nothing is done twice" in of_free["text"]
    assert of_less["share"] * less.step_seconds >= 0.99 * (less.step_seconds - free.step_seconds) > 0


def compile_tiny(folder: Path, hardware: str, explained: bool = False, **changes) -> Path:
    config = tiny.config(num_hidden_layers=4)
    prepare_config(config, tiny.LENGTH, "auto")
    inputs = {name: torch.empty((8, tiny.LENGTH), dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    source = Source(lambda: CausalLM(config), inputs, torch.float32, tokens=8 * tiny.LENGTH)
    settings = ComputeConfig(**{"hardware": hardware, "plan_ngpus": 2, "runtime_ngpus": 2, **changes})
    return compile_model(source, settings, folder, explained)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folders with a plan that is explained, and with one for less memory."""
    folder = tmp_path_factory.mktemp("compiled")
    hardware = tiny.write_hardware(folder)
    compile_tiny(folder / "a", hardware, explained=True)
    limit = tight(read_plan(folder / "a")["predicted"])
    compile_tiny(folder / "b", hardware, gpu_mem_constraint=limit / 2**30)
    return folder


def test_what_would_help_is_what_planning_so_finds(compiled):
    advice = {one["change"]: one for one in read_plan(compiled / "a")["advice"]}
    hardware = str(compiled / "hardware.json")
    step = read_plan(compiled / "a")["predicted"]["step_seconds"]
    wider = read_plan(compile_tiny(compiled / "wide", hardware, plan_ngpus=4, runtime_ngpus=4))["predicted"]
    found = advice["+2 devices, each copy split over 4"]
    assert found["step_seconds"] == wider["step_seconds"]
    assert found["speed"] == pytest.approx(step / wider["step_seconds"], rel=1e-4)
    copies = read_plan(compile_tiny(compiled / "copies", hardware, runtime_ngpus=4))["predicted"]
    found = advice["+2 devices, in 2 copies"]
    assert found["step_seconds"] == copies["step_seconds"]
    assert found["speed"] == pytest.approx(2 * step / copies["step_seconds"], rel=1e-4)
    assert advice["+20 GiB a device"]["text"].startswith("no faster"), "this plan has all the memory that it wants"
    assert {change: one["helps"] for change, one in advice.items() if "speed" in one} == {
        change: change != "+20 GiB a device" for change in advice if change.startswith("+")
    }
    text = explain(read_plan(compiled / "a"))
    assert text.index("would help") < text.index("+2 devices") < text.index("would not  +20 GiB a device: no faster")
    assert not any("speed" in one for one in read_plan(compiled / "b")["advice"]), "planned again only when asked"


def test_where_nothing_fits_the_changes_that_are_named_fit(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "TRYING_SECONDS", 1e9)  # a slow machine tries as many
    monkeypatch.setattr(search, "LEAST_SECONDS", 1.0)
    hardware = str(compiled / "hardware.json")
    limit = 0.3 * read_plan(compiled / "a")["predicted"]["memory_bytes"] / 2**30
    wanted = {"gpu_mem_constraint": limit, "search_seconds": 1.0}  # what fits, fits from the first
    with pytest.raises(UserError, match=r"no plan fits: needs .* moments .*; what would fit: ") as refusal:
        compile_tiny(tmp_path / "small", hardware, **wanted)
    assert not (tmp_path / "small").exists()
    devices = int(re.search(r"--plan_ngpus (\d+) --runtime_ngpus \1 \(", str(refusal.value))[1])
    wider = compile_tiny(tmp_path / "wide", hardware, plan_ngpus=devices, runtime_ngpus=devices, **wanted)
    assert read_plan(wider)["predicted"]["memory_bytes"] <= limit * 2**30 * (1 + 1e-5)
    assert re.search(r"sequences of (4|8|16) tokens", str(refusal.value))


def test_the_page_is_well_formed_and_needs_nothing_else(compiled):
    text = (compiled / "a" / "plan.html").read_text()
    page = ElementTree.fromstring(text)
    for word in ("<script", "<link", "<img", "<iframe", "@import", "url(", "http"):
        assert word not in text
    assert not {"src", "href"} & {name for element in page.iter() for name in element.attrib}
    shown = " ".join(page.itertext())
    values = read_plan(compiled / "a")
    for block in values["costs"].values():
        for unit in block["units"]:
            assert unit.get("name", "") in shown
    for text in [one["text"] for one in (*values["limits"], *values["advice"])]:
        assert text in shown
    bars = [element for element in page.iter("div") if element.get("class") == "bar"]
    lengths = [float(part.get("style").split("%")[0].removeprefix("width:")) for part in bars[0]]
    assert sum(lengths) == pytest.approx(100, abs=0.1), "the bar of the step's time is full"


def test_the_page_says_which_way_and_when_each_tensor_goes(graph, slow):
    """Gradients go from the layout of use to that of storage; each trained parameter has a word on its gradient."""
    values = plan_report(find_plan(graph, [Mesh((4,))], slow))
    moved = next(one for one in values["collectives"] if one["move"] and not one["local"])
    name, block = next((name, block) for name, block in values["costs"].items() if len(block["parameters"]) > 3)
    used = [one["tensor"] for one in block["parameters"]]
    values["collectives"] = []
    for phase, what in (("forward", "there"), ("backward", "back"), ("backward", used[0])):
        one = {**moved, "block": name, "what": what, "phase": phase, "move": "S(0) -> R*"}
        values["collectives"].append(one)
    for one, (owners, once) in zip(block["parameters"], ((1, False), (1, False), (4, True), (4, False)), strict=False):
        one.update(owners=owners, exchanged_once=once, trained=True)
    page = ElementTree.fromstring(plan_page(values).removeprefix("<!DOCTYPE html>"))
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert next(row for row in rows if f"{name}.there" in row)[3] == "S(0) → R*"
    assert next(row for row in rows if f"{name}.back" in row)[3] == "R* → S(0)"
    said = [next(row for row in rows if row[0] == tensor)[4] for tensor in used[:4]]
    assert said == ["each micro-batch, above", "never: one rank uses it", "once a step", "each micro-batch"]


def test_a_page_shows_odd_names_as_they_are(compiled):
    values = copy.deepcopy(read_plan(compiled / "a"))
    values["model"] = '<b class="x">&'
    assert '<b class="x">&' in "".join(ElementTree.fromstring(plan_page(values)).itertext())


def test_comparing(compiled):
    a, b = read_plan(compiled / "a"), read_plan(compiled / "b")
    same = compare(a, copy.deepcopy(a))
    assert same.count("no difference") == 4
    assert "1.000" in same
    text = compare(a, b)
    assert "memory limit: " in text
    row = next(line for line in text.splitlines() if line.startswith("memory a device"))
    assert float(row.split()[-1]) == pytest.approx(
        b["predicted"]["memory_bytes"] / a["predicted"]["memory_bytes"], abs=1e-3
    )
    changed = copy.deepcopy(a)
    unit = changed["costs"]["llama_decoder_layer"]["units"][0]
    unit["outputs"] = dict.fromkeys(unit["outputs"], "P")
    changed["costs"]["llama_decoder_layer"]["levels"] = {"recomputes all": {"calls": 4}}
    text = compare(a, changed)
    assert f"placement llama_decoder_layer.{unit['name']}: " in text
    assert "recompute llama_decoder_layer: " in text
    assert text.count("placement") == 1


def test_the_command(compiled, capsys, monkeypatch, tmp_path):
    def call(*paths: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, paths)])
        command.main()
        return capsys.readouterr().out.rstrip("\n")

    a, b = compiled / "a", compiled / "b"
    assert call(a / "plan.json") == explain(read_plan(a))
    assert call(a, b) == compare(read_plan(a), read_plan(b))
    (tmp_path / "plan.json").write_text('{"mesh": {}}')
    (tmp_path / "old.json").write_text(json.dumps({**read_plan(a), "schema": 1}))
    for path, message in (
        (tmp_path, "compile again"), (tmp_path / "nowhere", "is no compiled plan"),
        (tmp_path / "old.json", "schema 1,"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call(path)


def test_the_same_files_in_another_process(compiled, tmp_path):
    """Sets of strings are in another order in another process; a plan is not."""
    limit = tight(read_plan(compiled / "a")["predicted"]) / 2**30
    code = (
        "import sys; from pathlib import Path; from tests.report.test_report import compile_tiny; "
        f"compile_tiny(Path(sys.argv[1]), sys.argv[2], gpu_mem_constraint={limit})"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "there"), str(compiled / "hardware.json")]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run(arguments, check=True, env=environment, cwd=Path(__file__).parents[2], capture_output=True)
    for name in ("plan.json", "plan.html", "gencode_stage0.py"):
        assert (compiled / "b" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert (compiled / "b" / "plan.json").read_bytes() != (compiled / "a" / "plan.json").read_bytes()


def test_explaining_an_8b_model(tmp_path, monkeypatch, capsys):
    """With the first of the changes that could help: `test_what_would_help_is_what_planning_so_finds` has all."""
    import train

    changes = would_help._changes
    monkeypatch.setattr(would_help, "_changes", lambda plan: islice(changes(plan), 1))
    flags = (
        "--run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --sequence_length 131072 --plan_ngpus 8 "
        f"--runtime_ngpus 8 --enable-chunk-loss --hardware h100 --explain --gen_savedir {tmp_path}"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    run(train.main)
    text = capsys.readouterr().out
    values = json.loads((tmp_path / "llama" / "plan.json").read_text())
    predicted = values["predicted"]
    assert text == f"{explain(values)}\nmore in    {tmp_path / 'llama' / 'plan.html'}\n"
    assert len(text.splitlines()) <= 38
    assert "on 1 copy x 8 devices of H100" in text
    tokens = 4 * 131072 / 8 / predicted["step_seconds"]
    assert f"{tokens:,.0f} tokens/s/GPU" in text
    assert 0.4 < predicted["mfu_causal"] < predicted["mfu"] < 1
    assert predicted["memory_bytes"] <= predicted["memory_limit_bytes"] * (1 + 1e-5)
    for name in ("plan.html", "gencode_stage0.py"):
        written = " ".join((tmp_path / "llama" / name).read_text().replace("</span>", "").replace("<span>", "").split())
        for said in (
            "meta-llama/Meta-Llama-3-8B-Instruct", "4 micro-batches of 1 sequence of 131,072 tokens, in bf16",
            "train.py --run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --enable-chunk-loss "
            "--sequence_length 131072 --plan_ngpus 8 --runtime_ngpus 8 --hardware h100 --precision bf16",
            f"torch {values['about']['versions']['torch']}",
        ):  # fmt: skip
            assert said in written, name
        assert str(tmp_path) not in written
    assert values["schema"] == 2
    calls = values["costs"]["llama_decoder_layer"]["levels"].values()
    assert sum(level["calls"] for level in calls) == 32
    more = next(one for one in values["advice"] if one["change"] == "+20 GiB a device")
    assert more["speed"] > 1, "recomputing is what memory costs here"
    assert any(one["change"] == "profile attention" for one in values["advice"])


def test_operators_timed_on_the_device_are_called_measured(graph, slow, tmp_path):
    """The same operators with times in the cache: what is there is measured, what could not be run is not."""
    asked: list[str] = []

    class Times(OperatorTimes):
        def seconds(self, node, inputs, part=None):
            asked.append(node.op)
            return (1e-3, 2e-3) if node.op in ("aten.linear.default", "aten.matmul.default") else None

    values = plan_report(find_plan(graph, [Mesh((2,))], slow, times=Times(tmp_path, "")))
    assert {"aten.linear.default", "attention"} <= set(asked)
    origin = {one["what"]: one["origin"] for one in values["origins"]}
    step = values["predicted"]["step_seconds"]
    assert all(one["share"] == pytest.approx(one["seconds"] / step, rel=1e-4) for one in values["origins"])
    assert origin["matmul"] == "measured"
    assert origin["attention"] == origin["memory-bound"] == "roofline"
    assert not any("present" in one["text"] for one in values["advice"]), "what was not timed here, cannot be"
    cpu = plan_report(find_plan(graph, [Mesh((2,))], replace(slow, name="CPU")))
    assert not any("present" in one["text"] for one in cpu["advice"]), "only operators of GPUs are timed"
    other = plan_report(find_plan(graph, [Mesh((2,))], slow))
    assert any("present" in one["text"] for one in other["advice"])
