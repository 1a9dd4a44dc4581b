"""`train.py --document_mask`: what a plan and a run say of documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import train
from tests import tiny


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs train.py with flags on a tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny.write_model(Path("model"))
    tiny.write_hardware(Path())

    def run(*flags: str) -> None:
        usual = ("--model_id", "model", "--hardware", "hardware.json", "--precision", "fp32", "--plan_ngpus", "1")
        monkeypatch.setattr(sys, "argv", ["train.py", *usual, *flags])
        train.main()

    return run


def test_a_plan_says_which_documents_it_is_for(call, capsys):
    plans = {}
    for name, flags in {
        "whole": (), "apart": ("--document_mask",), "eights": ("--document_mask", "--document_length", "8"),
    }.items():  # fmt: skip
        call("--run_mode", "compile", "--explain", "--sequence_length", "32", "--name", name, *flags)
        plans[name] = json.loads(Path(".nnscaler", name, "plan.json").read_text())
    assert "document_length" not in plans["whole"]["about"]
    assert plans["apart"]["about"]["document_length"] == 32
    assert plans["eights"]["about"]["document_length"] == 8
    assert "--document_mask --document_length 8" in plans["eights"]["about"]["command"]
    printed = capsys.readouterr().out
    assert "of 32 tokens in documents of 32, in fp32" in printed
    assert "of 32 tokens in documents of 8, in fp32" in printed
    whole, apart, eights = (plan["predicted"]["seconds_by_category"]["attention"] for plan in plans.values())
    assert whole == apart
    assert eights < apart / 2


def test_a_run_keeps_documents_apart_and_says_how_long_they_are(call, caplog):
    caplog.set_level("INFO")
    starts = [[0, 8], [], [16], [0, 1, 2, 20]] * 5  # the second row goes on with what began in the first
    tiny.write_dataset(Path("data"), rows=20, starts=starts)
    tiny.write_dataset(Path("validation"), rows=3, starts=[[0, 30]] * 3)
    flags = ("--document_mask", "--eval_dataset_path", "validation", "--max_train_steps", "2", "--name", "run")
    call("--dataset_path", "data=1", "validation=2", *flags)
    assert "documents are kept apart: 51 documents of 14 tokens on average, 32 at most; attention has as much" in (
        caplog.text
    )
    assert "documents longer than the 32 tokens of a sequence: 5; each goes on in the next one" in caplog.text
    lines = [json.loads(line) for line in Path("runs", "run", "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_loss"] is not None
