"""Fields of configurations: what each is for, its default, and what it may be, all stated once.

    @dataclass(frozen=True)
    class Walk:
        steps: int = whole(10, "steps to walk", least=1)

        def __post_init__(self) -> None:
            check(self)

`Walk(0)` raises UserError("steps is 0; it must be at least 1"). From the same field, `nnscaler.cli.flags` makes the
flag `--steps` with its help and its check. Only Python's own library is needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nnscaler.errors import UserError

_LARGEST = float.fromhex("0x1.fffffep+127")  # of a 32-bit float: what is larger is infinite to the device
T = TypeVar("T")
REQUIRED = object()  # in the place of a default: the field has to be given
_SHOWN = 60  # characters of a wrong value
_SWITCH = {"true": True, "false": False}


@dataclass(frozen=True)
class Rule:
    """What a field may be.

    kind      int, float, bool, str, Path; tuple: names; dict: names with values
    help      what it is for, for users
    flag      what the command line calls it, where that is not the field's name; "-" and "_" are the same there
    default   of the field; REQUIRED: there is none
    optional  whether the value may be None; it may in any case where that is the default
    least     the smallest number that is allowed
    above     the number must be larger than this
    most      the largest number that is allowed
    choices   the only values that are allowed, or a function that lists them
    judge     called with (value, name); raises UserError where the value is not allowed
    shown     what stands for the value in a command's help
    several   of a tuple: on the command line its texts are words of their own, without commas between them
    or_function  whether a function may stand in its place, which no command line can give
    or_auto      whether a command line may give "auto" in its place, which the command understands
    """

    kind: type
    help: str
    flag: str | None = None
    default: Any = REQUIRED
    optional: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None
    judge: Callable[[Any, str], None] | None = None
    shown: str | None = None
    several: bool = False
    or_function: bool = False
    or_auto: bool = False

    def key(self, name: str) -> str:
        """The name by which a command's values hold the field `name`."""
        return (self.flag or name).replace("-", "_")

    def allowed(self) -> Sequence[str] | None:
        """The only values that are allowed; None: any."""
        return self.choices() if callable(self.choices) else self.choices

    def check(self, name: str, value: Any) -> None:
        """Raises UserError, which calls the value `name`, where it is not allowed."""
        if (value is None and (self.optional or self.default is None)) or (self.or_function and callable(value)):
            return
        if not self._is_of_kind(value):
            kind = "texts that are not empty" if self.several else _KINDS[self.kind]
            raise _wrong(name, value, ", ".join(filter(None, (kind, self._bounds()))))
        if self.kind in (int, float) and not self._is_within(value):
            finite = "" if abs(value) <= _LARGEST else "a finite number"
            raise _wrong(name, value, ", ".join(filter(None, (finite, self._bounds()))))
        choices = self.allowed()
        if choices is not None and value not in choices:
            raise UserError(f"{name} is {_quoted(value)}; allowed are {', '.join(choices)}")
        if self.judge is not None:
            self.judge(value, name)

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is int:
            return isinstance(value, int) and not isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and (value == self.default or _is_plain(value))
        if self.kind is tuple:
            return isinstance(value, tuple) and all(isinstance(one, str) and _is_plain(one) for one in value)
        return isinstance(value, self.kind) and (self.kind is not Path or "\0" not in str(value))

    def _is_within(self, value: float) -> bool:
        return (
            abs(value) <= (_LARGEST if self.kind is float else math.inf)  # NaN is not
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def _bounds(self) -> str:
        bounds = (("at least", self.least), ("more than", self.above), ("at most", self.most))
        return " and ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)

    def spelled_out(self) -> str:
        """What a value may be, in words."""
        choices = () if callable(self.choices) else self.choices or ()
        return ", ".join(filter(None, (_KINDS[self.kind], self._bounds(), " or ".join(choices))))

    def read(self, name: str, text: str) -> Any:
        """The value that a text spells. Raises UserError, which calls it `name`, for a text that is not allowed."""
        value: Any = text
        if self.or_auto and text == "auto":
            return text
        if self.kind is tuple:
            value = (text,) if self.several else tuple(part.strip() for part in text.split(","))
        elif self.kind is bool:
            value = _SWITCH.get(text.lower(), text)
        elif self.kind is dict:
            field, equals, of_field = text.partition("=")
            value = {field: of_field} if field and equals else text
        elif self.kind is Path:
            value = Path(text).expanduser() if _is_plain(text) else text
        elif self.kind in (int, float):
            with suppress(ValueError):
                value = self.kind(text)
        try:
            self.check(name, value)
        except UserError as error:
            if self.or_auto:
                raise UserError(f"{error}, or auto") from None
            raise
        return value


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text that is not empty",
    Path: "a path",
    tuple: "names, with commas between them",
    dict: "FIELD=VALUE",
}


def whole(default: Any, help: str, **rules: Any) -> Any:
    """A whole number."""
    return _field(int, default, help, rules)


def number(default: Any, help: str, **rules: Any) -> Any:
    """A finite number."""
    return _field(float, default, help, rules)


def text(default: Any, help: str, **rules: Any) -> Any:
    """A text. It may be empty only where that is the default."""
    return _field(str, default, help, rules)


def path(default: Any, help: str, **rules: Any) -> Any:
    """A path, given as text or as `Path`."""
    return _field(Path, default, help, rules)


def switch(help: str, **rules: Any) -> Any:
    """True or false; false by default."""
    return _field(bool, False, help, rules)


def names(default: Any, help: str, **rules: Any) -> Any:
    """A tuple of texts."""
    return _field(tuple, default, help, rules)


def words(default: Any, help: str, **rules: Any) -> Any:
    """A tuple of texts; on the command line one or more words."""
    return _field(tuple, default, help, {"several": True, **rules})


def assignments(help: str, **rules: Any) -> Any:
    """Name -> text; on the command line, FIELD=VALUE as often as wanted."""
    return dataclasses.field(default_factory=dict, metadata={Rule: Rule(dict, help, default={}, **rules)})


def _field(kind: type, default: Any, help: str, rules: Mapping[str, Any]) -> Any:
    metadata = {Rule: Rule(kind, help, default=default, **rules)}
    return dataclasses.field(default=dataclasses.MISSING if default is REQUIRED else default, metadata=metadata)


def rules_of(cls: type) -> dict[str, Rule]:
    """Name -> rule, for the fields of a dataclass that were made by the functions above."""
    return {field.name: field.metadata[Rule] for field in dataclasses.fields(cls) if Rule in field.metadata}


def described(cls: type[T]) -> type[T]:
    """Adds to a dataclass's docstring, which `help` shows, what each field is for and what it may be."""
    fields = (
        textwrap.fill(
            f"{name}: {rule.help} [{rule.spelled_out()}]", 110, initial_indent="    ", subsequent_indent=" " * 8
        )
        for name, rule in rules_of(cls).items()
    )
    cls.__doc__ = "\n".join([cls.__doc__ or "", "", *fields])
    return cls


def check(configuration: Any) -> None:
    """Checks every field of a dataclass's instance that was made here. Raises UserError that names the field."""
    for name, rule in rules_of(type(configuration)).items():
        rule.check(name, getattr(configuration, name))


def spelled(value: Any) -> str:
    """A value from a YAML or JSON file, as a command line spells it."""
    if isinstance(value, list):
        return ",".join(map(spelled, value))
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return str(value)


def _is_plain(text: str) -> bool:
    return bool(text.strip()) and "\0" not in text and "\n" not in text


def _wrong(name: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{name} is {_quoted(value)}; it must be {allowed}")


def _quoted(value: Any) -> str:
    value = ",".join(map(str, value)) if isinstance(value, tuple) else value
    shown = f"'{value}'" if isinstance(value, str | Path) else str(value)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
