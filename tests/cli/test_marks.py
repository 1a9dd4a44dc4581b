"""Ids around documents: a warning where they are others than those of the model's configuration."""

from __future__ import annotations

import json
import sys

import pytest

import train
from nnscaler.cli.trainer import Trainer
from tests import tiny

NOTED = {"tokenizer": "another", "smallest_id": 0, "largest_id": 95}


@pytest.mark.parametrize(
    ("eos", "noted", "said"),
    [
        (2, {"bos_token_id": 1, "eos_token_id": 2}, []),
        (2, {"bos_token_id": None, "eos_token_id": 2}, []),
        (2, {}, []),
        (2, None, []),
        (None, {"bos_token_id": 1, "eos_token_id": 5}, []),
        ([2, 7], {"bos_token_id": 1, "eos_token_id": 7}, []),
        (2, {"bos_token_id": 0, "eos_token_id": 2}, ["whose bos token is id 0, and the model's configuration says 1:"]),
        ([2, 7], {"eos_token_id": 5}, ["whose eos token is id 5, and the model's configuration says 2 or 7:"]),
    ],
)
def test_a_dataset_of_another_tokenizer(tmp_path, monkeypatch, caplog, eos, noted, said):
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "model", bos_token_id=1, eos_token_id=eos)
    tiny.write_dataset(tmp_path / "data", rows=4)
    if noted is not None:
        (tmp_path / "data" / "packing.json").write_text(json.dumps(noted | NOTED))
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model_id", "model", "--dataset_path", "data", "--precision", "fp32"]
    )
    trainer = Trainer(train.complete(*train.read_flags()))
    caplog.clear()
    trainer._judge_ids(trainer._dataset())
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(said)
    for warning, part in zip(warnings, said):
        assert f"dataset 'data' was made with a tokenizer {part}" in warning
