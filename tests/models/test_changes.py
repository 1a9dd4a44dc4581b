"""Values of a configuration as a user types them."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, MambaConfig

from nnscaler.errors import UserError
from nnscaler.models.causal_lm import build
from nnscaler.models.changes import _value, changed_config
from tests import tiny


@pytest.mark.parametrize(
    ("text", "current", "value"),
    [
        ("5", 3, 5), ("5", 3.0, 5.0), ("5.5", None, 5.5), ("5", "3", "5"), ("gelu", None, "gelu"),
        ("true", False, True),
        ("True", False, True), ("False", True, False), ("None", 3, None), ("null", 3, None), ("None", None, None),
        ("-0.25", -0.5, -0.25), ("0", -0.5, 0.0), ("-3", 5, -3), ("[1, 2]", [3], [1, 2]), ('{"a": 1}', {}, {"a": 1}),
        ("0", 0.5, 0.0),
    ],
)  # fmt: skip
def test_a_value_has_the_type_of_the_one_before(text, current, value):
    found = _value("field", text, current)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "current", "said"),
    [
        ("5.5", 3, "field takes a value of type int, such as 3, not '5.5'"),
        ("true", 3, "field takes a value of type int, such as 3, not 'true'"),
        ("1", True, "field takes a value of type bool, such as True, not '1'"),
        ("x", 0.5, "field takes a value of type float, such as 0.5, not 'x'"),
        ("-0.5", 0.0, "field is -0.5; it must be a finite number, at least 0"),
        ("-0.5", None, "field is -0.5; it must be a finite number, at least 0"),
        ("Infinity", 0.5, "field is inf; it must be a finite number, at least 0"),
        ("NaN", -0.5, "field is nan; it must be a finite number, at least 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(text, current, said):
    with pytest.raises(UserError) as refused:
        _value("field", text, current)
    assert str(refused.value) == said


def test_rope_turns_pairs_of_dimensions():
    config = tiny.config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"^heads have 3 dimensions; RoPE turns pairs of them, of which it must have"):
        changed_config(config, {"head_dim": "3"})
    assert changed_config(config, {"head_dim": "6"}).head_dim == 6
    part = '{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": %s}'
    with pytest.raises(UserError, match=r"^heads have 16 dimensions, times partial_rotary_factor 0.35; RoPE turns"):
        changed_config(config, {"rope_parameters": part % 0.35})
    changed_config(config, {"rope_parameters": part % 0.25})
    changed = changed_config(GPT2Config(n_embd=12, n_head=4), {"n_embd": "36"})
    assert changed.n_embd == 36, "positions are rows of a table"


def test_a_kind_of_rope_that_is_not_known_or_lacks_something():
    alien = changed_config(tiny.config(), {"rope_parameters": '{"rope_type": "alien", "rope_theta": 1e4}'})
    with pytest.raises(UserError, match=r"^rope_type of rope_parameters is 'alien'; allowed are default, linear, "):
        build(alien)
    with pytest.raises(UserError, match=r"^not a llama configuration: Missing required keys .*'linear': {'factor'}$"):
        changed_config(tiny.config(), {"rope_parameters": '{"rope_type": "linear", "rope_theta": 1e4}'})


@pytest.mark.parametrize("layers", [1048576, 0, -1])
def test_a_model_of_a_million_layers_or_of_none_is_refused_before_it_is_built(layers):
    config = tiny.config()
    config.num_hidden_layers = layers
    with pytest.raises(UserError, match=rf"^num_hidden_layers is {layers}; it must be from 1 to 4,096$"):
        build(config)


def test_what_is_not_changed_stays():
    """Also lists that have an entry for something else than layers; and the configuration itself is a copy."""
    config = tiny.config(num_hidden_layers=4, bos_token_id=1, eos_token_id=[1, 2, 3])
    config.architectures = ["LlamaForCausalLM"]
    changed = changed_config(config, {"num_hidden_layers": "2", "bos_token_id": "None", "rope_theta": "5000"})
    assert (changed.num_hidden_layers, changed.eos_token_id, changed.bos_token_id) == (2, [1, 2, 3], None)
    assert changed.architectures == ["LlamaForCausalLM"]
    assert changed.rope_parameters["rope_theta"] == 5000.0
    assert (config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (4, 10000.0)
    differ = [name for name, value in changed.to_dict().items() if value != config.to_dict()[name]]
    assert sorted(differ) == ["bos_token_id", "num_hidden_layers", "rope_parameters"]


def test_models_without_heads_or_positions_that_turn():
    """Of heads nothing follows where there are none."""
    changed = changed_config(MambaConfig(hidden_size=64, num_hidden_layers=2), {"hidden_size": "36"})
    assert (changed.hidden_size, changed.num_hidden_layers) == (36, 2)
    with pytest.raises(UserError, match=r"^a gpt2 configuration has no field 'n_heads'; did you mean n_head"):
        changed_config(GPT2Config(), {"n_heads": "2"})
    with pytest.raises(UserError, match=r"^a gpt2 configuration has no field 'rope_theta'; "):
        changed_config(GPT2Config(), {"rope_theta": "2"})
