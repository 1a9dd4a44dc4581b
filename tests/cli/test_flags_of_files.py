"""Flags that a file gives, in the ways in which YAML and JSON may write them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest

from nnscaler.cli.flags import Flags, parse
from nnscaler.errors import UserError
from nnscaler.options import assignments, check, names, number, switch, whole, words


@dataclass(frozen=True)
class Walk:
    """A walk."""

    steps: int = whole(10, "steps", least=1, flag="number-of-steps")
    speed: float | None = number(None, "speed", above=0)
    fast: bool = switch("fast")
    along: tuple[str, ...] = names((), "along")
    people: tuple[str, ...] | None = words(None, "people")
    own: dict[str, str] = assignments("own")  # noqa: RUF009  a field, as the others

    def __post_init__(self) -> None:
        check(self)


def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, content: str, *more: str) -> Flags:
    (tmp_path / "walk.yaml").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["walk", "--config", str(tmp_path / "walk.yaml"), *more])
    return parse("Walks.", {"the walk": Walk})


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("people: [a b, 'c=1']", "people", ("a b", "c=1")), ("people: a, b", "people", ("a, b",)),
        ("along: [a, b]", "along", ("a", "b")), ("along: a, b", "along", ("a", "b")),
        ("own: {a: 1, b: true, c: [1, 2]}", "own", {"a": "1", "b": "true", "c": "1,2"}),
        ("own: ['a=1', 'b=x=y']", "own", {"a": "1", "b": "x=y"}), ("own: a=1", "own", {"a": "1"}),
        ("fast: true", "fast", True), ("fast: false", "fast", False), ("fast: null", "fast", False),
        ("number-of-steps: 5", "number_of_steps", 5), ("--number_of_steps: 5", "number_of_steps", 5),
        ("speed: 1.0e-3", "speed", 0.001), ('{"speed": 2}', "speed", 2.0), ("speed:", "speed", None),
        ("people: [é]", "people", ("é",)),
    ],
)  # fmt: skip
def test_values_are_those_of_the_same_flags(monkeypatch, tmp_path, content, name, value):
    found = parsed(monkeypatch, tmp_path, content)[name]
    assert (found, type(found)) == (value, type(value))


def test_what_the_command_line_gives_takes_the_place_of_all_that_the_file_does(monkeypatch, tmp_path):
    content = "people: [a, b]\nown: {a: 1, b: 2}\nfast: true\nspeed: 3"
    found = parsed(monkeypatch, tmp_path, content, "--people", "c", "--own", "c=3", "--fast", "false").make(Walk)
    assert found == Walk(10, 3.0, False, (), ("c",), {"c": "3"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("speed: {a: 1}", "walk.yaml: speed has values by name; it takes one value"),
        ("speed: 0", "walk.yaml: speed is 0.0; it must be more than 0"),
        ("sped: 1", "walk.yaml: there is no flag sped; did you mean speed?"),
        ("- a", "walk.yaml', which does not give values by name"),
        ("a: [", "walk.yaml', which is neither YAML nor JSON: "),
    ],
)
def test_a_wrong_value_is_said_with_the_file(monkeypatch, tmp_path, content, said):
    with pytest.raises(UserError) as refused:
        parsed(monkeypatch, tmp_path, content)
    assert said in str(refused.value)
