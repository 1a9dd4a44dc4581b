"""A run's logs are its own, and hold each step once."""

from __future__ import annotations

import json
import logging
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnscaler.cli.config import LogConfig
from nnscaler.cli.log import METRICS, RunLog, is_free, log_folder
from nnscaler.errors import UserError

SPEED = {"tokens_per_second_per_gpu": 1.0}


def write(folder, run, start, steps, loss):
    with RunLog(folder, run, steps[-1], start) as log:
        for step in steps:
            log.write(step, {"loss": loss, **SPEED})


def test_after_a_resume_every_step_is_there_once(tmp_path):
    write(tmp_path, "me", 0, range(1, 10), 1.0)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 10, "lo')  # cut off by a kill
    second = int(time.time())
    while int(time.time()) == second:  # TensorBoard orders files by the second in which each began
        time.sleep(0.01)
    write(tmp_path, "me", 4, range(5, 8), 2.0)
    entries = [json.loads(line) for line in (tmp_path / METRICS).open()]
    wanted = [(step, 1.0 if step < 5 else 2.0) for step in range(1, 8)]
    assert [(entry["step"], entry["loss"]) for entry in entries] == wanted
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == wanted


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    full = Path("/dev/full").open("a")  # noqa: SIM115  the log closes it
    with caplog.at_level(logging.WARNING, "nnscaler"), RunLog(tmp_path, "me", 5, 0) as log:
        log._file.close()
        log._file = full
        for step in (3, 4, 5):
            log.write(step, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot write numbers from step 3 on to '{tmp_path}': No space left on device"
    ]


def test_where_nothing_can_be_written_training_does_not_begin(tmp_path):
    (tmp_path / "run.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"^cannot write '{tmp_path}': No space left on device$"):
        RunLog(tmp_path, "me", 5, 0)


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, "me", 0, [1], float("nan"))
    write(tmp_path, "me", 1, [2], float("-inf"))
    lines = (tmp_path / METRICS).read_text().splitlines()
    refuse = {"parse_constant": lambda name: (_ for _ in ()).throw(ValueError(name))}
    assert [json.loads(line, **refuse)["loss"] for line in lines] == [None, None]


class Wandb(ModuleType):
    """Weights & Biases, as far as it is called."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.said: list[object] = []

    def init(self, **settings):
        self.said.append(settings)
        return self

    def log(self, values, step):
        self.said.append((step, values))

    def finish(self, exit_code):
        self.said.append(exit_code)


def test_weights_and_biases_get_what_is_finite(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert LogConfig(report_to="wandb").report_to == "wandb"
    with RunLog(tmp_path / "llama-2", "me", 3, 0, {"seed": 5}) as log:
        log.write(1, {"loss": 2.0, "gradient_norm": float("inf")})
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path / "llama-2", "me", 3, 1, {"seed": 5}):
        raise ZeroDivisionError
    begin = {
        "project": "nnscaler", "name": "llama-2", "id": "me", "resume": "allow", "dir": str(tmp_path / "llama-2"),
        "config": {"seed": 5},
    }  # fmt: skip
    assert wandb.said == [begin, (1, {"loss": 2.0}), 0, begin, 1]


def test_where_it_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="report_to is wandb, which is not installed: pip install wandb"):
        LogConfig(report_to="wandb")


def test_a_log_folder_is_one_runs(tmp_path):
    write(tmp_path / "run", "me", 0, [1], 1.0)
    assert log_folder(tmp_path, "run", "me") == tmp_path / "run"
    assert log_folder(tmp_path, "run", "another") == tmp_path / "run-2"
    assert not is_free(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # an older form's
    assert not is_free(tmp_path / "run")
    (tmp_path / "run" / METRICS).unlink()
    assert not is_free(tmp_path / "run"), "TensorBoard's are there"
    assert log_folder(tmp_path, "run", "me") == tmp_path / "run-2"
    for number in range(2, 12):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "run.json").write_text('{"run": "other"}')
    assert log_folder(tmp_path, "run", "me") == tmp_path / "run-12"
    for note in ("[]", "{", "{}"):
        (tmp_path / "run-11" / "run.json").write_text(note)
        assert log_folder(tmp_path, "run", "me") == tmp_path / "run-11", "nobody's"
    assert is_free(tmp_path / "code")


def test_the_line_of_a_run_has_what_was_last_known(tmp_path):
    """What an interval does not report stays, what is no longer finite goes; steps count from where it began."""
    with RunLog(tmp_path, "me", 9, 4) as log:
        log.write(5, {"loss": 2.00004, "tokens_per_second_per_gpu": 1234.6, "mfu": 0.5012, "mfu_causal": 0.2504})
        speed = "1235 tokens/s/GPU, causal MFU 25.0 % (50.1 % by the document's formula)"
        assert log._bar.postfix == f"loss 2.0000, {speed}"
        log.write(6, {"eval_loss": 1.5})
        assert log._bar.postfix == f"loss 2.0000, validation 1.5000, {speed}"
        log.write(7, {"loss": float("nan")})
        assert log._bar.postfix == f"loss not finite, validation 1.5000, {speed}"
        log.advance()
        assert (log._bar.n, log._bar.total) == (5, 9)


def test_what_is_written_can_be_read_while_the_run_goes_on(tmp_path):
    folder = tmp_path / "runs" / "llama"
    with RunLog(folder, "me", 2, 0) as log:
        log.write(1, {"loss": 2.0})
        assert [json.loads(line) for line in (folder / METRICS).open()] == [{"step": 1, "loss": 2.0}]
        assert json.loads((folder / "run.json").read_text()) == {"run": "me"}
    assert log._file.closed


def test_only_lines_about_earlier_steps_are_gone_on_with(tmp_path):
    lines = [
        '{"step": 2}',
        "{",
        "[]",
        '{"loss": 1.0}',
        '{"step": "2"}',
        "3",
        '{"step": 3}',
        '{"step": 4}',
        '{"step": 1}',
    ]
    (tmp_path / METRICS).write_text("\n".join(lines) + "\n")
    with RunLog(tmp_path, "me", 9, 3):
        assert (tmp_path / METRICS).read_text() == '{"step": 2}\n{"step": 3}\n{"step": 1}\n'
    assert {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name} == {METRICS, "run.json"}
