"""README.rst and docs/: what they show runs, and the flags, files and modules that they name exist."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.run import get_args_parser

import train
from nnscaler.data.training import PackedDataset
from nnscaler.operators import registry

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "advanced_llama_example.rst"  # kept as it came: its commands count, not what it names
OURS = [ROOT / "README.rst", ROOT / "benchmarks" / "README.rst", *sorted(set(ROOT.glob("docs/*.rst")) - {DOCUMENT})]
names = pytest.mark.parametrize("page", OURS, ids=lambda page: page.relative_to(ROOT).as_posix())

# Flags of other programs that the texts name, beside torchrun's.
BENCHMARKS = ("benchmarks/readme.py", "benchmarks/train_llama.py")
OTHERS = {"--index-url", "--version", "--shutdown-timeout"}  # of pip, of tools, of torchrun since torch 2.13


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without their indentation."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)"
    found = re.findall(pattern, page.read_text() + "\n", re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of the code blocks of a shell, in words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"<[\w ]+>", "1", line), comments=True)
            if words:
                yield words


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a script or module of this repository takes, out of its own help."""
    start = ["-m", script] if "." in script and not script.endswith(".py") else [script]
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<!\S)--[\w-]+", done.stdout))


@cache
def torchrun_flags() -> set[str]:
    return {flag for action in get_args_parser()._actions for flag in action.option_strings}


def script_of(words: list[str]) -> str | None:
    """The script or module of this repository that a command runs."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    return next((word for word in words if word.endswith(".py")), None)


@pytest.mark.parametrize("page", [*OURS, DOCUMENT], ids=lambda page: page.name)
def test_every_flag_in_a_command_is_one_of_its_program(page):
    for words in commands(page):
        script = script_of(words)
        if script is None:
            continue
        at = words.index(script)
        before, after = words[:at], words[at + 1 :]
        assert {word.partition("=")[0] for word in before if word.startswith("--")} <= torchrun_flags(), words
        given = {word.partition("=")[0] for word in after if word.startswith("--")}
        assert not given or given <= flags_of(script), words


def test_every_command_that_plans_or_trains_is_judged_right(monkeypatch, tmp_path):
    """As far as flags can be judged without the model and the data."""
    monkeypatch.chdir(tmp_path)
    seen = 0
    for page in (*OURS, DOCUMENT):
        for words in commands(page):
            if script_of(words) != "train.py":
                continue
            before, flags = words[: words.index("train.py")], words[words.index("train.py") + 1 :]
            flags = flags[: flags.index("2>&1")] if "2>&1" in flags else flags
            for flag in flags:
                if flag.startswith("--") and flag.endswith("dataset_path"):
                    given = takewhile(lambda word: not word.startswith("--"), flags[flags.index(flag) + 1 :])
                    for one in given:
                        Path(one.partition("=")[0]).mkdir(parents=True, exist_ok=True)
            counts = dict(word.split("=", 1) for word in before if "=" in word)
            devices = int(counts.get("--nnodes", 1)) * int(counts.get("--nproc_per_node", 1))
            if devices > 1:
                monkeypatch.setenv("WORLD_SIZE", str(devices))
            monkeypatch.setattr(sys, "argv", ["train.py", *flags])
            _, _, args = train.read_flags()
            assert devices in (1, args.compute.runtime_ngpus), words
            monkeypatch.delenv("WORLD_SIZE", raising=False)
            seen += 1
    assert seen >= 9


@names
def test_every_flag_that_is_named_exists(page):
    known = OTHERS | torchrun_flags()
    for script in ("train.py", "bookcorpus.py", "create_mini_model.py", "ckpt_merger.py", *BENCHMARKS):
        known |= flags_of(script)
    spelled = {flag.replace("_", "-") for flag in known}
    text = " ".join(re.findall(r"``(.+?)``", page.read_text(), re.DOTALL))
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert flag.replace("_", "-") in spelled, f"{page.name} names {flag}"


def exists(name: str) -> bool:
    """Whether it is a module, or a name in one."""
    module, _, last = name.rpartition(".")
    return hasattr(importlib.import_module(module), last) or importlib.util.find_spec(name) is not None


@names
def test_every_file_and_module_that_is_named_exists(page):
    text = page.read_text()
    literals = set(re.findall(r"``([^`\s]+)``", text))
    files = {name for name in literals if re.fullmatch(r"(nnscaler|benchmarks|docs|tests|examples)/[\w./-]*", name)}
    files |= {name for name in literals if re.fullmatch(r"\w[\w-]*\.(py|rst)", name) and "gencode" not in name}
    assert files
    for name in files:
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"
    for link in re.findall(r"<([\w./-]+)>`__", text) + re.findall(r"\.\. image:: (\S+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for words in commands(page):
        script = script_of(words)
        if script is not None:
            at_hand = ROOT / (f"{script.replace('.', '/')}.py" if "-m" in words else script)
            assert at_hand.exists(), words
    for name in re.findall(r"``(?:python -m )?(nnscaler(?:\.\w+)+)", text):
        assert exists(name), f"{page.name} names {name}"


def test_the_examples_of_annotations_are_true():
    done = doctest.testfile(str(ROOT / "docs" / "annotations.rst"), module_relative=False)
    assert done.attempted > 15
    assert done.failed == 0


def test_the_code_that_extends_the_compiler_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))
    page = ROOT / "docs" / "extending.rst"
    (description,) = blocks(page, "json")
    Path("imaginary.json").write_text(description)
    module = ModuleType("extending")
    monkeypatch.setitem(sys.modules, "extending", module)
    code = blocks(page, "python")
    assert len(code) >= 7
    for block in code:
        exec(compile(block, str(page), "exec"), vars(module))


def test_own_data_made_by_hand_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks(ROOT / "README.rst", "python") if "save_to_disk" in block)
    exec(compile(block, "README.rst", "exec"), {})
    assert PackedDataset.open(Path("my_rows")).sequence_length == 512


def test_messages_spell_the_flags_of_train_py_as_its_help_does():
    usual = {flag.replace("_", "-"): flag for flag in flags_of("train.py")}
    for source in (ROOT / "train.py", *ROOT.glob("nnscaler/**/*.py")):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", source.read_text()):
            assert usual.get(flag.replace("_", "-"), flag) == flag, source
