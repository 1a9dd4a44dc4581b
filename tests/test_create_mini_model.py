"""create_mini_model.py: complete small models from bundled or local configurations, and bad input."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import create_mini_model
from nnscaler import hub
from nnscaler.command import run
from nnscaler.errors import UserError
from nnscaler.models import BUNDLED, load_config
from nnscaler.models.changes import changed_config

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
ASK_THE_HUB = hub.reachable
SMALL = ["hidden_size=64", "num_attention_heads=4", "num_key_value_heads=2", "intermediate_size=96", "vocab_size=300"]
SMALL += ["bos_token_id=0", "eos_token_id=1"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs create_mini_model.py in this process; it writes to `out` unless told otherwise."""

    def call(*flags: str, model: str | Path = LLAMA, out: str = "out", small: bool = True) -> Path:
        argv = ["create_mini_model.py", f"--model_id={model}", f"--output_id={tmp_path / out}", *flags]
        monkeypatch.setattr(sys, "argv", argv + [f"--set={change}" for change in SMALL if small])
        run(create_mini_model.main)
        return tmp_path / out

    return call


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("name", "parameters", "eos"),
    [
        ("Meta-Llama-3-8B", 8_030_261_248, 128001),
        ("Meta-Llama-3-8B-Instruct", 8_030_261_248, 128009),
        ("Meta-Llama-3-70B", 70_553_706_496, 128001),
    ],
)
def test_bundled_configurations_have_the_published_size(
    name: str, parameters: int, eos: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(f"meta-llama/{name}")
    assert "bundled" in caplog.text
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (128000, eos, 128256)
    assert config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}
    assert (config.max_position_embeddings, config.rms_norm_eps) == (8192, 1e-5)


def test_the_model_loads_in_bfloat16_and_runs(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = command()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    printed = capsys.readouterr().out
    assert f"parameters  {model.num_parameters():,}" in printed
    assert f"size        {sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.1f} MB" in printed
    with safe_open(out / "model.safetensors", "pt") as stored:
        assert stored.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    logits = model(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 300)
    assert logits.isfinite().all()
    assert 0.015 < model.lm_head.weight.std() < 0.025  # as initializer_range says
    assert (model.model.norm.weight == 1).all()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_the_seed_decides_the_weights(command: Any) -> None:
    weights = [command(*flags, out=f"out{i}") / "model.safetensors" for i, flags in enumerate([(), ("--seed=0",)])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    other = command("--seed", "1", out="other") / "model.safetensors"
    assert other.read_bytes() != weights[0].read_bytes()


def test_fields_are_set(command: Any) -> None:
    changes = ["rope_theta=10000", "attention_bias=true", "pad_token_id=7", "hidden_act=gelu", "rms_norm_eps=1"]
    config = AutoConfig.from_pretrained(command("--num-hidden-layers=2", *(f"--set={change}" for change in changes)))
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 64, 16)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.attention_bias is True
    assert (config.pad_token_id, config.hidden_act, config.rms_norm_eps) == (7, "gelu", 1.0)
    assert config.architectures == ["LlamaForCausalLM"]


def test_the_tokenizer_comes_along(command: Any, tokenizer_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first = command(out="without")
    assert "no tokenizer is copied" in caplog.text
    assert not list(first.glob("tokenizer*"))
    second = command(f"--tokenizer={tokenizer_path}", out="given")
    assert len(AutoTokenizer.from_pretrained(second)) == 2
    third = command(model=second, out="of the model", small=False)  # a local model, with a tokenizer of its own
    assert len(AutoTokenizer.from_pretrained(third)) == 2
    assert (third / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_the_configuration_has_the_ids_of_another_tokenizer(command: Any, tokenizer_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.eos_token = "b"
    tokenizer.save_pretrained(tokenizer_path)
    sizes = [f"--set={change}" for change in SMALL if "token_id" not in change]
    flags = [*sizes, "--set=bos_token_id=7", f"--tokenizer={tokenizer_path}"]
    config = AutoConfig.from_pretrained(command(*flags, small=False))
    assert (config.bos_token_id, config.eos_token_id) == (7, 1)
    config = AutoConfig.from_pretrained(command(*flags, "--set=eos_token_id=5", small=False, out="said"))
    assert config.eos_token_id == 5


def test_the_largest_seed_that_torch_takes_makes_other_weights(command: Any) -> None:
    weights = []
    for seed in (0, 2**63 - 1):
        with safe_open(command(f"--seed={seed}", out=f"seed{seed}") / "model.safetensors", "pt") as file:
            weights.append(file.get_tensor("model.layers.0.self_attn.q_proj.weight"))
    assert not torch.equal(*weights)


def test_lists_with_an_entry_a_layer_follow_the_number_of_layers() -> None:
    config = changed_config(AutoConfig.for_model("qwen3", num_hidden_layers=8), {"num_hidden_layers": "3"})
    assert config.layer_types == ["full_attention"] * 3


def test_a_list_that_is_given_is_not_cut():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    base = AutoConfig.for_model("qwen3", num_hidden_layers=8, use_sliding_window=True)
    config = changed_config(base, {"num_hidden_layers": "3", "layer_types": json.dumps(kinds)})
    assert config.layer_types == kinds != changed_config(base, {"num_hidden_layers": "3"}).layer_types


def test_a_head_dimension_of_its_own_stays() -> None:
    config = changed_config(AutoConfig.for_model("qwen3", hidden_size=64, head_dim=128), {"hidden_size": "96"})
    assert config.head_dim == 128


def test_usual_names_work_where_a_class_has_others() -> None:
    config = changed_config(AutoConfig.for_model("gpt2"), {"num_hidden_layers": "3", "n_embd": "24"})
    assert (config.n_layer, config.hidden_size) == (3, 24)


BAD_INPUT = [
    (["--set=hiden_size=3"], ["'hiden_size'", "did you mean hidden_size"]),
    (["--set=xxxxxxxx=3"], ["'xxxxxxxx'", "num_attention_heads"]),
    (["--set=model_type=gpt2"], ["'model_type'"]),
    (["--set=hidden_size=big"], ["hidden_size", "int", "'big'"]),
    (["--set=hidden_size=1.5"], ["hidden_size", "int", "'1.5'"]),
    (["--set=hidden_size=true"], ["hidden_size", "int", "'true'"]),
    (["--set=hidden_size=null"], ["hidden_size", "int"]),
    (["--set=use_cache=1"], ["use_cache", "bool", "'1'"]),
    (["--set=rms_norm_eps=x"], ["rms_norm_eps", "float", "'x'"]),
    (["--set=rope_parameters=3"], ["rope_parameters", "dict", "'3'"]),
    (["--set=hidden_size"], ["FIELD=VALUE", "'hidden_size'"]),
    (["--set=hidden_size=4097"], ["hidden_size 4097", "num_attention_heads 32"]),
    (["--set=num_key_value_heads=5"], ["num_attention_heads 32", "num_key_value_heads 5"]),
    (["--set=num_attention_heads=0"], ["num_attention_heads is 0", "1 or more"]),
    (["--set=vocab_size=-1"], ["vocab_size is -1"]),
    (["--set=hidden_act=nonsense"], ["hidden_act is 'nonsense'; allowed are ", "gelu", "silu"]),
    (["--set=attention_dropout=7"], ["attention_dropout is 7.0", "from 0 to 1"]),
    (["--set=rope_theta=0"], ["rope_theta is 0", "more than 0"]),
    (["--set=max_position_embeddings=0"], ["max_position_embeddings is 0", "1 or more"]),
    (["--set=rms_norm_eps=NaN"], ["rms_norm_eps is nan", "finite"]),
    (["--set=rope_theta=-1"], ["rope_theta is -1.0", "at least 0"]),
    (["--set=initializer_range=1e999"], ["initializer_range is inf"]),
    (["--set=hidden_size=32000000"], ["GB of memory"]),
    (["--num_hidden_layers=0"], ["num_hidden_layers is 0"]),
    (["--num_hidden_layers=x"], ["num_hidden_layers", "'x'"]),
    (["--seed=-1"], ["--seed is -1"]),
    (["--seed=99999999999999999999"], ["--seed"]),
    (["--tokenizer=no/such"], ["no/such", "hub cannot be reached"]),
]


@pytest.mark.parametrize(("flags", "said"), BAD_INPUT, ids=[" ".join(case[0]) for case in BAD_INPUT])
def test_bad_input_is_one_line(flags: list[str], said: list[str], tmp_path: Path, command: Any, capfd: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        command(*flags, small=False)
    assert exit_.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    for words in said:
        assert words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_ids_than_the_model(tokenizer_path: Path, command: Any, caplog: Any) -> None:
    """An added padding token that no data holds is no reason to stop."""
    changes = [*SMALL[:4], "vocab_size=1", "bos_token_id=0", "eos_token_id=0"]
    out = command(f"--tokenizer={tokenizer_path}", *(f"--set={change}" for change in changes), small=False)
    assert len(AutoTokenizer.from_pretrained(out)) == 2
    assert "the tokenizer has 2 ids, more than vocab_size 1" in caplog.text


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such directory: no/such; .* come with this package are .*Meta-Llama-3-70B"
    ):
        load_config("no/such")
    with pytest.raises(UserError, match=r"is not a model: it has no config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{damaged")
    with pytest.raises(UserError, match=r"cannot load the configuration"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard of"}))
    with pytest.raises(UserError, match=r"cannot load the configuration.*unheard of"):
        load_config(str(tmp_path))


def test_an_existing_output_is_left_alone(tmp_path: Path, command: Any, capfd: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("content")
    with pytest.raises(SystemExit):
        command()
    assert "already exists" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_hub_that_is_silent_is_asked_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The worst case: a hub that takes connections and never answers."""
    ASK_THE_HUB.cache_clear()
    monkeypatch.setattr(hub, "reachable", ASK_THE_HUB)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert load_config(LLAMA).hidden_size == 4096
        server.setblocking(False)
        connections = 0
        with suppress(BlockingIOError):
            while server.accept():
                connections += 1
    ASK_THE_HUB.cache_clear()
    assert connections == 1, "asked once, and waited for as long as `hub.PATIENCE`"
    assert "using the bundled configuration" in caplog.text


def test_bundled_names() -> None:
    assert set(BUNDLED) == {f"meta-llama/Meta-Llama-3-{size}" for size in ("8B", "8B-Instruct", "70B")}
