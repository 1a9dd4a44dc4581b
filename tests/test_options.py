"""What a field of a configuration may be, and how it is read from a command line or a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nnscaler.errors import UserError
from nnscaler.options import (
    REQUIRED,
    Rule,
    assignments,
    check,
    described,
    names,
    number,
    path,
    rules_of,
    spelled,
    switch,
    text,
    whole,
    words,
)


def only_here(value: Any, name: str) -> None:
    if value != "here":
        raise UserError(f"{name} is not here")


@described
@dataclass(frozen=True)
class Walk:
    """A walk."""

    to: str = text(REQUIRED, "where to")
    steps: int = whole(10, "steps", least=2, most=20, flag="number-of-steps")
    speed: float = number(1.0, "speed", above=0, most=3)
    rest: float | None = number(None, "rest")
    pause: int | None = whole(0, "pause", optional=True)
    way: str = text("road", "way", choices=lambda: ("road", "path"))
    empty: str = text("", "may be empty")
    along: tuple[str, ...] = names((), "along")
    people: tuple[str, ...] | None = words(None, "people")
    home: Path = path(Path("~"), "home")
    fast: bool = switch("fast")
    judged: str | object = text("here", "judged", judge=only_here, or_function=True)
    devices: int = whole(1, "devices", or_auto=True)
    own: dict[str, str] = assignments("own")  # noqa: RUF009  a field, as the others
    plain: float = field(default=-1.0)  # which nobody checks

    def __post_init__(self) -> None:
        check(self)


RULES = rules_of(Walk)


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 2}, {"steps": 20}, {"speed": 3}, {"speed": 1e-30}, {"rest": -5}, {"rest": None}, {"pause": None},
        {"pause": 10**60}, {"way": "path"}, {"empty": ""}, {"along": ("a",)}, {"people": ("a b", "c")}, {"fast": True},
        {"judged": only_here}, {"home": Path("a b")}, {"own": {"a": "1"}}, {"plain": math.nan},
    ],
)  # fmt: skip
def test_what_is_allowed(given):
    assert getattr(Walk("x", **given), next(iter(given))) == pytest.approx(next(iter(given.values())), nan_ok=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 1}, "steps is 1; it must be at least 2 and at most 20"),
        ({"steps": 21}, "steps is 21; it must be at least 2 and at most 20"),
        ({"steps": 2.0}, "steps is 2.0; it must be a whole number, at least 2 and at most 20"),
        ({"steps": True}, "steps is True; it must be a whole number, at least 2 and at most 20"),
        ({"speed": "fast"}, "speed is 'fast'; it must be a number, more than 0 and at most 3"),
        ({"steps": None}, "steps is None; it must be a whole number, at least 2 and at most 20"),
        ({"speed": 0}, "speed is 0; it must be more than 0 and at most 3"),
        ({"speed": 3.5}, "speed is 3.5; it must be more than 0 and at most 3"),
        ({"speed": True}, "speed is True; it must be a number, more than 0 and at most 3"),
        ({"speed": math.nan}, "speed is nan; it must be a finite number, more than 0 and at most 3"),
        ({"rest": 1e39}, "rest is 1e+39; it must be a finite number"),
        ({"to": ""}, "to is ''; it must be a text that is not empty"),
        ({"to": " "}, "to is ' '; it must be a text that is not empty"),
        ({"to": "a\nb"}, "to is 'a b'; it must be a text that is not empty"),
        ({"to": "a\0"}, "to is 'a\0'; it must be a text that is not empty"),
        ({"to": 5}, "to is 5; it must be a text that is not empty"),
        ({"way": "sea"}, "way is 'sea'; allowed are road, path"),
        ({"along": ["a"]}, "along is ['a']; it must be names, with commas between them"),
        ({"along": ("a", "")}, "along is 'a,'; it must be names, with commas between them"),
        ({"people": ("a", 5)}, "people is 'a,5'; it must be texts that are not empty"),
        ({"fast": 1}, "fast is 1; it must be true or false"),
        ({"home": "x"}, "home is 'x'; it must be a path"),
        ({"home": Path("a\0")}, "home is 'a\0'; it must be a path"),
        ({"judged": "there"}, "judged is not here"),
        ({"own": "a=1"}, "own is 'a=1'; it must be FIELD=VALUE"),
        ({"to": 3 * ["x" * 30]}, f"to is {str(3 * ['x' * 30])[:60]}...; it must be a text that is not empty"),
    ],
)
def test_what_is_not_allowed_is_said_with_what_is(given, said):
    with pytest.raises(UserError) as refused:
        Walk(**{"to": "x"} | given)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("steps", "5", 5), ("steps", " 5 ", 5), ("speed", "2", 2.0), ("speed", "1e-3", 0.001), ("rest", "-.5", -0.5),
        ("along", "a, b,c", ("a", "b", "c")), ("along", "a", ("a",)), ("people", "a, b", ("a, b",)),
        ("fast", "True", True), ("fast", "FALSE", False), ("home", "~/x", Path("/home/me/x")), ("home", "x", Path("x")),
        ("own", "a=b=c", {"a": "b=c"}), ("own", "a=", {"a": ""}), ("devices", "auto", "auto"), ("devices", "4", 4),
    ],
)  # fmt: skip
def test_texts_are_read_as_values(monkeypatch, name, given, value):
    monkeypatch.setenv("HOME", "/home/me")
    found = RULES[name].read(name, given)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("steps", "5.0", "steps is '5.0'; it must be a whole number, at least 2 and at most 20"),
        ("steps", "auto", "steps is 'auto'; it must be a whole number, at least 2 and at most 20"),
        ("devices", "many", "devices is 'many'; it must be a whole number, or auto"),
        ("fast", "yes", "fast is 'yes'; it must be true or false"),
        ("along", "a,,b", "along is 'a,,b'; it must be names, with commas between them"),
        ("own", "=b", "own is '=b'; it must be FIELD=VALUE"),
        ("own", "b", "own is 'b'; it must be FIELD=VALUE"),
        ("home", "", "home is ''; it must be a path"),
    ],
)
def test_texts_that_spell_no_value(name, given, said):
    with pytest.raises(UserError) as refused:
        RULES[name].read(name, given)
    assert str(refused.value) == said


def test_fields_are_known_by_their_flags_and_described():
    assert {name: rule.key(name) for name, rule in RULES.items() if rule.key(name) != name} == {
        "steps": "number_of_steps"
    }
    assert "plain" not in RULES
    text = " ".join((Walk.__doc__ or "").split())
    assert text.startswith(
        "A walk. to: where to [a text that is not empty] steps: steps [a whole number, at least 2 and"
    )
    assert "speed: speed [a number, more than 0 and at most 3]" in text
    assert "way: way [a text that is not empty] empty:" in text, "which may be is not known yet"
    assert Rule(str, "x", choices=("a", "b")).spelled_out() == "a text that is not empty, a or b"
    assert Rule(int, "x", least=1, most=2**20).spelled_out() == "a whole number, at least 1 and at most 1,048,576"


def test_values_of_files_are_spelled_as_on_a_command_line():
    assert [spelled(value) for value in (True, 5, 1e-3, "a b", [1, "b", False], {"a": [1]}, Path("x/y"))] == [
        "true", "5", "0.001", "a b", "1,b,false", '{"a": [1]}', "x/y"
    ]  # fmt: skip


def test_a_function_stands_only_where_one_may():
    with pytest.raises(UserError, match=r"^to is <function only_here at .*; it must be a text that is not empty$"):
        Walk(only_here)  # type: ignore[arg-type]
