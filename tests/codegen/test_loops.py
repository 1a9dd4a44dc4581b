"""Loops over calls in generated code, run as they are written: each call once, in order, with its own parameters."""

from __future__ import annotations

import pytest

from nnscaler.codegen.loops import VARIABLES, over_calls, over_groups
from nnscaler.codegen.stage import _fact
from nnscaler.graph import Call

NAMES = {name: f"{name}_2" for name in VARIABLES}  # as where these names are taken
MODULES = {
    "from the first on": [f"model.layers.{i}" for i in range(12)],
    "from a later one on": [f"model.layers.{i}" for i in range(8, 12)],
    "backwards": ["layers.3", "layers.2", "layers.1", "layers.0"],
    "with a gap": ["layers.0", "layers.1", "layers.3", "layers.4"],
    "of two lists": ["first.0", "first.1", "second.2", "second.3"],
    "with a name first": ["layers.x", "layers.0", "layers.1", "layers.2"],
    "with a name between": ["layers.0", "layers.x", "layers.2", "layers.3"],
    "with zeros in front": ["layers.01", "layers.02", "layers.03", "layers.04"],
    "by names": ["encoder", "decoder", "middle", "last"],
    "one": ["layers.5"],
}


def calls_of(modules: list[str]) -> list[Call]:
    return [Call("call", "call", (), {}, (), module=module) for module in modules]


def run(lines: list[str]) -> list[str]:
    found: list[str] = []
    exec("\n".join(lines), {"found": found})
    return found


@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_a_loop_goes_through_all_calls(modules: list[str]) -> None:
    head, prefix = over_calls(calls_of(modules), NAMES)
    assert bool(head) == (len(modules) > 1)
    lines = [head, f"    found.append({prefix})"] if head else [f"found.append({prefix})"]
    assert run(lines) == [f"{module}." for module in modules]


def test_counted_modules_are_counted_and_others_listed() -> None:
    assert over_calls(calls_of(MODULES["from the first on"]), NAMES)[0] == "for i_2 in range(12):"
    assert over_calls(calls_of(MODULES["from a later one on"]), NAMES)[0] == "for i_2 in range(8, 12):"
    assert over_calls(calls_of(["b", "a"]), NAMES) == ('for prefix_2 in ("b.", "a."):', "prefix_2")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("modules", [one for one in MODULES.values() if len(one) > 1])
def test_a_loop_goes_through_all_groups(modules: list[str], size: int) -> None:
    groups = over_groups(calls_of(modules), size, NAMES)
    assert bool(groups.head) == (len(modules) > size)
    lines = [f"def group({groups.parameter}):", "    here = []", f"    {groups.inner}"]
    lines += [f"        here.append({groups.prefix})", "    found.append(here)"]
    lines += [groups.head, f"    group({groups.given})"] if groups.head else [f"group({groups.given})"]
    prefixes = [f"{module}." for module in modules]
    assert run(lines) == [prefixes[start : start + size] for start in range(0, len(modules), size)]


def test_a_fact_stays_text_whatever_it_holds() -> None:
    lines = _fact("model", 'a """path""" with C:\\new and ' + "words " * 40)
    assert len(lines) == 3
    assert all(len(line) <= 119 for line in lines)
    assert lines[0].startswith("model      a ")
    assert all(line.startswith(" " * 11) for line in lines[1:])
    text = eval('"""' + "\n".join(lines) + '"""')
    assert "C:\\new" in text
    assert "'''path'''" in text
