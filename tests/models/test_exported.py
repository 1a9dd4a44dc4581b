"""Exported directories: complete, and read alike by transformers 5 and by what knows the names of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from nnscaler.errors import UserError
from nnscaler.models import files
from nnscaler.models.exported import write_config, write_older_tokenizer
from nnscaler.models.files import AssetWriter, find_weights
from tests import tiny
from tests.models.architectures import ARCHITECTURES, config_of

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def written(config: PretrainedConfig, folder: Path) -> dict[str, object]:
    write_config(config, folder / "config.json")
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_5_reads_the_same_configuration(name, tmp_path):
    fields = written(config_of(name), tmp_path)
    wanted = public(config_of(name))
    assert {key: public(AutoConfig.from_pretrained(tmp_path))[key] for key in wanted} == wanted
    assert set(wanted) <= set(fields), "no default is left out"


def public(config: PretrainedConfig) -> dict[str, Any]:
    fields = json.loads(json.dumps(config.to_dict()))
    return {name: value for name, value in fields.items() if name[0] != "_" and name != "attn_config"}


@pytest.mark.parametrize(
    ("name", "changes", "older"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, {"rope_theta": 500000.0}),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            "qwen2",
            {"rope_parameters": YARN},
            {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ),
        ("gpt_neox", {}, {"rotary_pct": 0.25, "rotary_emb_base": 10000.0}),
        ("phi", {}, {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
        ("gemma3_text", {}, {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}),
    ],
)
def test_rope_by_the_names_of_transformers_4(name, changes, older, tmp_path):
    fields = written(config_of(name, **changes), tmp_path)
    assert {key: fields.get(key) for key in older} == older
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config_of(name, **changes).rope_parameters
    if "rope_scaling" not in older:
        assert "rope_scaling" not in fields


@pytest.fixture
def source(tmp_path):
    """A model's directory with what people put into one."""
    folder = tiny.write_model(tmp_path / "source", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}").save_pretrained(folder)
    GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(folder)
    for name in ("LICENSE", "special_tokens_map.json", "model.safetensors", "pytorch_model.bin", ".hidden"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    return folder


def test_all_small_files_come_along(source, tmp_path):
    (tmp_path / "out").mkdir()
    config = AutoConfig.from_pretrained(source)
    config.use_cache = False  # as it is for training
    AssetWriter(config, "bfloat16", str(source), None, 4096)(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "LICENSE", "special_tokens_map.json",
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["max_position_embeddings"] == 4096
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert fields["use_cache"] is True
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (tokenizer["tokenizer_class"], tokenizer["chat_template"]) == ("PreTrainedTokenizerFast", "{{ messages }}")


def test_a_large_file_stays_behind_and_is_named(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "out").mkdir()
    (source / "large.txt").write_bytes(bytes(3_000_000))
    (source / "edge.txt").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(files, "SMALL", 2_000_000)
    AssetWriter(AutoConfig.from_pretrained(source), "bfloat16", str(source), None, 4096)(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"LICENSE", "edge.txt"}
    assert "large.txt" not in names
    assert f"{source}/large.txt has 3 MB: checkpoints are without it" in caplog.text
    assert "edge.txt" not in caplog.text


def test_a_shorter_length_and_a_rope_that_follows_it_change_nothing(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for changes, length in (({}, 16), ({"rope_parameters": dynamic}, 4096)):
        AssetWriter(tiny.config(**changes), "float32", "nowhere", None, length)(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 128


def test_without_the_directory_of_the_model(tmp_path, caplog):
    config = tiny.config(eos_token_id=5)
    config.architectures = None
    AssetWriter(config, "float32", "no/such", None)(tmp_path)
    assert "checkpoints have no other files of no/such" in caplog.text
    assert "no tokenizer in no/such" in caplog.text
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 5
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]


def test_a_configuration_says_nothing_of_the_computer_that_it_was_on(tmp_path):
    """And is the same each time, in the order of names."""
    config = tiny.config()
    config._name_or_path = "/home/me/llama"
    fields = written(config, tmp_path)
    assert not any(name.startswith("_") for name in fields)
    assert list(fields) == sorted(fields)


def test_signs_of_other_languages_stay_readable_in_a_tokenizer_s_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\u00e9"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("汉 {{ messages }}", encoding="utf-8")
    write_older_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    assert '"é"' in text
    assert '"汉 {{ messages }}"' in text


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.json", "nothing"])
def test_a_model_without_a_tokenizer_gets_that_of_the_dataset(file, tmp_path, monkeypatch):
    """Where the model's own cannot be had, it is the one that the dataset was made with."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        if name == "the dataset's":
            return SimpleNamespace(save_pretrained=lambda folder: (folder / "saved").write_text(""))
        raise UserError("there is none")

    monkeypatch.setattr(files.hub, "load_tokenizer", load)
    for name in ("model", "data", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / file).write_text("{}")
    (tmp_path / "data" / "packing.json").write_text('{"tokenizer": "the dataset\'s"}')
    AssetWriter(tiny.config(), "float32", str(tmp_path / "model"), tmp_path / "data")(tmp_path / "out")
    assert asked == ([] if file != "nothing" else [str(tmp_path / "model"), "the dataset's"])
    assert (tmp_path / "out" / "saved").exists() == (file == "nothing")


@pytest.mark.parametrize("online", [True, False])
def test_what_is_taken_from_the_hub(online, tmp_path, monkeypatch):
    """Beside weights only small files of the model itself, not of folders below it; of weights safetensors alone."""
    asked: list[tuple[str, dict[str, Any]]] = []
    for name in ("there", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "LICENSE").write_text("free")

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "there")

    def no_tokenizer(name: str) -> None:
        raise UserError("there is none")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(files.hub, "reachable", lambda: online)
    monkeypatch.setattr(files.hub, "load_tokenizer", no_tokenizer)
    AssetWriter(tiny.config(), "float32", "org/model", None)(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    ((name, options),) = asked
    assert (name, options.pop("local_files_only")) == ("org/model", not online)
    ignored = options.pop("ignore_patterns")
    assert {"*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*/*"} <= set(ignored)
    assert options == {}
    asked.clear()
    with pytest.raises(UserError, match=r"^org/model has no safetensors; convert its weights with transformers"):
        find_weights("org/model")
    save_file({"x": torch.zeros(1)}, tmp_path / "there" / "model.safetensors")
    assert find_weights("org/model") == tmp_path / "there"
    wanted = {"allow_patterns": ["*.safetensors", "*.safetensors.index.json"], "local_files_only": not online}
    assert asked == [("org/model", wanted)] * 2


def test_adapters_are_written_for_those_who_read_them(tmp_path):
    from peft import LoraConfig

    adapters = LoraConfig(r=2, target_modules=["q_proj"])
    AssetWriter(tiny.config(), "float32", "no/such", None, adapters=adapters)(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["target_modules"], fields["inference_mode"]) == (2, ["q_proj"], True)
    assert not adapters.inference_mode, "what is trained is not changed"
