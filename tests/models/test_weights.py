"""Weights from files: all of them, those of the model, and where they are not: one line that says so."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.errors import UserError
from nnscaler.first_values import initial_parameters
from nnscaler.models import weights
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, prepare_config
from nnscaler.models.files import find_weights
from nnscaler.models.unread import Unread
from nnscaler.models.weights import WeightFiles, check_weights, fixed_tensors, load_weights, persistent_buffers
from nnscaler.runtime.module import ParallelModule
from nnscaler.shards import Box
from nnscaler.trace import build_on_meta
from tests import tiny
from tests.models.architectures import config_of

CPU = torch.device("cpu")
TOKENS = torch.randint(tiny.VOCABULARY, (1, tiny.LENGTH), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": TOKENS, "labels": TOKENS}


def source(**changes: object) -> Source:
    config = tiny.config(**changes)
    prepare_config(config, tiny.LENGTH, "auto")
    return Source(lambda: CausalLM(config), INPUTS, torch.float32)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    config = ComputeConfig(hardware=tiny.write_hardware(folder))
    return {tied: compile_model(source(tie_word_embeddings=tied), config, folder / str(tied)) for tied in (False, True)}


@pytest.fixture
def folder(tmp_path):
    """A model in three shards."""
    torch.manual_seed(2)
    LlamaForCausalLM(tiny.config()).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    return tmp_path / "model"


def change(folder: Path, function) -> None:
    """Applies a function to the tensors of a model directory, which becomes one file."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(function(tensors), folder / "model.safetensors", {"format": "pt"})


def loss(folder: Path, code: Path, **changes: object) -> float:
    """Of the compiled model with the weights of a folder."""
    model = source(**changes).build()[0]
    check_weights(folder, model, WEIGHT_PREFIX)
    module = ParallelModule(code, CPU)
    load_weights(folder, module, model, WEIGHT_PREFIX)
    return module(**INPUTS).item()


def right(folder: Path) -> float:
    """Of transformers' own model of the folder."""
    logits = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    return nn.functional.cross_entropy(logits[0], TOKENS[0], reduction="sum").item()


def half(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def without_head(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_shards_and_one_file_are_read_as_transformers_reads_them(folder, compiled):
    wanted = right(folder)
    assert loss(folder, compiled[False]) == pytest.approx(wanted, rel=1e-6)
    change(folder, half)
    assert loss(folder, compiled[False]) == pytest.approx(right(folder), rel=1e-6)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_stored_once_or_twice(folder, compiled, kept):
    other = ({"model.embed_tokens.weight", "lm_head.weight"} - {kept}).pop()
    (folder / "config.json").write_text(tiny.config(tie_word_embeddings=True).to_json_string())
    change(folder, lambda tensors: {**tensors, other: tensors[kept].clone()})
    wanted = right(folder)
    assert loss(folder, compiled[True], tie_word_embeddings=True) == pytest.approx(wanted, rel=1e-6)
    change(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != other})
    assert loss(folder, compiled[True], tie_word_embeddings=True) == pytest.approx(wanted, rel=1e-6)


def test_files_of_a_model_without_its_head(tmp_path, compiled):
    torch.manual_seed(2)
    LlamaModel(tiny.config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    wanted = right(tmp_path / "base")
    assert loss(tmp_path / "base", compiled[True], tie_word_embeddings=True) == pytest.approx(wanted, rel=1e-6)


def test_unexpected_tensors_are_counted_and_named(folder, compiled, caplog):
    change(folder, lambda tensors: {**tensors, "model.extra": torch.ones(1), "more.extra": torch.ones(1)})
    loss(folder, compiled[False])
    assert "has 2 tensors that the model has no place for: model.extra, more.extra" in caplog.text


CHANGES = {
    "missing": (lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k},
                "lacks 3 of the model's 21 tensors: .*layers.1.mlp"),
    "head": (without_head, "lacks 1 of the model's 21 tensors: lm_head.weight"),
    "shape": (lambda t: {**t, "model.norm.weight": torch.ones(33)},
              r"model.norm.weight of shape \[33\], the model's is \[32\]"),
    "type": (lambda t: {**t, "model.norm.weight": torch.ones(32, dtype=torch.int8)},
             "model.norm.weight as I8, which only quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_fit_is_an_error(case, folder, compiled):
    function, message = CHANGES[case]
    change(folder, function)
    model = source().build()[0]
    with pytest.raises(UserError, match=message):
        check_weights(folder, model, WEIGHT_PREFIX)
    with pytest.raises(UserError, match=message):
        load_weights(folder, ParallelModule(compiled[False], CPU), model, WEIGHT_PREFIX)


def absent_shard(folder):
    next(folder.glob("*-00002-of-*")).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_index(folder):
    absent_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def only_bin(folder):
    change(folder, half)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    path = next(folder.glob("*-00002-of-*"))
    path.write_bytes(path.read_bytes()[:-100])


def wrong_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(folder / index["weight_map"]["model.norm.weight"])
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / index["weight_map"]["model.norm.weight"])


def no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{damaged")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (absent_shard, "lacks 1 of the 3 files that its index names: model-00002-of-00003.safetensors"),
        (no_index, "has model-00001-of-00003.safetensors and 1 other safetensors, but neither model.safetensors nor"),
        (
            only_bin,
            "has weights as pytorch_model.bin, not as safetensors; convert its weights with transformers: python",
        ),
        (cut_short, "model-00002-of-00003.safetensors' is cut short or damaged"),
        (wrong_index, "lacks lm_head.weight, which the index says it holds"),
        (no_json, "is not an index of safetensors"),
    ],
)
def test_a_directory_that_is_not_whole_is_an_error(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message):
        find_weights(str(folder))


def test_a_directory_of_nothing_but_a_configuration(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert find_weights(str(folder)) is None


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "mamba", "bloom", "qwen3_moe", "granite"])
def test_first_values_are_drawn_as_transformers_draws_them(name):
    """What a class draws in a way of its own, too: GPT-2's last projections of a block, Mamba's steps."""
    config = config_of(name)
    meta, _ = build_on_meta(lambda: AutoModelForCausalLM.from_config(config))
    found = dict(initial_parameters(meta, 3, CPU))
    wanted = {name: value.detach() for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        mean, std = value.double().mean(), value.double().std(correction=0)
        many = value.numel() ** 0.5
        assert (found[key].double().mean() - mean).abs() <= 8 * std / many, key
        assert (found[key].double().std(correction=0) - std).abs() <= 6 * std / many, key


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def reset_parameters(self) -> None:
        pass


class Half(nn.Linear):
    """A layer whose `_init_weights`, around it, knows of the weight alone."""


class Model(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Half):
            nn.init.constant_(module.weight, 3.0)


def test_what_the_initialisation_leaves_alone_is_reset_or_refused():
    values = dict(initial_parameters(Model(Half(4, 4).to("meta")), 0, CPU))
    assert values["parts.0.weight"].eq(3.0).all()
    assert values["parts.0.bias"].abs().max() <= 0.5
    with pytest.raises(UserError, match=r"parameter 'parts.0.scale' of Scaled has no first value"):
        list(initial_parameters(Model(Scaled().to("meta")), 0, CPU))


class Buffered(nn.Module):
    """A persistent buffer, and one that files do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("made", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.l(x) * self.scale * self.made).sum()


def test_persistent_buffers_are_loaded(tmp_path, caplog):
    inputs = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    made = Source(Buffered, inputs, torch.float32)
    compile_model(made, ComputeConfig(hardware=tiny.write_hardware(tmp_path)), tmp_path / "code")
    model, module = Buffered(), ParallelModule(tmp_path / "code", CPU)
    model.scale.copy_(torch.arange(4.0))
    (tmp_path / "model").mkdir()
    save_file({**model.state_dict(), "made": torch.zeros(4)}, tmp_path / "model" / "model.safetensors")
    check_weights(tmp_path / "model", made.build()[0], "")
    assert "1 tensor that the model has no place for: made" in caplog.text
    load_weights(tmp_path / "model", module, made.build()[0], "")
    assert module(**inputs).item() == pytest.approx(model(**inputs).item(), rel=1e-5)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    save_file({"l.weight": model.l.weight.data, "l.bias": model.l.bias.data}, tmp_path / "model" / "model.safetensors")
    check_weights(tmp_path / "model", made.build()[0], "")
    assert "lacks 1 buffer, as new here: scale" in caplog.text
    caplog.clear()
    whole = dict(model.state_dict())
    save_file(whole, tmp_path / "model" / "model.safetensors")
    check_weights(tmp_path / "model", made.build()[0], "")
    assert caplog.text == "", "of files that fit, nothing is said"
    save_file({**whole, "scale": torch.ones(5)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"has scale of shape \[5\], the model's is \[4\]"):
        check_weights(tmp_path / "model", made.build()[0], "")


def test_one_file_counts_before_an_index_and_is_opened_once_for_all_that_is_read(tmp_path, monkeypatch):
    """Also numbers, which have no dimension."""
    opened = []
    monkeypatch.setattr(weights, "safe_open", lambda *given: opened.append(given) or safe_open(*given))
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(5.0)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c": "elsewhere"}}')
    (tmp_path / "other.safetensors").write_text("")
    files = WeightFiles.find(tmp_path)
    assert files is not None
    assert sorted(files.tensors) == ["a", "b"]
    assert files.tensors["a"].read(Box((1, 1), (1, 2))).tolist() == [[4.0, 5.0]]
    assert files.tensors["b"].whole().item() == 5.0
    assert files.tensors["a"].whole().sum() == 15
    assert len(opened) == 2, "to see what is there, and to read"


def test_what_training_leaves_beside_weights_is_no_model(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "README.md"):
        (tmp_path / name).write_text("")
        assert WeightFiles.find(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"has weights as pytorch_model.bin, not as safetensors; convert its weights"):
        WeightFiles.find(tmp_path)


def test_what_a_model_s_files_hold_beside_what_is_trained():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight  # tied
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("passing", torch.ones(1), persistent=False)
            self.inner = nn.BatchNorm1d(2)

    model = Model()
    assert list(persistent_buffers(model)) == [
        "kept", "inner.running_mean", "inner.running_var", "inner.num_batches_tracked"
    ]  # fmt: skip
    fixed = fixed_tensors(model, ["first.weight", "first.bias", "inner.weight", "inner.bias"])
    assert sorted(fixed) == [
        "frozen", "inner.num_batches_tracked", "inner.running_mean", "inner.running_var", "kept", "second.bias"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        *((kind, torch.bfloat16, None) for kind in ("F64", "F32", "F16", "BF16")),
        ("F8_E4M3", torch.bfloat16, "has x as F8_E4M3, which only quantised models have; training needs one of BF16"),
        ("I8", torch.float32, "has x as I8, which only quantised models have"),
        ("F32", torch.int64, "has x as F32, the model's is torch.int64"), ("I64", torch.int64, None),
    ],
)  # fmt: skip
def test_types_that_weights_may_have(stored, wanted, said):
    tensor = Unread((2, 3), stored, lambda box: torch.zeros(box.sizes))
    with nullcontext() if said is None else pytest.raises(UserError, match=f"^'model' {said}"):
        weights._check_tensor(Path("model"), "x", tensor, torch.zeros(2, 3, dtype=wanted))
    with pytest.raises(UserError, match=r"has x of shape \[2, 3\], the model's is \[3, 2\]"):
        weights._check_tensor(Path("model"), "x", tensor, torch.zeros(3, 2, dtype=wanted))


def test_three_names_are_told_and_how_many_more_there_are():
    assert [weights._some(list("abcde")[:count]) for count in (1, 3, 4, 5)] == [
        "a", "a, b, c", "a, b, c and 1 more", "a, b, c and 2 more"
    ]  # fmt: skip
