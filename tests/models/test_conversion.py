"""Weights in files and in models: as transformers renames and merges them on loading, in parts, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from nnscaler.models import conversion
from nnscaler.models.adapters import adapted
from nnscaler.models.conversion import to_files, to_model
from nnscaler.models.unread import Unread
from nnscaler.models.weights import WeightFiles
from nnscaler.shards import Box
from tests.distributed.test_mixtures import FAMILIES
from tests.models.architectures import config_of, random_weights


def model_of(family: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_of(family, **FAMILIES[family]), dtype=torch.float32)
    model.load_state_dict(random_weights(model.config), strict=False)
    return model


def unread(tensors: Mapping[str, Tensor]) -> dict[str, Unread]:
    return {
        name: Unread(tensor.shape, tensor.dtype, lambda box, tensor=tensor: tensor[box.slices])  # type: ignore[misc]
        for name, tensor in tensors.items()
    }


def some_boxes(shape: torch.Size) -> list[Box]:
    chosen = random.Random(0)
    boxes = [Box((0,) * len(shape), tuple(shape))]
    for _ in range(5):
        begins = [chosen.randrange(size) for size in shape]
        sizes = [chosen.randint(1, size - begin) for size, begin in zip(shape, begins)]
        boxes.append(Box(tuple(begins), tuple(sizes)))
    return boxes


@pytest.mark.parametrize("family", FAMILIES)
def test_files_to_a_model_and_back(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = WeightFiles.find(tmp_path)
    assert files is not None
    found = to_model(files.tensors, model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or name in found}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        for box in some_boxes(tensor.shape):
            assert torch.equal(found[name].read(box), tensor[box.slices]), (name, box)
    assert to_model(unread(wanted), model).keys() == wanted.keys(), "the model's own names are taken as they are"
    saved = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for shaped in (wanted, {name: tensor.flatten() for name, tensor in wanted.items()}):  # as we may hold them
        written = to_files(unread(shaped), model)
        assert written.keys() == saved.keys()
        assert all(torch.equal(written[name].whole(), saved[name]) for name in saved)


def test_experts_are_merged_by_their_numbers_in_whatever_order_files_have_them():
    model = AutoModelForCausalLM.from_config(config_of("mixtral", num_local_experts=12), dtype=torch.float32)
    own = model.state_dict()
    files = to_files(unread(own), model)
    assert sum(".10." in name for name in files) == 2 * 3, "of both layers"
    for names in (reversed(files), sorted(files)):
        found = to_model({name: files[name] for name in names}, model)
        assert all(torch.equal(found[name].whole(), tensor) for name, tensor in own.items())


def test_older_names_become_the_model_s_also_where_it_has_nothing_of_that_name(monkeypatch):
    """Or something else of the older name."""
    model = AutoModelForCausalLM.from_config(config_of("mixtral"), dtype=torch.float32)
    tensor = unread({"x": torch.zeros(1)})["x"]
    older = "model.layers.9.block_sparse_moe.gate.weight"
    assert list(to_model({older: tensor}, model)) == ["model.layers.9.mlp.gate.weight"]
    renaming = WeightRenaming("q_proj", "o_proj")
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [renaming])
    layer = "model.layers.0.self_attn"
    assert list(to_model({f"{layer}.q_proj.weight": tensor}, model)) == [f"{layer}.o_proj.weight"]


def test_a_name_of_the_model_s_own_is_not_taken_for_an_older_one(tmp_path):
    """In files, `norm` in a layer is what the model calls `kv_norm`; the model's last norm is `norm` in both."""
    model = AutoModelForCausalLM.from_config(config_of("deepseek_v4"), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {"model.norm.weight", "model.layers.0.attn.norm.weight"} <= saved.keys()
    found = to_model(unread(saved), model)
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["model.norm.weight"].whole(), model.model.norm.weight)


def test_nor_is_that_of_a_layer_with_adapters():
    """In older files of Laguna, an expert that all tokens have was called otherwise."""
    model = AutoModelForCausalLM.from_config(config_of("laguna"), dtype=torch.float32)
    own = model.state_dict()
    inner = adapted(model, LoraConfig(target_modules="all-linear")).get_base_model()
    assert to_model(unread(own), inner).keys() == own.keys()


def test_gate_and_rest_are_two_dimensions_in_one():
    whole = torch.arange(3 * 8 * 5).view(3, 8, 5)
    (tensor,) = unread({"x": whole}).values()
    shaped = tensor.shaped((3, 2, 4, 5))
    for box in some_boxes(shaped.shape):
        assert torch.equal(shaped.read(box), whole.view(3, 2, 4, 5)[box.slices])
    for box in some_boxes(whole.shape):
        assert torch.equal(shaped.shaped((3, 8, 5)).read(box), whole[box.slices])


def test_only_what_is_asked_for_is_read():
    read: list[tuple[int, Box]] = []

    def part(number: int) -> Unread:
        def take(box: Box) -> Tensor:
            read.append((number, box))
            return torch.full(box.sizes, number)

        return Unread((4, 6), torch.int64, take)

    merged = torch.cat([torch.stack([part(0), part(1)]), torch.stack([part(2), part(3)])], dim=1)  # type: ignore[arg-type,list-item]
    assert tuple(merged.shape) == (2, 8, 6)
    box = Box((1, 3, 2), (1, 2, 3))
    assert torch.equal(merged.read(box), torch.tensor([[[1] * 3, [3] * 3]]))  # type: ignore[attr-defined]
    assert read == [(1, Box((3, 2), (1, 3))), (3, Box((0, 2), (1, 3)))]


FUNCTIONS = [
    lambda x: x.transpose(0, 1),
    lambda x: torch.transpose(x, dim0=-1, dim1=0).contiguous(),
    lambda x: torch.chunk(x, 2, dim=1)[1],
    lambda x: x.split(2)[2],
    lambda x: torch.chunk(x, 6, dim=0)[3].squeeze(0),
    lambda x: torch.cat([x, x], -1),
    lambda x: x.reshape(3, 2, 4).transpose(1, 2).reshape(12, 2),  # computed of the whole
    lambda x: x.flip(0),
    lambda x: x[1:3],
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_tensors_that_are_not_read_yet(function):
    whole = torch.arange(24).view(6, 4)
    (tensor,) = unread({"x": whole}).values()
    found, wanted = function(tensor), function(whole)
    assert found.shape == wanted.shape
    for box in some_boxes(found.shape):
        assert torch.equal(found.read(box), wanted[box.slices])
