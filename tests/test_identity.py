"""A compiled directory is used for nothing but what it was compiled for, and replaces nothing that no compile wrote."""

import functools
import importlib
import json
import os
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler import ComputeConfig, Source, UserError, compile_model, register_op
from nnscaler.batch import Batch
from nnscaler.compiler import check_replaceable, differences, identity
from nnscaler.directory import check_name
from nnscaler.identity import _content, _package_digest, _sources
from nnscaler.operators import registry
from tests import tiny

MODULE = """
import os
import torch
from torch import nn

def factor():
    return 2.0

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._power = 1

    def forward(self, x):
        return self.linear(x).pow(self._power).mul(factor()).add(float(os.environ.get("TEST_SHIFT", 0))).sum()
"""


class Scaled(nn.Module):
    def __init__(self, value=1.0, rows=1):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(rows))
        self.register_buffer("factors", torch.full((4,), value), persistent=False)

    def forward(self, x):
        return (self.second(self.first(x)) * self.factors * self.scale).sum()


class Written:
    """A model whose code is a file, and what it was compiled to."""

    def __init__(self, folder):
        self.file, self.config = folder / "written_model.py", ComputeConfig(hardware=tiny.write_hardware(folder))
        self.write(MODULE)
        self.code = compile_model(self.source(), self.config, folder / "code")

    def write(self, text):
        self.file.write_text(text)
        os.utime(self.file, (0, len(text)))  # so that Python sees another file within the same second
        sys.modules.pop("written_model", None)
        importlib.invalidate_caches()

    def source(self, power=1):
        def make():
            model = importlib.import_module("written_model").Model()
            model._power = power
            return model

        return Source(make, {"x": torch.zeros(2, 4)}, torch.float32)

    def differences(self, **changes):
        source = self.source(**changes)
        return differences(self.code, identity(source, source.build(), self.config))


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield Written(tmp_path)
    sys.modules.pop("written_model", None)


def test_it_is_used_again_where_nothing_changed(written):
    assert written.differences() == []
    written.write(MODULE)
    assert written.differences() == []


@pytest.mark.parametrize(
    ("old", "new"), [(".sum()", ".mean()"), ("return 2.0", "return 3.0"), ("mul(factor())", "mul(2.0)")]
)
def test_edited_code_is_compiled_again(written, old, new):
    written.write(MODULE.replace(old, new))
    assert "sources.written_model: changed" in written.differences()


def test_attributes_and_the_environment_that_forward_reads_tell_models_apart(written, monkeypatch):
    assert "model: changed" in written.differences(power=2)
    monkeypatch.setenv("TEST_SHIFT", "1")
    assert any(text.startswith("model: ") for text in written.differences())


def frozen():
    model = Scaled()
    model.first.requires_grad_(False)
    return model


def tied():
    model = Scaled()
    model.second.weight = model.first.weight
    return model


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (frozen, "parameters"), (tied, "parameters"), (lambda: Scaled(rows=4), "parameters"),
        (lambda: Scaled(2.0), "buffers"),
    ],
    ids=["frozen", "tied", "shape", "buffer"],
)  # fmt: skip
def test_what_does_not_show_in_the_calls_of_forward_tells_models_apart(tmp_path, make, what):
    config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))

    def source(make):
        return Source(make, {"x": torch.zeros(2, 4)}, torch.float32)

    code = compile_model(source(Scaled), config, tmp_path / "code")
    assert differences(code, identity(source(Scaled), source(Scaled).build(), config)) == []
    found = differences(code, identity(source(make), source(make).build(), config))
    assert what in [text.split(":")[0] for text in found]


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_another_version_is_compiled_again(written, monkeypatch, module):
    importlib.import_module(module)
    monkeypatch.setattr(sys.modules[module], "__version__", "99.0")
    assert any("wanted 99.0" in text for text in written.differences())


def test_another_operator_is_compiled_again(written, monkeypatch):
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))

    def test_identity_op(x):
        return x

    register_op("a b -> a b")(test_identity_op)
    first = written.differences()
    assert any(text.startswith("operators.test_identity_op") for text in first)
    register_op("a^ b -> a^ b")(test_identity_op)
    assert written.differences() != first


@pytest.mark.parametrize("kind", ["autograd", "partial", "compiled"])
def test_an_operator_with_other_code_behind_it_is_compiled_again(written, monkeypatch, kind):
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))

    def registered(factor: int) -> list[str]:
        class TestIdentity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x

            @staticmethod
            def backward(ctx, gradient):
                return gradient * factor

        function = {
            "autograd": TestIdentity.apply,
            "partial": functools.partial(lambda x, by: x * by, by=factor),
            "compiled": torch.compile(lambda x: x * factor),
        }[kind]
        monkeypatch.delitem(registry._operators, "test_identity_op", raising=False)
        register_op("a b -> a b", name="test_identity_op")(function)
        return written.differences()

    first = registered(2)
    assert any(text.startswith("operators.test_identity_op") for text in first)
    assert registered(2) == first
    assert registered(3) != first


def test_what_is_executed_to_be_traced_is_compiled_again(written):
    config = ComputeConfig(hardware=written.config.hardware, trace_strategy="cpu")
    compile_model(written.source(), config, written.code)
    source = written.source()
    assert differences(written.code, identity(source, source.build(), config)) == [
        "model: compiled known only when it is executed, wanted known only when it is executed"
    ]


def test_only_what_a_compile_wrote_is_replaced(tmp_path):
    config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))
    source = Source(lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(8, 1)), {"input": torch.ones(2, 4)})
    code = tmp_path / "code"
    code.mkdir()
    for _ in range(2):  # an empty folder, and one that a compile made
        compile_model(source, config, code)
    (code / "thesis.txt").write_text("years of work")
    (code / "gencode_stage7.py").write_text("of a compile before")
    compile_model(source, config, code)
    assert (code / "thesis.txt").read_text() == "years of work"
    assert not (code / "gencode_stage7.py").exists()
    assert differences(code, identity(source, source.build(), config)) == []
    for path in (tmp_path / "file", tmp_path / "link", tmp_path / "plans"):
        if path.name == "file":
            path.write_text("")
        elif path.name == "link":
            path.symlink_to(code)
        else:
            path.mkdir()
            (path / "plan.json").write_text("{}")
        with pytest.raises(UserError, match=r"not a folder that a compile made"):
            check_replaceable(path)


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/tmp/x", "a/b", "a\\b", "-x", ".hidden", "a\n", "a\0"])
def test_names_are_names(name):
    with pytest.raises(UserError, match="it names folders"):
        check_name(name)
    check_name("Llama-3_8B.long@128k")


# For each field of a configuration, values that are neither each other's nor the default.
OTHERS = {
    "plan_ngpus": (2, 4), "runtime_ngpus": (8, 4), "trace_strategy": ("meta",), "pas_policy": ("dp", "tp"),
    "gpu_mem_constraint": (1.0, 2.0), "offload": ("off",), "host_mem_constraint": (0.0, 3.0),
    "recompute_modules": ((), ("A",), ("A", "B")), "micro_batches": (2, 3), "grad_reduce_dtype": ("bf16",),
    "hardware": ("h100", "h200"), "devices_per_node": (2, 4), "search_seconds": (1.0, 2.0),
    "explore_pipeline": (True,), "pipeline_pivots": (("A",), ("B",)), "pipeline_schedule": ("1f1b", "zb-v"),
    "pipeline_nstages": (2, 4),
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Of what takes long to find out, nothing differs."""
    for name in ("observed", "_package_digest", "all_registered"):
        monkeypatch.setattr(f"nnscaler.identity.{name}", lambda *given: [])


@pytest.mark.parametrize("name", [field.name for field in fields(ComputeConfig)])
def test_each_field_of_a_configuration_counts(tmp_path, quick, name):
    model = nn.Linear(2, 2)
    source = Source(lambda: model, {"x": torch.zeros(2, 2)})
    seen = [identity(source, (model, {}), ComputeConfig(1, 16, hardware="a100"))]
    for value in OTHERS[name]:
        config = ComputeConfig(1, 16, hardware="a100")
        object.__setattr__(config, name, value)  # whatever else would have to go with it
        wanted = identity(source, (model, {}), config)
        for other in seen:
            (tmp_path / "compiled.json").write_text(json.dumps(other))
            assert any(f"config.{name}: " in text for text in differences(tmp_path, wanted)), value
        seen.append(wanted)
    (tmp_path / "compiled.json").write_text(json.dumps(wanted))
    assert differences(tmp_path, wanted) == []


def test_what_else_a_compile_depends_on(tmp_path, monkeypatch, quick):
    config, model = ComputeConfig(hardware="a100"), nn.Linear(2, 2)

    def of(shape=(2, 2), kind=torch.float32, dtype=torch.bfloat16, name="x", batch=None, **fp8):
        source = Source(lambda: model, {name: torch.zeros(shape, dtype=kind)}, dtype, **fp8)
        return identity(source, (model, {}), config, batch=batch)

    (tmp_path / "compiled.json").write_text(json.dumps(of()))
    assert differences(tmp_path, of()) == []
    for changed in (
        of((2, 3)), of(kind=torch.int64), of(dtype=torch.float32), of(name="y"), of(batch=Batch(8, 1)),
        of(fp8=True),
    ):  # fmt: skip
        assert differences(tmp_path, changed)
    (tmp_path / "compiled.json").write_text(json.dumps(of(fp8=True)))
    assert differences(tmp_path, of(fp8=True, fp8_keep_bf16=("last",)))
    (tmp_path / "compiled.json").write_text(json.dumps(of(batch=Batch(8, 1))))
    for batch in (Batch(16, 1), Batch(8, 2), Batch(8, 1, 1), Batch(8, 1, None, 2), Batch(8, 1, None, None, 4)):
        assert differences(tmp_path, of(batch=batch))
    (tmp_path / "compiled.json").write_text(json.dumps(of()))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert differences(tmp_path, of()) == ["deterministic: compiled False, wanted True"]
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert len(differences(tmp_path, of())) == 2


def closing_over(value: object):
    return lambda: value


def test_what_a_function_computes_tells_it_apart():
    """Functions of one name: by their code, constants, names, defaults, and what they close over; not by an address."""
    functions = [
        lambda x: x, lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, lambda x: len(x), lambda x: max(x),
        lambda x=1: x, lambda x=2: x, lambda *, x=1: x, lambda *, x=2: x, lambda: [y + 1 for y in ()],
        lambda: [y + 2 for y in ()], closing_over(1), closing_over(2), closing_over(closing_over(1)),
        functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1), functools.partial(max, key=1),
        functools.partial(max, key=2),
    ]  # fmt: skip
    values = [*functions, 1, True, "1", None, (1, 2), (2, 1), {"a": 1}, {"b": 1}, {"a": 2}, Batch(8, 1), Batch(8, 2)]
    texts = [_content(value) for value in values]
    assert len(set(texts)) == len(values)
    assert texts == [_content(value) for value in values]
    assert not any("0x" in text for text in texts)


def test_code_of_base_classes_of_a_policy_and_of_operators_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "written_base.py").write_text("from torch import nn\nclass Base(nn.Module):\n    pass\n")
    (tmp_path / "written_child.py").write_text("from written_base import Base\nclass Child(Base):\n    pass\n")
    (tmp_path / "written_policy.py").write_text("def policy(graph):\n    pass\n")
    (tmp_path / "written_operator.py").write_text("def operator(x):\n    return x\n")
    operators = [SimpleNamespace(function=importlib.import_module("written_operator").operator)]
    monkeypatch.setattr("nnscaler.identity.all_registered", lambda: [*operators, SimpleNamespace(function=None)])
    model = nn.Sequential(importlib.import_module("written_child").Child())
    config = ComputeConfig(hardware="a100", pas_policy=importlib.import_module("written_policy").policy)
    found = _sources(model, config)
    assert {"written_base", "written_child", "written_policy", "written_operator"} <= set(found)
    assert not any(name.split(".")[0] in ("torch", "nnscaler", "builtins") for name in found)
    for name in ("written_base", "written_policy", "written_operator"):
        (tmp_path / f"{name}.py").write_text("# edited\n")
        edited = _sources(model, config)
        assert [other for other in found if edited[other] != found[other]] == [name]
        found = edited


def test_another_version_of_the_package_is_told_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("nnscaler.identity.__file__", str(tmp_path / "identity.py"))
    for name in ("identity.py", "inner/plan.py", "inner/h100.json", "about.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seen = {_package_digest()}
    for name in ("identity.py", "inner/plan.py", "inner/h100.json", "inner/new.py"):
        (tmp_path / name).write_text("edited")
        assert _package_digest() not in seen, name
        seen.add(_package_digest())
    (tmp_path / "inner" / "plan.py").rename(tmp_path / "plan.py")
    assert _package_digest() not in seen, "another place is another module"
    seen.add(_package_digest())
    (tmp_path / "about.txt").write_text("edited")
    assert _package_digest() in seen


def test_policies_of_one_name_are_told_apart_by_their_code(quick):
    model = nn.Linear(2, 2)
    source = Source(lambda: model, {"x": torch.zeros(2, 2)})
    first, other = (
        identity(source, source.build(), ComputeConfig(hardware="a100", pas_policy=policy))["config"]["pas_policy"]
        for policy in (lambda graph: graph.store("a"), lambda graph: graph.store("b"))
    )
    assert first != other
    assert "0x" not in first
