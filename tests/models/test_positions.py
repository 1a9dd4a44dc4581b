"""For how long a sequence a model has positions, and what its configuration says after training on longer ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PretrainedConfig

from nnscaler.errors import UserError
from nnscaler.models.positions import check_positions, set_trained_length

PLAIN = {"rope_type": "default", "rope_theta": 5e5}
SCALED = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}


def config(**fields: Any) -> Any:
    made = PretrainedConfig()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("rope", "length", "suggested"),
    [
        (PLAIN, 128, None),
        (PLAIN, 129, {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 128}),
        (PLAIN, 256, {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 128}),
        (SCALED, 300, {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}),
        # Where kinds of layers have their own, the first kind's.
        ({"full_attention": PLAIN, "sliding_attention": SCALED}, 1000,
         {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 128}),
    ],
)  # fmt: skip
def test_longer_sequences_are_warned_of_with_a_scaling_that_reaches_so_far(rope, length, suggested, caplog):
    before = json.dumps(rope)
    check_positions(config(rope_parameters=rope, max_position_embeddings=128), length)
    assert json.dumps(rope) == before, "the configuration stays as it is"
    said = [message.partition("--set rope_parameters=")[2].strip("'") for message in caplog.messages]
    assert [json.loads(text) for text in said] == ([] if suggested is None else [suggested])
    if suggested is not None:
        assert caplog.messages[0].startswith(f"sequences have {length} tokens, and the model's positions were made for")


def test_a_table_of_positions_has_no_more_rows():
    names = ("max_position_embeddings", "max_seq_len")
    for known in ((128, None), (None, 128), (-1, 128), (128, 999)):
        fields = dict(zip(names, known))
        check_positions(config(rope_parameters=None, **fields), 128)
        with pytest.raises(UserError, match=r"^the model knows 128 positions, and sequences have 129 tokens$"):
            check_positions(config(rope_parameters=None, **fields), 129)
    check_positions(config(max_position_embeddings=-1), 10**6)
    check_positions(config(), 10**6)


@pytest.mark.parametrize(
    ("rope", "before", "after"),
    [
        (PLAIN, 128, 500), (PLAIN, 1000, 1000), (SCALED, 128, 500), ({"rope_theta": 1e4}, 128, 500),
        ({**PLAIN, "rope_type": "dynamic"}, 128, 128), ({**PLAIN, "rope_type": "longrope"}, 128, 128),
        ({"full_attention": PLAIN}, 128, 500), (None, 128, 128), (PLAIN, -1, -1),
    ],
)  # fmt: skip
def test_the_length_of_training_is_noted_where_nothing_follows_from_it(rope, before, after):
    made = config(rope_parameters=rope, max_position_embeddings=before)
    set_trained_length(made, 500)
    assert made.max_position_embeddings == after
