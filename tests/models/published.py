"""A model as its publisher has it goes in, is trained for a step, and comes out.

Every key of its files is there by name and shape, with random weights. Names and shapes are those of Qwen/Qwen3-0.6B,
written out here and not asked of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
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
from nnscaler.runtime.optimizer import OptimizerConfig
from tests import tiny

RATE = 1e-3

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
BESIDE = {
    "generation_config.json": '{"do_sample": true, "eos_token_id": [1, 0], "temperature": 0.6}\n',
    "tokenizer_config.json": '{"model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer"}\n',
    "vocab.json": "{}\n",
    "merges.txt": "#version: 0.2\n",
    "LICENSE": "of the model\n",
}


def shapes_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape of each tensor of a Qwen3's files. The tied head is among them, as its publisher has it."""
    width, inner, size = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    heads, groups = (size * config[name] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm.weight": [width],
        "mlp.down_proj.weight": [width, inner],
        "mlp.gate_proj.weight": [inner, width],
        "mlp.up_proj.weight": [inner, width],
        "post_attention_layernorm.weight": [width],
        "self_attn.k_norm.weight": [size],
        "self_attn.k_proj.weight": [groups, width],
        "self_attn.o_proj.weight": [width, heads],
        "self_attn.q_norm.weight": [size],
        "self_attn.q_proj.weight": [heads, width],
        "self_attn.v_proj.weight": [groups, width],
    }
    table = [config["vocab_size"], width]
    layers = range(config["num_hidden_layers"])
    return {
        "lm_head.weight": table,
        "model.embed_tokens.weight": table,
        **{f"model.layers.{number}.{name}": shape for number in layers for name, shape in layer.items()},
        "model.norm.weight": [width],
    }


def write_published(folder: Path, config: dict[str, Any], files: int = 3) -> None:
    """Writes the model's directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_of(config).items():
        noise = torch.randn(shape, generator=generator) * 0.02
        tensors[name] = (noise + 1 if len(shape) == 1 else noise).to(torch.bfloat16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    names, where = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        mine = names[number * len(names) // files : (number + 1) * len(names) // files]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(mine, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def train_and_export(folder: Path, rows: int, vocabulary: int) -> float:
    """Trains `folder/model` for a step of so many sequences in bf16, exports it to `folder/out`, and gives the loss."""
    tiny.write_dataset(folder / "data", rows=rows, vocabulary=vocabulary)
    config = AutoConfig.from_pretrained(folder / "model")
    prepare_config(config, tiny.LENGTH, "auto")
    Trainer(
        TrainerArgs(
            name="published",
            model=ModelConfig(
                make=lambda: CausalLM(config),
                weights=find_weights(str(folder / "model")),
                weight_prefix=WEIGHT_PREFIX,
                vocabulary=vocabulary,
                save_assets=AssetWriter(config, "bfloat16", str(folder / "model"), None),
            ),
            compute=ComputeConfig(micro_batches=rows, hardware=tiny.write_hardware(folder)),
            dataset=DatasetConfig(PackedDataset.open(folder / "data")),
            optimizer=OptimizerConfig(lr=RATE),
            lr_scheduler=LRSchedulerConfig("constant"),
            checkpoint=CheckpointConfig(folder / "checkpoints", interval=0),
            log=LogConfig(folder / "runs"),
            precision="bf16",
            max_train_steps=1,
            gen_savedir=folder / "code",
        )
    ).run()
    export_model(Checkpoint.open(latest_checkpoint(folder / "checkpoints")), folder / "out")
    (line,) = (folder / "runs" / "published" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(line)["loss"])


def check(folder: Path, loss: float) -> None:
    """Raises AssertionError where `folder/out` is not `folder/model` after a step that had this loss."""
    check_tensors(stored(folder / "model"), stored(folder / "out"))
    check_files(folder)
    rows = torch.tensor(np.asarray(datasets.load_from_disk(str(folder / "data"))["input_ids"]))
    plain, now = (loss_of(folder / side, rows) for side in ("model", "out"))
    assert abs(loss - plain) < 2e-3 * plain, f"the step's loss is {loss}, that of plain transformers {plain}"
    assert now < plain


def loss_of(directory: Path, rows: Tensor) -> float:
    """The loss in fp32 of what plain transformers reads from a directory, where nothing is missing or left over."""
    read = AutoModelForCausalLM.from_pretrained
    model, loading = read(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def check_tensors(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert after.keys() == before.keys() - {"lm_head.weight"}, "all keys; the tied head once, as transformers writes it"
    for name, tensor in after.items():
        assert (tensor.shape, tensor.dtype) == (before[name].shape, before[name].dtype), name
        change = (tensor.float() - before[name].float()).abs()
        rounding = before[name].float().abs() * 2.0**-8
        assert (change <= 2 * RATE + rounding).all(), f"{name} changed by {change.max()}"
        assert change.max() > 0 or tensor.dim() == 1, f"{name} has not been trained"


def check_files(folder: Path) -> None:
    for name, text in BESIDE.items():
        written = (folder / "out" / name).read_text()
        if name == "tokenizer_config.json":  # older versions of transformers need more in it
            assert json.loads(written).items() >= json.loads(text).items()
        else:
            assert written == text, name
    known, found = (json.loads((folder / side / "config.json").read_text()) for side in ("model", "out"))
    differ = {name for name in known if known[name] != found.get(name)}
    assert differ <= {"transformers_version"}, f"config.json differs in {differ}"


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a directory's safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found
