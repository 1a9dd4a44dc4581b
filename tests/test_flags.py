"""Flags: said once with their fields, judged before torch is imported, and read from the command line or a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import bookcorpus
import ckpt_merger
import create_mini_model
import train
from nnscaler.batch import Batch, Division
from nnscaler.cli.config import (
    AdapterConfig,
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    LogConfig,
    LRSchedulerConfig,
    TrainerArgs,
)
from nnscaler.cli.flags import Flags, parse
from nnscaler.command import run
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.errors import UserError
from nnscaler.models.attention import IMPLEMENTATIONS
from nnscaler.options import REQUIRED, assignments, names, path, rules_of, switch, whole, words

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train", "bookcorpus", "create_mini_model", "ckpt_merger")
MODULES = ("nnscaler.report.__main__", "nnscaler.profiler.benchmark_comm", "examples.look")


@pytest.mark.parametrize("module", [*SCRIPTS, *MODULES])
def test_help_and_a_wrong_flag_wait_for_nothing_that_is_slow_to_import(module):
    """Whatever they import, they do without the packages that take seconds."""
    check = f"""
import sys, importlib
from nnscaler.cli.flags import Flags, parse
from nnscaler.command import run
for flag in ("--help", "--hepl"):
    sys.argv = ["command", flag]
    try:
        run(importlib.import_module({module!r}).main)
    except SystemExit as stopped:
        print("exit", stopped.code)
slow = sorted({{"torch", "transformers", "datasets", "huggingface_hub", "numpy", "pyarrow"}} & set(sys.modules))
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "exit 0" in done.stdout
    assert "exit 2" in done.stdout
    assert done.stderr == "error: there is no flag --hepl; did you mean --help?\n"


def answer(monkeypatch, capsys, main, *flags: str) -> str:
    """The one line that a command ends with when it fails."""
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


CONFIGURATIONS = (
    ComputeConfig, OptimizerConfig, LRSchedulerConfig, EvaluationConfig, CheckpointConfig, LogConfig, TrainerArgs,
)  # fmt: skip
PLAN = ("--model_id", "nowhere", "--sequence_length", "32", "--run_mode", "compile")


def numeric() -> list[tuple[str, str]]:
    """Every numeric flag of train.py, and values that none of them may have."""
    options = [pair for cls in (*CONFIGURATIONS,) for pair in rules_of(cls).items()]
    wrong = {int: ("-1", "x", "1.5", "", "nan", "9" * 30), float: ("-1", "x", "", "nan", "inf", "-inf", "1e300")}
    return [(option.flag or name, value) for name, option in options for value in wrong.get(option.kind, ())]


@pytest.mark.parametrize(("flag", "value"), numeric())
def test_every_number_has_bounds(monkeypatch, capsys, tmp_path, flag, value):
    monkeypatch.chdir(tmp_path)
    line = answer(monkeypatch, capsys, train.main, *PLAN, f"--{flag}", value)
    assert line.startswith(f"error: --{flag} is ")
    assert "it must be" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--clip_gnorm", "-1"), "--clip_gnorm is -1.0; it must be at least 0"),
        (("--learning_rate=nan",), "--learning_rate is nan; it must be a finite number, at least 0"),
        (("--min_learning_rate", "-3e-1"), "--min_learning_rate is -0.3; it must be at least 0 and at most 1"),
        (("--micro_batch_size", "two"), "--micro_batch_size is 'two'; it must be a whole number, at least 1"),
        (("--name", ""), "--name is ''; it must be a text that is not empty"),
        (("--name", "../llama"), "--name is '../llama'; it names folders: letters, digits and any of"),
        (("--name", "l" * 201), "--name has 201 bytes; it names folders, and may have at most 200"),
        (("--gen_savedir", ""), "--gen_savedir is ''; it must be a path"),
        (("--gen_savedir", "/dev/null/plans"), "gen_savedir is '/dev/null/plans', which cannot be written"),
        (("--recompute_modules", "A,,B"), "--recompute_modules is 'A,,B'; it must be names, with commas between them"),
        (("--explain", "perhaps"), "--explain is 'perhaps'; it must be true or false"),
        (("--set", "hidden_size"), "--set is 'hidden_size'; it must be FIELD=VALUE"),
        (("--lr_schedule", "cosin"), "--lr_schedule is 'cosin'; allowed are constant, linear, cosine"),
        (("--lora_alpha", "8"), "lora_alpha is 8.0, and there is no lora_rank, without which there are no adapters"),
        (("--plan_ngpu", "2"), "there is no flag --plan_ngpu; did you mean --plan_ngpus?"),
        (("--nonsense",), "there is no flag --nonsense\n"),
        (("--lr", "1"), "there is no flag --lr\n"),
        (("--steps", "1"), "there is no flag --steps; did you mean --eval_steps?"),
        (("--enable-chunk-los",), "there is no flag --enable-chunk-los; did you mean --enable-chunk-loss?"),
        (("--warmup_steps", "9", "--max_train_steps", "5"), "warmup_steps is 9; it must be at most max_train_steps=5"),
        (("--plan_ngpus",), "--plan_ngpus: expected one argument"),
        (
            ("--plan_ngpus", "two"),
            "plan_ngpus is 'two'; it must be a whole number, at least 1 and at most 1,048,576, or auto",
        ),
        (("--plan_ngpus", "auto"), "plan_ngpus is auto, which needs a global_batch_size"),
        (("--global_batch_size", "8"), "to divide a global_batch_size, --run_mode compile needs runtime_ngpus"),
        (
            ("--global_batch_size", "7", "--runtime_ngpus", "4", "--plan_ngpus", "2"),
            "global_batch_size is 7; with runtime_ngpus=4, plan_ngpus=2 (copies of the model: 2) it must be a multiple",
        ),
        (
            ("--global_batch_size=8", "--plan_ngpus=1", "--micro_batch_size=2", "--grad_accumulation_steps=8"),
            "grad_accumulation_steps=8 (copies of the model: 1) it must be 16",
        ),
        (("stray",), "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags_of_train(monkeypatch, capsys, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    line = answer(monkeypatch, capsys, train.main, *PLAN, *flags)
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "flags", "said"),
    [
        (train.main, ("--model_id", "m", "--dataset_path", "a=1", "b"), "dataset_path is 'b', which has no weight"),
        (train.main, ("--model_id", "m", "--dataset_path", ""), "--dataset_path is ''; it must be texts that are not"),
        (train.main, ("--model_id", "m"), "neither dataset_path nor sequence_length is given"),
        (train.main, ("--model_id", "m", "--sequence_length", "8"), "training needs a dataset_path"),
        (ckpt_merger.main, ("--ckpt_dir", "c", "--output_dir", "."), "is the folder that this command runs in"),
        (ckpt_merger.main, ("--ckpt_dir", "c", "--output_fname", "."), "output_fname is '.', which is a directory"),
        (
            ckpt_merger.main,
            ("--ckpt_dir", "c", "--output_fname", "/dev/null/x"),
            "output_fname's folder is '/dev/null', which",
        ),
        (ckpt_merger.main, ("--ckpt_dir", "c"), "nothing to write"),
        (create_mini_model.main, ("--model_id", "m", "--output_id", "."), "is the folder that this command runs in"),
        (create_mini_model.main, ("--output_id", "o"), "--model_id is not given"),
        (bookcorpus.main, ("--sequence_length", "1"), "--sequence_length is 1; it must be at least 2"),
    ],
)
def test_what_does_not_go_together(monkeypatch, capsys, tmp_path, main, flags, said):
    monkeypatch.chdir(tmp_path)
    if main is bookcorpus.main:
        flags += ("--data_path_or_name", "d", "--tokenizer_path_or_name", "t", "--save_path", "s")
    assert said in answer(monkeypatch, capsys, main, *flags)


@pytest.mark.parametrize(
    ("cls", "wrong", "said"),
    [
        (ComputeConfig, {"plan_ngpus": 0}, "plan_ngpus is 0; it must be at least 1"),
        (ComputeConfig, {"gpu_mem_constraint": float("nan")}, "gpu_mem_constraint is nan"),
        (ComputeConfig, {"micro_batches": True}, "micro_batches is True; it must be a whole number"),
        (OptimizerConfig, {"clip_gnorm": -1.0}, "clip_gnorm is -1.0; it must be at least 0"),
        (OptimizerConfig, {"lr": float("inf")}, "lr is inf; it must be a finite number"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "betas is"),
        (OptimizerConfig, {"betas": (-0.1, 0.9)}, "betas is"),
        (OptimizerConfig, {"betas": (0.9, 0.9, 0.9)}, "betas is (0.9, 0.9, 0.9); it must be two numbers"),
        (OptimizerConfig, {"eps": 0.0}, "eps is 0.0; it must be more than 0"),
        (LRSchedulerConfig, {"minimum": 1.5}, "minimum is 1.5; it must be at least 0 and at most 1"),
        (CheckpointConfig, {"keep": -1}, "keep is -1"),
        (LogConfig, {"interval": 0}, "interval is 0; it must be at least 1"),
    ],
)
def test_configurations_check_the_same(cls, wrong, said):
    with pytest.raises(UserError, match=re.escape(said)):
        cls(**wrong)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_file_of_flags_gives_way_to_the_command_line(monkeypatch, tmp_path, name):
    values = {
        "model-id": "m", "plan_ngpus": 2, "runtime_ngpus": 4, "learning_rate": 1e-3, "enable_chunk_loss": True,
        "recompute_modules": ["A", "B"], "set": {"rope_parameters": {"rope_type": "yarn"}, "hidden_size": 64},
        "gpu_mem_constraint": None, "sequence_length": 16, "run_mode": "compile", "explore_pipeline": True,
    }  # fmt: skip
    lines = json.dumps(values) if name == "run.json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items())
    (tmp_path / name).write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", name, "--plan-ngpus=4", "--explore_pipeline=false"])
    _, inputs, args = train.read_flags()
    assert (args.compute.plan_ngpus, args.compute.runtime_ngpus, args.optimizer.lr) == (4, 4, 1e-3)
    assert (args.compute.explore_pipeline, args.compute.recompute_modules) == (False, ("A", "B"))
    assert inputs.enable_chunk_loss
    assert inputs.set == {"rope_parameters": '{"rope_type": "yarn"}', "hidden_size": "64"}
    assert args.compute.gpu_mem_constraint is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("plan_ngpu: 2", "run.yaml: there is no flag plan_ngpu; did you mean plan_ngpus?"),
        ("plan_ngpus: 0", "run.yaml: plan_ngpus is 0; it must be at least 1"),
        ("plan_ngpus: [1, 2]", "run.yaml: plan_ngpus is '1,2'; it must be a whole number"),
        ("name: {a: 1}", "run.yaml: name has values by name; it takes one value"),
        ("- 1", "does not give values by name"),
        ("a: b: c", "is neither YAML nor JSON"),
        ("", "does not give values by name"),
    ],
)
def test_a_wrong_file_of_flags(monkeypatch, capsys, tmp_path, content, said):
    (tmp_path / "run.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert said in answer(monkeypatch, capsys, train.main, *PLAN, "--config", "run.yaml")


def test_the_document_s_commands_are_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bookcorpus_llama3_8K").mkdir()
    command = (
        "--name llama3-70b --model_id meta-llama/Meta-Llama-3-70B --dataset_path ./bookcorpus_llama3_8K "
        "--gpu_mem_constraint 153 --plan_ngpus=8 --runtime_ngpus=16 --explore_pipeline --grad_accumulation_steps 64 "
        "--pipeline_pivots LlamaDecoderLayer --recompute_modules LlamaDecoderLayer --enable-chunk-loss"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *command.split()])
    _, inputs, args = train.read_flags()
    assert inputs.enable_chunk_loss
    assert args.compute == ComputeConfig(
        8, 16, gpu_mem_constraint=153.0, micro_batches=64, explore_pipeline=True,
        pipeline_pivots=("LlamaDecoderLayer",), recompute_modules=("LlamaDecoderLayer",),
    )  # fmt: skip


def test_a_batch_leaves_open_what_no_flag_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def read(*flags: str) -> TrainerArgs:
        monkeypatch.setattr(sys, "argv", ["train.py", *PLAN, *flags])
        return train.read_flags()[2]

    plain = read()
    assert (plain.compute.plan_ngpus, plain.micro_batch_size, plain.compute.micro_batches) == (1, 1, 4)
    assert (plain.batch, plain.compute.explore_pipeline, plain.step_samples) == (None, False, 4)
    free = read("--global_batch_size", "64", "--runtime_ngpus", "8", "--plan_ngpus", "auto")
    assert (free.batch, free.compute.explore_pipeline, free.step_samples) == (Batch(64, 8), True, 64)
    some = ("--global_batch_size", "64", "--runtime_ngpus", "8", "--plan_ngpus", "2", "--explore_pipeline", "false")
    assert (read(*some).batch, read(*some).compute.explore_pipeline) == (Batch(64, 8, 2), False)
    assert read(*some, "--micro_batch_size", "4").batch == Batch(64, 8, 2, 4)
    assert read(*some, "--grad_accumulation_steps", "4").batch == Batch(64, 8, 2, None, 4)
    divided = read(*some).divided(Division(2, 4, 4))
    assert (divided.compute.plan_ngpus, divided.micro_batch_size, divided.compute.micro_batches) == (2, 4, 4)
    assert divided.batch is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read("--global_batch_size", "6").batch == Batch(6, 2), "torchrun has started two"


@pytest.mark.parametrize("cls", [*CONFIGURATIONS, train.Inputs, bookcorpus.Options, ckpt_merger.Options])
def test_every_flag_is_explained(cls):
    for option in rules_of(cls).values():
        assert len(option.help) > 10
        assert " GB" not in option.help


def test_the_attention_kernels_are_those_of_the_models():
    assert set(train.KERNELS) == set(IMPLEMENTATIONS)


def test_of_several_processes_one_tells_what_is_wrong(monkeypatch, capsys, tmp_path):
    def main() -> None:
        raise UserError("two\nlines")

    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit):
            run(main)
    assert capsys.readouterr().err == "error: two lines\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(main)
    assert capsys.readouterr().err == "error: two lines\n" * 2, "where no mark can be left, it is said all the same"


@dataclass(frozen=True)
class Walk:
    to: Path = path(REQUIRED, "where to")
    steps: int = whole(10, "steps to walk", least=1)
    through: tuple[str, ...] | None = names(None, "places")
    by: tuple[str, ...] = words((), "ways, for 100 % of them", flag="by-way")
    set: Mapping[str, str] = assignments("whatever else")
    fast: bool = switch("run, rather than walk")


def test_flags_are_spelled_as_on_a_command_line():
    rules = rules_of(Walk)
    rules = {rule.key(name): rule for name, rule in rules.items()}
    plain = {"steps": 10, "through": None, "by_way": (), "set": {}, "fast": False, "to": Path("a b")}
    assert Flags(plain, rules).spelled(list(plain)) == "--to 'a b'"
    given = {
        **plain,
        "steps": 12,
        "through": ("a", "b"),
        "by_way": ("x", "y z"),
        "set": {"k": "1", "m": "2"},
        "fast": True,
    }
    flags = Flags(given, rules)
    assert flags.spelled(list(given)) == (
        "--steps 12 --through a,b --by-way x 'y z' --set k=1 --set m=2 --fast --to 'a b'"
    )
    assert flags.spelled(["steps", "fast", "to"], steps=10, to=Path("c")) == "--fast --to c"
    quick = Flags(plain, {**rules, "fast": replace(rules["fast"], default=True)})
    assert quick.spelled(["fast"]) == "--fast false"
    assert flags.make(Walk, steps=3) == Walk(Path("a b"), 3, ("a", "b"), ("x", "y z"), given["set"], True)


def test_help_says_what_each_flag_takes_and_its_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["walk", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("Walks.", {"the walk": Walk}, {"steps": 20})
    text = " ".join(capsys.readouterr().out.split()) + " "
    for said in (
        "--config PATH YAML or JSON file of flags by name, without the hyphens in front; the command line takes "
        "precedence", "the walk:", "--steps N steps to walk (default: 20) --through NAME,... places --by-way",
        "--by-way NAME,... [NAME,... ...] ways, for 100 % of them --set", "--set FIELD=VALUE whatever else",
        "--fast [true|false] run, rather than walk", "--to PATH where to. Required",
    ):  # fmt: skip
        assert f"{said} " in text, said
    assert "] Walks. options:" in text
    assert text.count("(default: ") == 1, "where there is something to say"


def test_a_file_of_flags_that_is_no_text(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"steps: \xff")
    monkeypatch.setattr(sys, "argv", ["walk", "--config", f"{tmp_path}/run.yaml"])
    with pytest.raises(UserError, match="which cannot be read: 'utf-8' codec can't decode byte 0xff"):
        parse("Walks.", {"the walk": Walk})


def test_flags_that_are_given_several_times_or_with_several_words(monkeypatch):
    words = "--to x --set a=1 --set b=2 --by-way one two --by_way three --through p,q --fast".split()
    monkeypatch.setattr(sys, "argv", ["walk", *words])
    found = parse("Walks.", {"the walk": Walk}).make(Walk)
    assert found == Walk(Path("x"), 10, ("p", "q"), ("one", "two", "three"), {"a": "1", "b": "2"}, True)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (bookcorpus, {"prompt_column": "p"}, "prompt_column and completion_column go together"),
        (bookcorpus, {"completion_column": "c"}, "prompt_column and completion_column go together"),
        (bookcorpus, {"text_column": "t", "messages_column": "m"}, "text_column and messages_column are both given"),
        (
            bookcorpus,
            {"messages_column": "m", "prompt_column": "p", "completion_column": "c"},
            "messages_column and prompt_column are both given",
        ),
        (bookcorpus, {"chat_template": Path("no_such.jinja")}, "chat_template is 'no_such.jinja', which is not a file"),
        (ckpt_merger, {"tensors": True, "verify": True}, "tensors goes with --list, which is not given"),
        (ckpt_merger, {}, "nothing to write: give --output_fname, --output_dir or both"),
        (ckpt_merger, {"output_fname": Path()}, "which is a directory; it must be a file"),
    ],
)
def test_flags_of_scripts_that_do_not_go_together(script, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    required = {
        bookcorpus: {
            "data_path_or_name": "x", "tokenizer_path_or_name": "y", "save_path": "z", "sequence_length": 8,
        },
        ckpt_merger: {"ckpt_dir": Path("x")},
    }  # fmt: skip
    with pytest.raises(UserError, match=said):
        script.Options(**required[script], **flags)


def test_what_is_packed_is_told_by_the_columns(tmp_path):
    given = {
        "data_path_or_name": "x",
        "tokenizer_path_or_name": "y",
        "save_path": f"{tmp_path}/z",
        "sequence_length": 8,
    }
    for flags, talks in [
        ({}, False), ({"text_column": "t"}, False), ({"messages_column": "m"}, True),
        ({"prompt_column": "p", "completion_column": "c"}, True),
    ]:  # fmt: skip
        assert bookcorpus.Options(**given, **flags).talks is talks


def test_files_are_listed_up_to_three():
    files = [Path(name) for name in "abcdef"]
    assert [bookcorpus.listed(files[:count]) for count in (1, 3, 4, 6)] == [
        "a", "a, b, c", "a, b, c and 1 more file", "a, b, c and 3 more files",
    ]  # fmt: skip


# What a flag needs beside it; and what is given where any text will not do.
NEEDS = {
    "pipeline_pivots": ("--explore_pipeline",), "pipeline_schedule": ("--explore_pipeline",),
    "pipeline_nstages": ("--explore_pipeline",), "document_length": ("--document_mask",),
    "global_batch_size": ("--runtime_ngpus", "5"), "fp8_keep_bf16": ("--precision", "fp8"),
    "lora_alpha": ("--lora_rank", "4"), "lora_target_modules": ("--lora_rank", "4"),
}  # fmt: skip
GIVEN = {
    "hardware": "h100", "trace_strategy": "meta", "dataset_path": "there", "eval_dataset_path": "there",
    "fp8_keep_bf16": "first",
}  # fmt: skip
GIVES = {int: ("5", 5), float: ("0.25", 0.25), bool: ("true", True), dict: ("a=1", {"a": "1"})}
FLAGS = [(cls, name, rule) for cls in train.GROUPS.values() for name, rule in rules_of(cls).items()]


@pytest.mark.parametrize(("cls", "field", "rule"), FLAGS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_flag_of_train_arrives_where_it_is_read(monkeypatch, tmp_path, cls, field, rule):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nnscaler.cli.config.find_spec", lambda package: package)
    (tmp_path / "there").mkdir()
    others = [choice for choice in rule.allowed() or () if choice != rule.default]
    text = GIVEN.get(field) or (others[-1] if others else "other")
    value = {Path: Path(text), tuple: (text,), str: text}.get(rule.kind)
    text, value = GIVES.get(rule.kind, (text, value))
    assert value != rule.default, "it would not show"
    given = (*PLAN, *NEEDS.get(field, ()), f"--{rule.flag or field}", text)
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    flags, inputs, args = train.read_flags()
    place = {
        train.Inputs: inputs, AdapterConfig: flags.make(AdapterConfig), DatasetConfig: flags.make(DatasetConfig),
        TrainerArgs: args, ComputeConfig: args.compute, OptimizerConfig: args.optimizer,
        LRSchedulerConfig: args.lr_scheduler, EvaluationConfig: args.evaluation, CheckpointConfig: args.checkpoint,
        LogConfig: args.log,
    }[cls]  # fmt: skip
    assert getattr(place, field) == value


def test_what_no_flag_says_is_as_the_readme_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *PLAN])
    _, _, args = train.read_flags()
    assert (args.name, args.optimizer.lr, args.compute.micro_batches, args.micro_batch_size) == ("llama", 5e-5, 4, 1)
    assert (args.optimizer.betas, args.optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (args.optimizer.weight_decay, args.optimizer.clip_gnorm) == (0.1, 1.0)
    schedule = args.lr_scheduler
    assert (schedule.schedule, schedule.warmup_steps, schedule.minimum) == ("cosine", 0, 0.1)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert train.read_flags()[2].compute.runtime_ngpus == 6, "as many as torchrun has started"
    monkeypatch.setattr(sys, "argv", ["train.py", *PLAN, "--plan_ngpus", "2", "--runtime_ngpus", "4"])
    assert train.read_flags()[2].compute.runtime_ngpus == 4
