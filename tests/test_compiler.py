"""What a compile hands from one of its steps to the next."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nnscaler import compiler, loaded
from nnscaler.batch import Batch, Division
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.identity import DONE
from nnscaler.mesh import Mesh
from nnscaler.shards import Box
from nnscaler.source import Source

HARDWARE = SimpleNamespace(remark="")


@pytest.fixture
def steps(monkeypatch) -> SimpleNamespace:
    """Each step writes down what it is given, and gives its name."""
    asked = SimpleNamespace()

    def step(name: str, result: object):
        def run(*given: object, **named: object) -> object:
            setattr(asked, name, (*given, *named.values()))
            return result

        return run

    asked.times = SimpleNamespace(save=step("saved", None))
    asked.graph = SimpleNamespace(record="record")
    monkeypatch.setattr(compiler.OperatorTimes, "here", lambda: asked.times)
    monkeypatch.setattr(ComputeConfig, "find_hardware", lambda self: HARDWARE)
    monkeypatch.setattr(Source, "work", step("work", "work"))
    for name, result in {
        "traced": asked.graph, "plan_or_advise": "plan", "plan_for": "another", "plan_report": {"it": 1},
        "headed": {"report": 1}, "identity": {"it": "is"}, "_write": None, "division_rows": "rows",
    }.items():  # fmt: skip
        monkeypatch.setattr(compiler, name, step(name, result))
    return asked


SOURCE = Source(lambda: nn.Linear(2, 2), {"x": torch.zeros(2, 2)}, length=12)


def test_a_plan_is_made_reported_and_written_for_what_was_asked(steps, tmp_path):
    config = ComputeConfig(2, 4, trace_strategy="meta", gpu_mem_constraint=5.0)
    assert compiler.compile_model(SOURCE, config, tmp_path / "code", explain=True) == tmp_path / "code"
    assert steps.traced == (SOURCE, "meta")
    assert steps.plan_or_advise == (SOURCE, steps.graph, config, HARDWARE, steps.times)
    assert steps.work == (SOURCE, steps.graph, HARDWARE)
    plan, work, replan = steps.plan_report
    assert (plan, work) == ("plan", "work")
    assert replan({"gpu_mem_constraint": 7.0}) == "another"
    changed = ComputeConfig(2, 4, trace_strategy="meta", gpu_mem_constraint=7.0)
    assert steps.plan_for == (steps.graph, changed, HARDWARE, steps.times)
    assert steps.headed == ({"it": 1}, SOURCE.about())
    assert steps.saved == (), "what was timed"
    source, _, *others = steps.identity
    assert (source, others) == (SOURCE, [config, "record", None])
    assert steps._write[1:] == (steps.graph, "plan", {"report": 1})
    assert json.loads((tmp_path / "code" / DONE).read_text()) == {"it": "is"}
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
    (tmp_path / "other").mkdir()
    assert (tmp_path / "code").stat().st_mode == (tmp_path / "other").stat().st_mode, "others may read it"


@pytest.mark.parametrize(("products", "multiplies", "warns"), [(2, True, 0), (0, True, 1), (0, False, 0)])
def test_where_no_product_is_faster_in_fp8_that_is_said(
    steps, tmp_path, monkeypatch, caplog, products, multiplies, warns
):
    """Where the device has none at all, that has been said."""
    nodes = {("layer", str(index)): SimpleNamespace(in_fp8=index < products) for index in range(3)}
    hardware = SimpleNamespace(remark="", name="A", multiplies=lambda dtype: multiplies)
    monkeypatch.setattr(ComputeConfig, "find_hardware", lambda self: hardware)
    monkeypatch.setattr(compiler, "plan_or_advise", lambda *given: SimpleNamespace(nodes=nodes))
    compiler.compile_model(replace(SOURCE, fp8=True), ComputeConfig(), tmp_path / "code")
    assert steps.headed[1]["products_in_fp8"] == products
    assert caplog.messages.count("no product is faster in fp8 here: all are planned in bf16") == warns


def test_for_other_hardware_nothing_is_timed_here(steps, tmp_path):
    config = ComputeConfig(hardware="h100")
    assert compiler.compile_model(SOURCE, config, tmp_path / "runs" / "mine" / "code").is_dir()
    assert steps.plan_or_advise[-1] is None
    assert steps.plan_report[-1] is None, "nothing is to be explained"
    assert not hasattr(steps, "saved")


def test_a_pipeline_is_reported_as_one(steps, tmp_path, monkeypatch):
    plan, told = compiler.PipelinePlan.__new__(compiler.PipelinePlan), []
    monkeypatch.setattr(compiler, "plan_or_advise", lambda *given: plan)
    monkeypatch.setattr(compiler, "pipeline_report", lambda *given: told.append(given) or {"stages": 2})
    compiler.compile_model(SOURCE, ComputeConfig(), tmp_path / "code")
    assert told == [(plan, "work", None)]
    assert steps.headed == ({"stages": 2}, SOURCE.about())
    assert not hasattr(steps, "plan_report")


def test_what_is_not_written_to_the_end_leaves_nothing(steps, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiler, "_write", full)
    with pytest.raises(UserError, match=f"^cannot write '{tmp_path}/code': No space left on device$"):
        compiler.compile_model(SOURCE, ComputeConfig(), tmp_path / "code")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stages", [False, True])
def test_each_file_says_what_it_is_for(stages, monkeypatch, tmp_path):
    """Of a plan without stages, and of a pipeline; a page and a program are of the stage whose number they have."""

    def written(name: str):
        return lambda *given: f"{name}({', '.join(map(str, given))})"

    for name in ("plan_page", "code_facts", "generate", "of_stage"):
        monkeypatch.setattr(compiler, name, written(name))
    monkeypatch.setattr(compiler, "chrome_trace", lambda report: {"of": report})
    plan = compiler.PipelinePlan.__new__(compiler.PipelinePlan)
    object.__setattr__(plan, "stages", ["first", "second"])
    graph = SimpleNamespace(buffers={"table": torch.arange(6.0).view(2, 3).T})
    compiler._write(tmp_path, graph, plan if stages else "plan", {"a": 1})  # type: ignore[arg-type]
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    wanted = {"graph.txt": str(graph), "plan.json": '{\n "a": 1\n}', "plan.html": "plan_page({'a': 1})"}
    if stages:
        wanted |= {
            "gencode_stage0.py": "generate(first, code_facts({'a': 1}, 0))",
            "gencode_stage1.py": "generate(second, code_facts({'a': 1}, 1))",
            "plan_stage0.html": "plan_page(of_stage({'a': 1}, 0))", "trace.json": '{"of": {"a": 1}}',
            "plan_stage1.html": "plan_page(of_stage({'a': 1}, 1))",
        }  # fmt: skip
    else:
        wanted["gencode_stage0.py"] = "generate(plan, code_facts({'a': 1}, None))"
    assert found == wanted
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "whoever may read one may read all"
    assert load_file(tmp_path / "buffers.safetensors")["table"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    (tmp_path / "bare").mkdir()
    graph.buffers.clear()
    compiler._write(tmp_path / "bare", graph, plan if stages else "plan", {})  # type: ignore[arg-type]
    assert not (tmp_path / "bare" / "buffers.safetensors").exists()


def test_a_batch_is_divided_first(steps, tmp_path, monkeypatch):
    config, batch = ComputeConfig(1, 8), Batch(16, 8)
    own = Source(SOURCE.make, SOURCE.inputs, length=24), ComputeConfig(2, 8)
    divided = SimpleNamespace(source=own[0], config=own[1], graph=steps.graph, plan="divided")
    asked = []
    monkeypatch.setattr(compiler, "divide", lambda *given: asked.append(given) or divided)
    compiler.compile_model(SOURCE, config, tmp_path / "code", batch=batch)
    assert asked == [(batch, SOURCE, config, HARDWARE, steps.times)]
    assert not hasattr(steps, "traced")
    assert steps.plan_report[0] == "divided"
    assert steps.work == (own[0], steps.graph, HARDWARE)
    assert steps.division_rows == (divided, 24)
    assert (steps.identity[0], *steps.identity[2:]) == (own[0], own[1], "record", batch)
    assert steps._write[3] == {"report": 1, "divisions": "rows"}


def test_what_is_compiled_already_is_used_where_it_is_for_the_same(monkeypatch, tmp_path, caplog):
    """Also where the planner has divided a batch: in the division that it chose, if there still is such a one."""
    caplog.set_level("INFO", "nnscaler")
    compiled, asked, judged = [], [], []
    monkeypatch.setattr(loaded, "compile_model", lambda *given, **named: compiled.append((*given, *named.values())))
    monkeypatch.setattr(loaded, "identity", lambda *given, **named: asked.append((given, named)) or "wanted")
    monkeypatch.setattr(loaded, "differences", lambda folder, wanted: answers.pop())
    config, answers = ComputeConfig(1, 8), [[], ["dtype: compiled a, wanted b"], None]
    (tmp_path / DONE).touch()
    for used in (False, False, True):
        loaded._compile_if_needed(SOURCE, config, tmp_path, judged.append, None)
        assert compiled == ([] if used else [(SOURCE, config, tmp_path, None)])
        compiled.clear()
    assert (len(judged), len(asked)) == (3, 3)
    (tmp_path / DONE).unlink()
    loaded._compile_if_needed(SOURCE, config, tmp_path, judged.append, None)
    assert (len(judged), len(asked)) == (4, 3), "where nothing is, there is nothing to compare with"
    assert compiled == [(SOURCE, config, tmp_path, None)]
    compiled.clear()
    (tmp_path / DONE).touch()
    assert all(isinstance(model, nn.Linear) for model in judged)
    assert "was compiled for something else (dtype: compiled a, wanted b): compiling" in caplog.text
    assert f"using the compiled plan in {tmp_path}" in caplog.text
    batch = Batch(16, 8)
    for division, of in ((Division(2, 2, 2), ComputeConfig(2, 8, micro_batches=2)), (Division(3, 2, 2), config)):
        rows = [{"plan_ngpus": division.plan_ngpus, "micro_batch_size": 2, "micro_batches": 2}]
        (tmp_path / "plan.json").write_text(json.dumps({"divisions": rows, "predicted": {"step_seconds": 2.5}}))
        assert loaded.division_in(tmp_path) == division
        answers[:] = [["other"]]
        asked.clear()
        compiled.clear()
        loaded._compile_if_needed(SOURCE, config, tmp_path, judged.append, batch)
        (((source, _, found), named),) = asked
        assert (found, named) == (of, {"batch": batch})
        assert source.inputs["x"].shape == ((2, 2) if of is not config else SOURCE.inputs["x"].shape)
        assert compiled == [(SOURCE, config, tmp_path, batch)], "it is divided anew"
    assert loaded.predicted_step_seconds(tmp_path) == 2.5
    (tmp_path / "plan.json").write_text("{}")
    assert loaded.division_in(tmp_path) is None


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_one_rank_compiles_while_no_other_run_may_and_all_get_the_files(rank, monkeypatch, tmp_path):
    """Inside, rank 0 still holds the folder. None: there is one process."""
    events: list[object] = []

    @contextmanager
    def held(folder):
        events.append(("held", folder))
        yield
        events.append("free")

    monkeypatch.setattr(loaded, "alone_in", held)
    monkeypatch.setattr(loaded.dist, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(loaded.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(loaded, "from_rank_0", lambda work, device: events.append(device) or (rank or work()))
    monkeypatch.setattr(loaded, "_compile_if_needed", lambda *given: events.append(given))
    monkeypatch.setattr(loaded, "share_folder", lambda *given: events.append(("shared", *given)))
    config, device, judge, batch = ComputeConfig(1, 8), torch.device("meta"), lambda model: None, Batch(16, 8)
    with loaded.compiled(SOURCE, config, tmp_path, device, judge, batch):
        events.append("inside")
    mine = [("held", tmp_path)] if rank != 1 else []
    work = [(SOURCE, config, tmp_path, judge, batch)] if rank != 1 else []
    shared = [("shared", tmp_path, device)] if rank is not None else []
    assert events == [*mine, device, *work, *shared, "inside", *(["free"] if mine else [])]


def test_first_values_are_given_to_what_is_named_and_masters_are_made_of_them(monkeypatch, caplog):
    """Each rank takes its own part of a value, and what its stage does not have it leaves."""
    caplog.set_level("INFO", "nnscaler")
    values = {"here": torch.arange(6.0).view(2, 3), "elsewhere": torch.ones(4), "too": torch.arange(4.0)}
    asked: list[object] = []

    def initial(*given):
        asked.append(given)
        return values.items()

    monkeypatch.setattr(loaded, "initial_parameters", initial)
    boxes, taken = {"here": Box((1, 0), (1, 2)), "too": Box((2,), (2,))}, {}
    module = SimpleNamespace(
        parameters_to_load=lambda: ["here", "too"], axes=SimpleNamespace(device="cpu"), box=boxes.get,
        load_one=lambda name, value: taken.__setitem__(name, value.tolist()),
    )  # fmt: skip
    model = loaded.LoadedModel.__new__(loaded.LoadedModel)
    model.module, model.model, model._first = module, "model", "first"  # type: ignore[assignment]
    model.optimizer = SimpleNamespace(load_masters=lambda: asked.append(sorted(taken)))
    model.initialise(7)
    model.initialise(8, ["too", "here"])
    assert taken == {"here": [[3.0, 4.0]], "too": [2.0, 3.0]}
    assert asked == [
        ("model", 7, "cpu", None, "first"), ["here", "too"],
        ("model", 8, "cpu", ["too", "here"], "first"), ["here", "too"],
    ]  # fmt: skip
    assert "weights are initialised from seed 7" in caplog.text
    assert "2 new tensors are initialised from seed 8" in caplog.text


def test_a_loaded_model_holds_what_is_trained_and_what_is_not(monkeypatch, tmp_path):
    """What the compiled module lacks, since it does not compute with it, is held beside it: it is saved too."""

    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.register_buffer("table", torch.arange(2.0))
            self.register_buffer("unused", torch.arange(5.0))
            self.register_buffer("passing", torch.ones(6), persistent=False)

    held: dict[str, torch.Tensor] = {}
    specs = {
        name: SimpleNamespace(trained=name in ("weight", "bias")) for name in ("passing", "weight", "table", "bias")
    }
    module = SimpleNamespace(
        mesh=Mesh((2,), 3), buckets="buckets", state_on_host="host", specs=specs,
        hold_unused=held.update,
    )  # fmt: skip
    monkeypatch.setattr(loaded, "load_module", lambda *given: module if given == (tmp_path, "device") else None)
    monkeypatch.setattr(loaded, "ShardedOptimizer", lambda *given: given)
    monkeypatch.setattr(loaded, "fixed_state", lambda *given: given)
    found = loaded.LoadedModel(tmp_path, Source(Model, {}), "config", "device")  # type: ignore[arg-type]
    assert found.optimizer == ("buckets", "config", 2, "host")
    assert {name: (tuple(tensor.shape), tensor.is_meta) for name, tensor in held.items()} == {
        "frozen": ((4,), True), "unused": ((5,), False)
    }  # fmt: skip
    assert held["unused"].tolist() == [0, 1, 2, 3, 4]
    assert (found.fixed[0], sorted(found.fixed[1])) == (module, ["frozen", "table", "unused"])
    assert found.names == ["weight", "table", "bias"], "but not what no file holds"
    assert (found.mesh, type(found.model)) == (Mesh((2,), 3), Model)


def test_a_device_out_of_memory_is_told_with_what_the_plan_takes(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(json.dumps({"predicted": {"memory_bytes": 71.6 * 2**30}}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * 2**30)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 80 GiB"
    )
    assert str(loaded.out_of_memory(error, tmp_path, torch.device("cuda", 1))) == (
        "cuda:1 is out of memory: the plan takes 71.6 of its 80.0 GiB; the run holds 70.0, and 0.5 are free. Do other "
        "programs hold memory there? If not, --gpu_mem_constraint 69.6 plans for less (CUDA out of memory. Tried to "
        "allocate 2.00 GiB)"
    )
