"""The precision that is taken where none is asked for, and what is said of it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import train
from nnscaler.cli import precision
from nnscaler.cli.config import DatasetConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.report import explain
from tests import tiny


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


@pytest.mark.parametrize(("fast", "taken"), [(True, "bf16"), (False, "fp32")])
def test_a_run_takes_what_its_own_device_does_well(monkeypatch, caplog, fast, taken):
    """Whatever it is planned for; and of a GPU, what it does itself rather than by other arithmetic."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.append(given) or fast)
    caplog.set_level("INFO", "nnscaler")
    args = TrainerArgs(
        name="x", model=ModelConfig(torch.nn.Identity), compute=ComputeConfig(hardware="h100"),
        dataset=DatasetConfig(None, 32),
    )  # fmt: skip
    assert precision.with_precision(args).precision == taken
    why = "Tesla is fast in bf16" if fast else "Tesla has no fast arithmetic in bf16"
    assert caplog.messages == [f"precision {taken}: {why} (--precision chooses)"]
    monkeypatch.setenv("RANK", "1")
    assert precision.with_precision(args).precision == taken
    assert len(caplog.messages) == 1, "one rank tells"
    assert asked == [{"including_emulation": False}] * 2


def in_fp8(hardware: str, folder: Path, **changes: object) -> TrainerArgs:
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    return TrainerArgs(
        name="x", model=ModelConfig(lambda: CausalLM(config)), compute=ComputeConfig(hardware=hardware),
        dataset=DatasetConfig(None, tiny.LENGTH), run_mode="compile", gen_savedir=folder,
        **{"precision": "fp8", **changes},
    )  # fmt: skip


def test_where_no_product_is_in_fp8_a_line_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "nnscaler")
    Trainer(in_fp8("a100", tmp_path)).run()
    assert [record.message for record in caplog.records] == [
        "A100 has no products in fp8, as far as is known: all are planned in bf16"
    ]
    plan = json.loads((tmp_path / "x" / "plan.json").read_text())
    assert "fp8        no product is faster in fp8 than in bf16" in explain(plan)
    assert "fp8" not in (tmp_path / "x" / "gencode_stage0.py").read_text().split('"""')[2]


def test_the_report_counts_what_is_in_fp8(tmp_path, caplog, capsys, monkeypatch):
    caplog.set_level(logging.WARNING, "nnscaler")
    monkeypatch.chdir(tmp_path)
    tiny.write_model(Path("model"))
    tiny.write_hardware(Path(), flops={"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 4e9})
    flags = "--run_mode compile --explain --model_id model --hardware hardware.json --sequence_length 32 --plan_ngpus 1"
    own = "--precision fp8 --fp8_keep_bf16 first"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), *own.split()])
    train.main()
    assert "fp8        llama_decoder_layer: 7 products multiply in fp8\n" in capsys.readouterr().out
    plan = json.loads(Path(".nnscaler", "llama", "plan.json").read_text())
    assert own in plan["about"]["command"]
    assert {name: block["calls"] for name, block in plan["blocks"].items() if name != "model"} == {
        "llama_decoder_layer": 1, "llama_decoder_layer_in_bf16": 1
    }  # fmt: skip
    assert caplog.records == []


def test_nothing_is_said_of_fp8_where_it_is_not_asked_for(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "nnscaler")
    Trainer(in_fp8("a100", tmp_path, precision="bf16")).run()
    assert caplog.records == []
    assert "fp8  " not in explain(json.loads((tmp_path / "x" / "plan.json").read_text()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"precision": "bf16", "fp8_keep_bf16": ("first",)},
            "fp8_keep_bf16 goes with precision fp8; precision is bf16",
        ),
        ({"fp8_keep_bf16": ("first", "3")}, "fp8_keep_bf16 is '3'; allowed are first, last"),
        ({"precision": "fp16"}, "precision is 'fp16'; allowed are auto, bf16, fp8, fp32"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        in_fp8("h100", tmp_path, **changes)
