"""Adapters as they begin; and what parameters of an adapted model are called: in the model, in Hugging Face's files,
and in peft's."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from nnscaler.errors import UserError
from nnscaler.models.adapters import PREFIX, adapted, adapted_parts, is_adapter, name_in_file, name_in_model
from tests import tiny

LAYER = "model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("name", "prefix", "wanted"),
    [
        (f"model.{PREFIX}{LAYER}.base_layer.weight", f"model.{PREFIX}", f"{LAYER}.weight"),
        (f"model.{PREFIX}lm_head.weight", f"model.{PREFIX}", "lm_head.weight"),
        (f"model.{LAYER}.weight", "model.", f"{LAYER}.weight"),
        # Without adapters, a layer may have this name itself.
        ("model.net.base_layer.weight", "model.", "net.base_layer.weight"),
        ("net.weight", "model.", "net.weight"),
        ("net.model.weight", "model.", "net.model.weight"),
    ],
)
def test_names_without_adapters_and_what_stands_before_them(name, prefix, wanted):
    assert name_in_model(name, prefix) == wanted


def test_adapters_are_known_by_their_names_and_have_no_name_of_their_own_in_files():
    factors = [f"{LAYER}.lora_{factor}.default.weight" for factor in "AB"]
    others = (f"{LAYER}.base_layer.weight", "lora_A.weight", "x.lora_Alpha.y")
    assert [is_adapter(name) for name in (*factors, *others)] == [True, True, False, False, False]
    assert [name_in_file(name) for name in factors] == [f"{LAYER}.lora_{factor}.weight" for factor in "AB"]


def of_a_tiny_model(**settings) -> tuple[LoraConfig, nn.Module]:
    """As they are asked for, and the model, of bf16."""
    config = LoraConfig(base_model_name_or_path="org/large", r=4, **settings)
    return config, adapted(AutoModelForCausalLM.from_config(tiny.config(), dtype=torch.bfloat16), config)


def test_the_first_factor_begins_random_and_the_second_with_zeros_whatever_peft_would_do():
    """They are of the model's own type, are alone trained, and are drawn anew by themselves, not by the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the model had another name, say
        config, model = of_a_tiny_model(target_modules="all-linear", init_lora_weights=False)
    of_a_layer = [f"mlp.{name}_proj" for name in ("down", "gate", "up")] + [f"self_attn.{name}_proj" for name in "koqv"]
    assert config.target_modules == [f"model.layers.{layer}.{name}" for layer in range(2) for name in of_a_layer]
    assert config.base_model_name_or_path == "org/large"
    parts = dict(model.named_modules())
    factors = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    assert len(factors) == 2 * 2 * 7
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in factors), name
    for name, factor in factors.items():
        part = parts[name.removesuffix(".weight")]
        with torch.no_grad():
            factor.fill_(9)
        part._init_weights(nn.Linear(2, 2))
        assert (factor == 9).all(), "of another module than itself"
        part._init_weights(part)
        most = 0.0 if ".lora_B." in name else factor.shape[1] ** -0.5
        assert 0.8 * most <= factor.abs().max() <= 1.01 * most, name
    assert adapted_parts(model) == {part for name, part in parts.items() if name.endswith(".base_layer")}


def test_first_values_are_there_at_once():
    _, model = of_a_tiny_model(target_modules=["q_proj"], init_lora_weights=False)
    assert [bool(parameter.any()) for name, parameter in model.named_parameters() if is_adapter(name)] == [
        True, False,
    ] * 2  # fmt: skip


@pytest.mark.parametrize(("asked", "said"), [(["x_proj", "a"], "a x_proj"), ("x.*", r"x\.\*")])
def test_what_a_model_has_not_is_refused_with_what_it_has(asked, said):
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    with pytest.raises(UserError, match=rf"^lora_target_modules is {said}, which does not suit Llama.* are {names}$"):
        of_a_tiny_model(target_modules=asked)
