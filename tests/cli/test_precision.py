"""The precision that is taken where none is asked for, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from nnscaler.cli import precision
from nnscaler.cli.config import DatasetConfig, ModelConfig, TrainerArgs
from nnscaler.config import ComputeConfig


@pytest.mark.parametrize(
    ("asked", "slow", "hardware", "taken", "said"),
    [
        (None, False, None, "bf16", "precision bf16: this CPU is fast in bf16"),
        (None, True, None, "fp32", "precision fp32: this CPU has no fast arithmetic in bf16"),
        (None, True, "h100", "bf16", "precision bf16: the plan is for H100"),
        ("fp32", False, "h100", "fp32", ""),
    ],
)
def test_one_line_says_what_is_taken_and_why(monkeypatch, caplog, asked, slow, hardware, taken, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "are_slow", lambda device, dtype: slow)
    caplog.set_level("INFO", "nnscaler")
    args = TrainerArgs(
        name="x", model=ModelConfig(torch.nn.Identity), compute=ComputeConfig(hardware=hardware),
        dataset=DatasetConfig(None, 32), run_mode="compile", **({"precision": asked} if asked else {}),
    )  # fmt: skip
    assert precision.with_precision(args).precision == taken
    assert [record.message for record in caplog.records] == [f"{said} (--precision chooses)"] * bool(said)
