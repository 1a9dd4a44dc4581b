"""examples/look.py, where there is nothing to look at."""

from __future__ import annotations

import sys

import pytest

from examples import look
from nnscaler.command import run
from tests import tiny


def answer(monkeypatch, capsys, run_folder, model) -> str:
    plot = str(run_folder / "loss.png")
    monkeypatch.setattr(sys, "argv", ["look.py", "--run", str(run_folder), "--model", str(model), "--plot", plot])
    with pytest.raises(SystemExit) as stopped:
        run(look.main)
    assert stopped.value.code == 2
    return str(capsys.readouterr().err)


def test_what_is_no_run_or_no_model_is_one_line(tmp_path, monkeypatch, capsys):
    model = tiny.write_model(tmp_path / "model")
    said = answer(monkeypatch, capsys, tmp_path, model)
    assert said == f"error: '{tmp_path}' has no metrics.jsonl; it is not the log folder of a run\n"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    said = answer(monkeypatch, capsys, tmp_path, tmp_path / "nowhere")
    assert said == f"error: '{tmp_path / 'nowhere'}' is not the directory of a model: it has no config.json\n"
    said = answer(monkeypatch, capsys, tmp_path, model)
    assert said == f"error: cannot load a tokenizer from {model}: it holds no tokenizer.json\n"
    monkeypatch.setattr("nnscaler.hub.load_tokenizer", lambda path: None)
    said = answer(monkeypatch, capsys, tmp_path, model)
    assert said.startswith(f"error: cannot load a model from '{model}': ")
    assert "safetensors" in said
    assert said.count("\n") == 1
