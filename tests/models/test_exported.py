"""Exported directories: complete, and read alike by transformers 5 and by what knows the names of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from nnscaler.models import files
from nnscaler.models.exported import write_config
from nnscaler.models.files import AssetWriter
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
