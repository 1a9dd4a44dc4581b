"""A pretrained model goes in, is trained for a step, and comes out: with all its keys, files and fields.

At its own width: benchmarks/pretrained.py.
"""

from __future__ import annotations

from tests import tiny
from tests.models.published import QWEN3, check, train_and_export, write_published

NARROW = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def test_all_layers_of_a_published_model_go_in_and_come_out(tmp_path):
    write_published(tmp_path / "model", QWEN3 | NARROW)
    check(tmp_path, train_and_export(tmp_path, 2, tiny.VOCABULARY))
