"""What parameters of an adapted model are called: in the model, in Hugging Face's files, and in peft's."""

from __future__ import annotations

import pytest

from nnscaler.models.adapters import PREFIX, is_adapter, name_in_file, name_in_model

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
