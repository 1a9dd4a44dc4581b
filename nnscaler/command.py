"""What all commands share: how flags are spelled, what help looks like, errors in one line, and logging.

Nothing here imports torch, so that help, and what is wrong with a flag, come at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Timer, current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn

from nnscaler.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """`argparse` with some conventions.

    Help shows defaults. Each flag may be written `--long_name` or `--long-name`. A value may be a negative number, in
    any notation. An unknown flag is an error that names the nearest known one.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)", re.IGNORECASE)  # and so a value, no flag

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [self._as_declared(arg) for arg in (sys.argv[1:] if args is None else args)]
        for arg in args:
            if arg == "--":
                break
            self._check_known(arg.partition("=")[0])
        return super().parse_known_args(args, namespace)

    def _as_declared(self, arg: str) -> str:
        """The declared spelling of a flag that is written with hyphens for underscores, or the reverse."""
        if not arg.startswith("--"):
            return arg
        flag, equals, value = arg.partition("=")
        declared = {_spelling(option): option for option in self._option_string_actions}
        return declared.get(_spelling(flag), flag) + equals + value

    def _check_known(self, flag: str) -> None:
        known = self._option_string_actions
        # One dash too few, or one of a printed page.
        with_another_dash = flag[:1] in DASHES and _bare(flag) in map(_bare, known)
        if flag not in known and (flag.startswith("--") or with_another_dash):
            self.error(unknown("flag", flag, known))

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag where there is one to show, and keeps the lines of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _spelling(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}")


def _bare(flag: str) -> str:
    return flag.lstrip("".join(DASHES)).replace("-", "_")  # hyphens that all have would make all alike


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message about an unknown name, with the nearest of the known ones. `what`: what it is the name of"""
    bare = {_bare(one): one for one in known}
    near = difflib.get_close_matches(_bare(name), bare, n=1, cutoff=0.6)
    hint = f"; did you mean {bare[near[0]]}?" if near else ""
    return f"there is no {what} {name}{hint}"


IMPORTER = "<frozen importlib._bootstrap>"
OUTPUT = 1  # the standard output's descriptor
_OF_A_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}  # what only the user's choice of a path may cause


def run(main: Callable[[], None]) -> None:
    """Runs a command: logs to stderr, and turns a UserError, or a path that cannot be looked up, into one line on
    stderr and exit status 2. Where nobody reads what it prints any more, it ends without a word, as other programs
    do."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.flush()
    except UserError as error:
        _tell(" ".join(f"error: {error}".splitlines()))
        sys.exit(2)
    except BrokenPipeError:
        if not _output_is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), OUTPUT)  # for what Python still writes when it ends
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _OF_A_PATH or error.filename is None:
            raise
        _tell(f"error: {error.filename}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C ends a command, but not within Python's importer, which would ignore it in places, and keep a lock for
    which the next thread that imports anything waits for ever."""
    if frame is not None and frame.f_code.co_filename == IMPORTER:
        again = Timer(0.01, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    else:
        raise KeyboardInterrupt


def _output_is_unread() -> bool:
    """Whether the standard output is a pipe that nobody reads any more: `head`, for example, has seen enough."""
    poll = select.poll()
    poll.register(OUTPUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _tell(line: str) -> None:
    """Writes a line to stderr. Where several processes that torchrun started here say the same, only the first of them
    does.

    torchrun gives each process its own folder, side by side. A process leaves a mark there when it has written a line.
    """
    folder = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if folder is not None:
        told = Path(folder).parents[1] / f"told-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
        try:
            told.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
