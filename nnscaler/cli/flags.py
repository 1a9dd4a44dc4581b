"""A command's flags, made from the fields of its configurations, where their help, defaults and checks are stated.

    flags = parse("Walks.", {"the walk": Walk}, {"steps": 20})
    walk = flags.make(Walk)

A file in YAML or JSON, given as --config, stands for flags that the command line does not give. These few lines take
the place of tyro, jsonargparse or HfArgumentParser: each of those takes half a second or more to import, or imports
torch, and writes its errors on several lines.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nnscaler.command import ArgumentParser, unknown
from nnscaler.errors import UserError
from nnscaler.options import REQUIRED, Rule, rules_of, spelled

T = TypeVar("T")

CONFIG_HELP = "YAML or JSON file of flags by name, without the hyphens in front; the command line takes precedence"
_SHOWN = {int: "N", float: "X", str: "NAME", Path: "PATH", tuple: "NAME,...", dict: "FIELD=VALUE", bool: "true|false"}


def keys_of(cls: type) -> list[str]:
    """The names by which a command's values hold the fields of a configuration."""
    return [rule.key(name) for name, rule in rules_of(cls).items()]


@dataclasses.dataclass(frozen=True)
class Flags:
    """The values of a command's flags.

    values   flag, with "_" for "-" -> value
    rules    flag -> what it may be
    """

    values: Mapping[str, Any]
    rules: Mapping[str, Rule]

    def make(self, cls: type[T], **others: Any) -> T:
        """The configuration that the flags describe. `others`: fields that no flag gives, or that override one"""
        fields = {name: self.values[rule.key(name)] for name, rule in rules_of(cls).items()}
        return cls(**{**fields, **others})

    def spelled(self, keys: Sequence[str], **others: Any) -> str:
        """Some flags, as on a command line, without those that have their default values.

        others  values that override those that were given
        """
        words = []
        for key in keys:
            value = others.get(key, self.values[key])
            if value == self.rules[key].default:
                continue
            flag = f"--{self.rules[key].flag or key}"
            if isinstance(value, Mapping):
                words += [word for field, one in value.items() for word in (flag, f"{field}={one}")]
            elif self.rules[key].several:
                words += [flag, *value]
            elif isinstance(value, bool):
                words += [flag] if value else [flag, "false"]
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)

    def __getitem__(self, flag: str) -> Any:
        return self.values[flag]


def parse(description: str, groups: Mapping[str, type], defaults: Mapping[str, Any] | None = None) -> Flags:
    """Reads a command's flags from `sys.argv`, and from the file that --config names.

    groups    title in the help -> dataclass, some of whose fields were made by `nnscaler.options`
    defaults  flag -> default, where the command's is not that of the field

    Prints the help and exits, where that is asked for. Raises UserError that names the flag, its value, and what is
    allowed.
    """
    rules = _with_defaults(_by_flag(groups), defaults or {})
    parser = _parser(description, groups, rules)
    given = vars(parser.parse_args())
    texts: dict[str, Any] = {}
    config = given.pop("config")
    if config is not None:
        texts.update(_of_file(Path(config), rules))
    texts.update({key: (f"--{rules[key].flag or key}", text) for key, text in given.items() if text is not None})
    values = {}
    for key, rule in rules.items():
        if key in texts:
            name, text = texts[key]
            values[key] = _read(rule, name, text)
        elif rule.default is REQUIRED:
            raise UserError(f"--{key} is not given, and has no default")
        else:
            values[key] = rule.default
    return Flags(values, rules)


def _by_flag(groups: Mapping[str, type]) -> dict[str, Rule]:
    return {rule.key(name): rule for cls in groups.values() for name, rule in rules_of(cls).items()}


def _with_defaults(rules: dict[str, Rule], defaults: Mapping[str, Any]) -> dict[str, Rule]:
    changed = {flag: dataclasses.replace(rules[flag], default=default) for flag, default in defaults.items()}
    return {**rules, **changed}


def _parser(description: str, groups: Mapping[str, type], rules: Mapping[str, Rule]) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", metavar="PATH", help=CONFIG_HELP)
    for title, cls in groups.items():
        add = parser.add_argument_group(title).add_argument
        for name, rule in rules_of(cls).items():
            _add(add, rule.flag or name, rules[rule.key(name)])
    return parser


def _add(add: Any, flag: str, rule: Rule) -> None:
    choices = rule.allowed()
    settings: dict[str, Any] = {"metavar": rule.shown or _SHOWN[rule.kind]}
    if choices is not None:
        settings["metavar"] = "{" + ",".join(choices) + "}"
    if rule.kind is bool:
        settings |= {"nargs": "?", "const": "true"}
    if rule.kind is dict:
        settings["action"] = "append"
    if rule.several:
        settings |= {"action": "extend", "nargs": "+"}
    add(f"--{flag}", default=None, help=_help(rule).replace("%", "%%"), **settings)


def _help(rule: Rule) -> str:
    text = " ".join(rule.help.split())
    if rule.default is REQUIRED:
        return f"{text}. Required"
    if rule.default is None or rule.default is False or rule.default in ((), {}, ""):
        return text
    return f"{text} (default: {rule.default})"


def _read(rule: Rule, name: str, text: str | Sequence[str]) -> Any:
    if isinstance(text, str):
        return rule.read(name, text)
    values = [rule.read(name, one) for one in text]
    if rule.several:
        return tuple(one for value in values for one in value)
    return {field: one for value in values for field, one in value.items()}


def _of_file(path: Path, rules: Mapping[str, Rule]) -> dict[str, tuple[str, Any]]:
    """Flag -> (its name in messages, its value as on a command line), for the flags that a file gives."""
    import yaml  # takes a moment, and reads JSON too

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--config is '{path}', which cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config is '{path}', which is neither YAML nor JSON: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config is '{path}', which does not give values by name")
    found = {}
    for key, value in content.items():
        flag = str(key).removeprefix("--").replace("-", "_")
        if flag not in rules:
            raise UserError(f"{path}: {unknown('flag', str(key), rules)}")
        if value is None:
            continue
        if rules[flag].kind is dict or rules[flag].several:
            text: Any = _assignments(value)
        elif isinstance(value, dict):
            raise UserError(f"{path}: {flag} has values by name; it takes one value")
        else:
            text = spelled(value)
        found[flag] = (f"{path}: {flag}", text)
    return found


def _assignments(value: Any) -> list[str]:
    """FIELD=VALUE for each field that a file gives as a mapping, or as such texts."""
    if isinstance(value, dict):
        return [f"{field}={spelled(one)}" for field, one in value.items()]
    return [str(one) for one in (value if isinstance(value, list) else [value])]
