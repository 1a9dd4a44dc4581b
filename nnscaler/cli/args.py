"""Command-line conventions shared by every script: flag spelling, help format, one-line errors, logging."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from nnscaler.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """`argparse` with defaults shown in the help and both `--long_name` and `--long-name` accepted for each flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([self._as_declared(arg) for arg in args], namespace)

    def _as_declared(self, arg: str) -> str:
        """The declared spelling of a flag given with hyphens for underscores or the reverse."""
        if not arg.startswith("--"):
            return arg
        flag, equals, value = arg.partition("=")
        declared = {_spelling(option): option for option in self._option_string_actions}
        return declared.get(_spelling(flag), flag) + equals + value

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag where there is one to show, and keeps the lines of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _spelling(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


def run(main: Callable[[], None]) -> None:
    """Runs a command: logs to stderr, and turns a `UserError` into one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
