"""How every command reads its flags, shows its help, and ends."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest

from nnscaler.command import ArgumentParser, run, unknown
from nnscaler.errors import UserError


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="walk", description="Walks.\n\n    walk --steps 5")
    made.add_argument("--steps_a_day", default=0, help="steps")
    made.add_argument("--max-speed", default=None, help="speed")
    made.add_argument("--fast", default=False, help="whether fast")
    made.add_argument("places", nargs="*")
    return made


@pytest.mark.parametrize("value", ["-5", "-.5", "-1e-3", "-inf", "-Infinity", "-NaN", "-0x"])
def test_a_negative_number_is_a_value_in_any_notation(value):
    assert parser().parse_args(["--steps_a_day", value]).steps_a_day == value


def test_flags_may_be_written_with_either_sign_and_values_stay_as_they_are():
    found = parser().parse_args(["--steps-a-day=a-b_c=--d", "--max_speed", "e-f_g", "h_i-j"])
    assert (found.steps_a_day, found.max_speed, found.places) == ("a-b_c=--d", "e-f_g", ["h_i-j"])
    assert parser().parse_args(["--", "--nothing-like-it"]).places == ["--nothing-like-it"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps_a_da"], "there is no flag --steps_a_da; did you mean --steps_a_day?"),
        (["--step-a-day=5"], "there is no flag --step-a-day; did you mean --steps_a_day?"),
        (["--steps"], "there is no flag --steps; did you mean --steps_a_day?"),
        (["--xyzzy", "5"], "there is no flag --xyzzy"),
        (["-steps-a-day=5"], "there is no flag -steps-a-day; did you mean --steps_a_day?"),
        (["\N{EM DASH}max-speed", "5"], "there is no flag \N{EM DASH}max-speed; did you mean --max-speed?"),
        (["a", "-xyzzy"], "unrecognized arguments: -xyzzy"),
        (["--max-speed"], "argument --max-speed: expected one argument"),
    ],
)
def test_what_is_no_flag_is_an_error_also_where_it_begins_like_one(given, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        parser().parse_args(given)


def test_an_unknown_name_of_something_else():
    assert unknown("field", "hiden", ["hidden", "heads"]) == "there is no field hiden; did you mean hidden?"
    assert unknown("field", "x", ["hidden"]) == "there is no field x"


def test_help_keeps_lines_and_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "Walks.\n\n    walk --steps 5\n" in shown
    assert "steps (default: 0)\n" in shown
    assert re.search(r"--max-speed MAX_SPEED\s+speed\n", shown)
    assert "whether fast\n" in shown


def ends(error: BaseException | None) -> int | str | None:
    """The exit status of a command in which this is raised."""

    def main() -> None:
        if error is not None:
            raise error

    try:
        run(main)
    except SystemExit as ended:
        return ended.code
    return None


def test_a_command_ends_with_one_line_or_as_it_was_told_to(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert (ends(None), ends(KeyboardInterrupt())) == (None, 130)
    assert capsys.readouterr().err == ""
    assert ends(UserError("first\nsecond")) == 2
    assert capsys.readouterr().err == "error: first second\n"
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def test_a_path_that_cannot_be_looked_up_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for error in (PermissionError(errno.EACCES, "Permission denied", "/x"), OSError(errno.ENAMETOOLONG, "Long", "/x")):
        assert ends(error) == 2
        assert capsys.readouterr().err == f"error: /x: {error.strerror}\n"
    for error in (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Broken", "/x")):
        with pytest.raises(OSError, match=error.strerror):
            ends(error)


def ends_alone(body: str, output: int) -> tuple[int, str]:
    """The exit status of a command in a process of its own, and what it says on stderr."""
    script = f"from nnscaler.command import run\ndef main():\n    {body}\nrun(main)"
    ended = subprocess.run([sys.executable, "-c", script], stdout=output, stderr=subprocess.PIPE, text=True)
    return ended.returncode, ended.stderr


def test_what_it_prints_need_not_be_read_to_the_end():
    reader, writer = os.pipe()
    os.close(reader)
    for letters in (10**6, 1):  # a single one is written when the command ends
        assert ends_alone(f"print('x' * {letters})", writer) == (141, "")
    os.close(writer)


def test_ctrl_c_ends_a_command_but_not_within_the_importer():
    """Where it would be ignored; and the importer's lock be kept, for which a thread that imports would wait."""
    script = """
import importlib, signal, time
from nnscaler.command import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background command ignores it
imported = []
source = "signal.raise_signal(signal.SIGINT)\\nfor number in range(1000): imported.append(number)"
def main():
    try:
        exec(compile(source, importlib._bootstrap._find_and_load.__code__.co_filename, "exec"), globals())
        time.sleep(60)
    finally:
        print(imported == list(range(1000)))
run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "True\n", "")


@pytest.mark.parametrize("action", ["SIG_IGN", "default_int_handler"])
def test_ctrl_c_ends_what_it_ended_before(action):
    """A shell's background command ignores it."""
    body = "; ".join([
        f"import signal; signal.signal(signal.SIGINT, signal.{action})",
        "run(lambda: signal.raise_signal(signal.SIGINT))",
    ])  # fmt: skip
    script = f"from nnscaler.command import run; {body}"
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0 if action == "SIG_IGN" else 130, "")


def test_another_pipe_that_breaks_is_told():
    status, said = ends_alone("raise BrokenPipeError(32, 'Broken pipe')", subprocess.DEVNULL)
    assert status == 1
    assert said.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_of_processes_side_by_side_the_first_tells_what_all_have_found(capsys, monkeypatch, tmp_path):
    """What another has found is told too; and all is, where no mark can be left."""
    for attempt, rank, error in (("a", 0, "x"), ("a", 1, "x"), ("a", 1, "y"), ("b", 0, "x"), ("gone", 0, "z")):
        folder = tmp_path / attempt / str(rank)
        if attempt != "gone":
            folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        assert ends(UserError(error)) == 2
    assert capsys.readouterr().err.splitlines() == ["error: x", "error: y", "error: x", "error: z"]
