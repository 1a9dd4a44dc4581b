"""A run's logs are its own, and hold each step once."""

from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnscaler.cli.log import METRICS, RunLog, is_free, log_folder

SPEED = {"tokens_per_second_per_gpu": 1.0}


def write(folder, run, start, steps, loss):
    with RunLog(folder, run, steps[-1], start) as log:
        for step in steps:
            log.write(step, {"loss": loss, **SPEED})


def test_after_a_resume_every_step_is_there_once(tmp_path):
    write(tmp_path, "me", 0, range(1, 10), 1.0)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 10, "lo')  # cut off by a kill
    write(tmp_path, "me", 4, range(5, 8), 2.0)
    entries = [json.loads(line) for line in (tmp_path / METRICS).open()]
    wanted = [(step, 1.0 if step < 5 else 2.0) for step in range(1, 8)]
    assert [(entry["step"], entry["loss"]) for entry in entries] == wanted
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == wanted


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, "me", 0, [1], float("nan"))
    write(tmp_path, "me", 1, [2], float("-inf"))
    lines = (tmp_path / METRICS).read_text().splitlines()
    refuse = {"parse_constant": lambda name: (_ for _ in ()).throw(ValueError(name))}
    assert [json.loads(line, **refuse)["loss"] for line in lines] == [None, None]


def test_a_log_folder_is_one_runs(tmp_path):
    write(tmp_path / "run", "me", 0, [1], 1.0)
    assert log_folder(tmp_path, "run", "me") == tmp_path / "run"
    assert log_folder(tmp_path, "run", "another") == tmp_path / "run-2"
    assert not is_free(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # an older form's
    assert not is_free(tmp_path / "run")
    assert is_free(tmp_path / "code")
