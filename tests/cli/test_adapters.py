"""`train.py --lora_rank`: adapters of a model with weights, trained on two processes, exported, and gone on with."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import ckpt_merger
import train
from nnscaler.cli.config import AdapterConfig
from nnscaler.errors import UserError
from nnscaler.first_values import initial_parameters
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM
from nnscaler.trace import build_on_meta
from tests import tiny
from tests.launch import run
from tests.models.architectures import config_of

ROWS, STEPS, RATE = 8, 3, 0.02  # a step sees every row once, in whatever order
TARGETS = ("q_proj", "v_proj", "down_proj")
FLAGS = [
    "--model_id", "model", "--dataset_path", "data", "--hardware", "hardware.json", "--precision", "fp32",
    "--runtime_ngpus", "2", "--lora_rank", "4", "--learning_rate", str(RATE),
    "--lr_schedule", "constant", "--max_train_steps", str(STEPS), "--checkpoint_interval", "2",
]  # fmt: skip
TARGETED = ("--lora_target_modules", *TARGETS)


def call(folder: str, *flags: str) -> None:
    os.chdir(folder)
    sys.argv = ["train.py", *FLAGS, *flags]
    train.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a model with weights was adapted on two processes, by both plans."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(2)
    LlamaForCausalLM(tiny.config()).save_pretrained(folder / "model")
    tiny.write_dataset(folder / "data", rows=ROWS)
    tiny.write_hardware(folder)
    for plan, *others in (("1", "4"), ("2", "8", "--enable-chunk-loss")):
        flags = ("--name", f"plan{plan}", "--plan_ngpus", plan, "--grad_accumulation_steps", *others, *TARGETED)
        run(2, call, str(folder), *flags, init=False)
    return folder


@pytest.fixture
def export(folder, tmp_path, monkeypatch):
    """Exports the adapters of a run into a folder of its name."""
    return functools.partial(_export, folder, tmp_path, monkeypatch)


def _export(folder: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, Tensor]:
    output = outputs / name
    monkeypatch.setattr(
        sys, "argv", ["ckpt_merger.py", "--ckpt_dir", str(folder / "checkpoints" / name), "--output_dir", str(output)]
    )
    ckpt_merger.main()
    return load_file(output / "adapter_model.safetensors")


def plainly(folder: Path, targets: tuple[str, ...] | None = TARGETS) -> dict[str, Tensor]:
    """The same by peft and a plain loop; it begins with the same values. Writes adapters as peft does."""
    config = AutoConfig.from_pretrained(folder / "model")
    own, lora = (AdapterConfig(lora_rank=4, lora_target_modules=targets).lora("model") for _ in range(2))
    assert lora is not None
    on_meta = build_on_meta(lambda: CausalLM(config, adapters=own))[0]
    adapters = [name for name, parameter in on_meta.named_parameters() if parameter.requires_grad]
    first = dict(initial_parameters(on_meta, 0, torch.device("cpu"), adapters))
    assert first.keys() == set(adapters)
    assert all((".lora_B." in name) == (not value.any()) for name, value in first.items())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), lora)
    values = {name.removeprefix(WEIGHT_PREFIX): value for name, value in first.items()}
    assert values.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(values, strict=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(tiny.write_dataset(folder / "again", rows=ROWS)).long()
    for _ in range(STEPS):
        adam.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
    model.save_pretrained(folder / "plain")
    return load_file(folder / "plain" / "adapter_model.safetensors")


def test_adapters_are_those_of_plain_peft(folder, export):
    wanted = plainly(folder)
    for plan in (1, 2):
        found = export(f"plan{plan}")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert tiny.close(found[name], tensor) < 1e-4, name


def test_what_is_exported_is_adapters_alone_for_the_model_that_they_are_of(folder, tmp_path, export):
    found, output = export("plan2"), tmp_path / "plan2"
    assert not (output / "config.json").exists()
    written = json.loads((output / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 8, "model")
    assert set(written["target_modules"]) == set(TARGETS)
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, output)
    loaded = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    for name, tensor in found.items():
        assert torch.equal(loaded[name], tensor)


def test_a_run_goes_on_with_its_adapters(folder, export):
    """From the step before the last, under the other plan: as if it had never stopped."""
    wanted = export("plan2")
    before = folder / "checkpoints" / "plan2" / "step_00000002"
    flags = (
        "--plan_ngpus",
        "1",
        "--grad_accumulation_steps",
        "4",
        "--name",
        "later",
        "--resume_path",
        str(before),
        *TARGETED,
    )
    run(2, call, str(folder), *flags, init=False)
    found = export("later")
    for name, tensor in wanted.items():
        assert tiny.close(found[name], tensor) < 1e-4, name


def test_all_linear_layers_but_the_last_projection_are_named():
    lora = AdapterConfig(lora_rank=2).lora("model")
    build_on_meta(lambda: CausalLM(tiny.config(), adapters=lora))
    assert lora is not None
    assert {name.rsplit(".", 1)[-1] for name in lora.target_modules or ()} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert lora.base_model_name_or_path == "model"


def test_what_does_not_go_with_adapters_is_said():
    with pytest.raises(UserError, match=r"lora_alpha is 3\.0, and there is no lora_rank"):
        AdapterConfig(lora_alpha=3.0)
    with pytest.raises(UserError, match=r"lora_rank is 0; it must be at least 1"):
        AdapterConfig(lora_rank=0)
    lora = AdapterConfig(lora_rank=2, lora_target_modules=("no_proj",)).lora("model")
    with pytest.raises(UserError, match=r"lora_target_modules is no_proj, .*LlamaForCausalLM \(Target modules") as said:
        build_on_meta(lambda: CausalLM(tiny.config(), adapters=lora))
    assert str(said.value).endswith("are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head")
    lora = AdapterConfig(lora_rank=2).lora("model")
    with pytest.raises(
        UserError, match=r"Mamba2ForCausalLM \(.*'out_proj' is incompatible.*; its linear .* in_proj, out"
    ):
        build_on_meta(lambda: CausalLM(config_of("mamba2"), adapters=lora))


def test_adapters_as_peft_has_them():
    assert AdapterConfig().lora("id") is None
    plain, named = AdapterConfig(lora_rank=3).lora("id"), AdapterConfig(5, 2.5, ("q_proj", "x")).lora("other")
    assert plain is not None
    assert named is not None
    assert (plain.r, plain.lora_alpha, plain.target_modules, plain.task_type) == (3, 6, "all-linear", "CAUSAL_LM")
    assert (named.r, named.lora_alpha, named.target_modules) == (5, 2.5, {"q_proj", "x"})
    assert [lora.base_model_name_or_path for lora in (plain, named)] == ["id", "other"]
    with pytest.raises(UserError, match=r"^lora_target_modules is q_proj x, and there is no lora_rank"):
        AdapterConfig(lora_target_modules=("q_proj", "x"))
