"""Tiny models of many architectures, trained in parallel from safetensors and exported again, beside plain
transformers in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, LogConfig, LRSchedulerConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.compiler import ComputeConfig
from nnscaler.data.training import PackedDataset
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, prepare_config
from nnscaler.models.files import AssetWriter, find_weights
from nnscaler.operators.registry import find, no_flops
from nnscaler.runtime.optimizer import OptimizerConfig
from tests import tiny
from tests.models.architectures import config_of, random_weights
from tests.parity import EPSILON, RATE, SEED, TOLERANCE, Learned, train_plainly

STEPS = 3


def prepare(folder: Path, names: list[str]) -> None:
    """Writes data, hardware, and for each architecture a model directory with random weights."""
    tiny.write_dataset(folder / "data", rows=8)
    tiny.write_hardware(folder)
    for name in names:
        config = config_of(name, drops=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(random_weights(config), strict=False)
        model.save_pretrained(folder / "models" / name)


def train_all(names: list[str], folder: Path) -> None:
    """On every rank: trains each architecture in parallel, one after the other."""
    devices = int(os.environ["WORLD_SIZE"])
    for index, name in enumerate(names):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)  # where they meet, each time anew
        Trainer(arguments(name, devices, folder)).run()


def arguments(name: str, devices: int, folder: Path) -> TrainerArgs:
    directory = folder / "models" / name
    config = AutoConfig.from_pretrained(directory)
    prepare_config(config, tiny.LENGTH, "auto")
    return TrainerArgs(
        name=run_name(name, devices),
        model=ModelConfig(
            make=lambda: CausalLM(config),
            weights=find_weights(str(directory)),
            weight_prefix=WEIGHT_PREFIX,
            vocabulary=tiny.VOCABULARY,
            save_assets=AssetWriter(config, "float32", str(directory), None),
        ),
        compute=ComputeConfig(devices, devices, hardware=str(folder / "hardware.json")),
        dataset=DatasetConfig(PackedDataset.open(folder / "data")),
        optimizer=OptimizerConfig(lr=RATE, eps=EPSILON),
        lr_scheduler=LRSchedulerConfig("constant"),
        checkpoint=CheckpointConfig(folder / "checkpoints", interval=0),
        log=LogConfig(folder / "runs"),
        precision="fp32",
        max_train_steps=STEPS,
        seed=SEED,
        gen_savedir=folder / "code",
    )


def run_name(name: str, devices: int) -> str:
    return f"{name}-{devices}"


def check(name: str, devices: int, folder: Path) -> None:
    """Raises AssertionError where what `train_all` made of an architecture is not what plain transformers makes."""
    losses, weights, norms = _plainly(name, folder)
    run = run_name(name, devices)
    metrics = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    for step, (found, wanted) in enumerate(zip(metrics, losses, strict=True)):
        assert abs(found["loss"] - wanted) < TOLERANCE * wanted, f"{run}, step {step}: loss {found['loss']}, {wanted}"
    for step, (found, wanted) in enumerate(zip(metrics, norms, strict=True)):
        norm = found["gradient_norm"]
        assert abs(norm - wanted) < TOLERANCE * wanted, f"{run}, step {step}: norm {norm}, {wanted}"
    assert not (whole := computed_whole(run, folder)), f"{run}: each device computes all of {whole}"

    exported = folder / "exported" / run
    exported.parent.mkdir(exist_ok=True)
    export_model(Checkpoint.open(latest_checkpoint(folder / "checkpoints" / run)), exported)
    assert keys(exported) == keys(folder / "models" / name), f"{run}: exported keys are not the model's"
    model, loading = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), f"{run}: {loading}"
    for key, parameter in model.named_parameters():
        error = tiny.close(parameter.detach(), weights[WEIGHT_PREFIX + key])
        assert error < TOLERANCE, f"{run}: {key} is off by {error:.2g} after {STEPS} steps"


def _plainly(name: str, folder: Path) -> Learned:
    directory = folder / "models" / name
    config = AutoConfig.from_pretrained(directory)
    prepare_config(config, tiny.LENGTH, "eager")
    model = CausalLM(config)
    model.model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).train()
    rows = np.asarray(datasets.load_from_disk(str(folder / "data"))["input_ids"])
    return train_plainly(model, rows, [1] * STEPS)


def computed_whole(run: str, folder: Path) -> set[str]:
    """Operators with arithmetic of repeated layers that no device has only a part of."""
    plan = json.loads((folder / "code" / run / "plan.json").read_text())
    found = set()
    for block in list(plan["blocks"].values())[1:]:
        for name, node in block["nodes"].items():
            operator: Any = find(node["op"])
            if operator is not None and operator.flops is not no_flops and set(node["split"].split(",")) == {"-"}:
                found.add(f"{name} ({node['op']})")
    return found


def keys(directory: Path) -> dict[str, list[int]]:
    """Key -> shape of a directory's safetensors."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    return found
