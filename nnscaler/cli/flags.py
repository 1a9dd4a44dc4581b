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
from nnscaler.options import REQUIRED, Option, options_of, spelled

T = TypeVar("T")

CONFIG_HELP = "YAML or JSON file of flags by name, without the hyphens in front; the command line goes before the file"
_SHOWN = {int: "N", float: "X", str: "NAME", Path: "PATH", tuple: "NAME,...", dict: "FIELD=VALUE", bool: "true|false"}


def keys_of(cls: type) -> list[str]:
    """The names by which a command's values hold the fields of a configuration."""
    return [option.key(name) for name, option in options_of(cls).items()]


@dataclasses.dataclass(frozen=True)
class Flags:
    """The values of a command's flags.

    values   flag, with "_" for "-" -> value
    options  flag -> what it may be
    """

    values: Mapping[str, Any]
    options: Mapping[str, Option]

    def make(self, cls: type[T], **others: Any) -> T:
        """The configuration that the flags describe. `others`: fields that no flag gives, or that override one"""
        fields = {name: self.values[option.key(name)] for name, option in options_of(cls).items()}
        return cls(**{**fields, **others})

    def spelled(self, keys: Sequence[str], **others: Any) -> str:
        """Some flags, as on a command line, without those that have their default values.

        others  values that override those that were given
        """
        words = []
        for key in keys:
            value = others.get(key, self.values[key])
            if value == self.options[key].default:
                continue
            flag = f"--{self.options[key].flag or key}"
            if isinstance(value, Mapping):
                words += [word for field, one in value.items() for word in (flag, f"{field}={one}")]
            elif self.options[key].several:
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
    options = _with_defaults(_by_flag(groups), defaults or {})
    parser = _parser(description, groups, options)
    given = vars(parser.parse_args())
    texts: dict[str, Any] = {}
    config = given.pop("config")
    if config is not None:
        texts.update(_of_file(Path(config), options))
    texts.update({key: (f"--{options[key].flag or key}", text) for key, text in given.items() if text is not None})
    values = {}
    for key, option in options.items():
        if key in texts:
            name, text = texts[key]
            values[key] = _read(option, name, text)
        elif option.default is REQUIRED:
            raise UserError(f"--{key} is not given, and has no default")
        else:
            values[key] = option.default
    return Flags(values, options)


def _by_flag(groups: Mapping[str, type]) -> dict[str, Option]:
    return {option.key(name): option for cls in groups.values() for name, option in options_of(cls).items()}


def _with_defaults(options: dict[str, Option], defaults: Mapping[str, Any]) -> dict[str, Option]:
    changed = {flag: dataclasses.replace(options[flag], default=default) for flag, default in defaults.items()}
    return {**options, **changed}


def _parser(description: str, groups: Mapping[str, type], options: Mapping[str, Option]) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", metavar="PATH", help=CONFIG_HELP)
    for title, cls in groups.items():
        add = parser.add_argument_group(title).add_argument
        for name, option in options_of(cls).items():
            _add(add, option.flag or name, options[option.key(name)])
    return parser


def _add(add: Any, flag: str, option: Option) -> None:
    choices = option.allowed()
    settings: dict[str, Any] = {"metavar": option.shown or _SHOWN[option.kind]}
    if choices is not None:
        settings["metavar"] = "{" + ",".join(choices) + "}"
    if option.kind is bool:
        settings |= {"nargs": "?", "const": "true"}
    if option.kind is dict:
        settings["action"] = "append"
    if option.several:
        settings |= {"action": "extend", "nargs": "+"}
    add(f"--{flag}", default=None, help=_help(option).replace("%", "%%"), **settings)


def _help(option: Option) -> str:
    text = " ".join(option.help.split())
    if option.default is REQUIRED:
        return f"{text}. Required"
    if option.default is None or option.default is False or option.default in ((), {}, ""):
        return text
    return f"{text} (default: {option.default})"


def _read(option: Option, name: str, text: str | Sequence[str]) -> Any:
    if isinstance(text, str):
        return option.read(name, text)
    values = [option.read(name, one) for one in text]
    if option.several:
        return tuple(one for value in values for one in value)
    return {field: one for value in values for field, one in value.items()}


def _of_file(path: Path, options: Mapping[str, Option]) -> dict[str, tuple[str, Any]]:
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
        if flag not in options:
            raise UserError(f"{path}: {unknown('flag', str(key), options)}")
        if value is None:
            continue
        if options[flag].kind is dict or options[flag].several:
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
