"""What is compiled in the place of a model that does not fit."""

from __future__ import annotations

import torch
from torch import nn

from nnscaler import Source


def test_a_shorter_sequence_has_its_part_of_everything():
    tokens = torch.arange(48).view(2, 24)
    source = Source(nn.Identity, {"input_ids": tokens, "labels": tokens + 1}, tokens=48, length=24)
    shorter = source.shortened(4)
    assert shorter is not None
    assert (shorter.tokens, shorter.length) == (12, 6)
    assert torch.equal(shorter.inputs["input_ids"], tokens[:, :6])
    assert torch.equal(shorter.inputs["labels"], tokens[:, :6] + 1)


def test_what_is_no_sequence_of_one_length_is_not_shortened():
    tokens = torch.zeros(2, 24)
    assert Source(nn.Identity, {"x": tokens}).shortened(5) is None
    assert Source(nn.Identity, {"x": tokens, "y": tokens[:, :12]}).shortened(4) is None
    assert Source(nn.Identity, {"x": tokens, "y": torch.zeros(2)}).shortened(4) is None


def test_micro_batches_of_other_sizes_are_of_sequences_like_the_first():
    tokens = torch.arange(48).view(2, 24)
    source = Source(
        nn.Identity, {"input_ids": tokens, "places": torch.arange(24.0).view(2, 3, 4)}, tokens=48, length=24
    )
    for count in (1, 5):
        other = source.with_sequences(count)
        assert (other.tokens, other.length) == (24 * count, 24)
        assert torch.equal(other.inputs["input_ids"], tokens[:1].repeat(count, 1))
        assert torch.equal(other.inputs["places"], torch.arange(12.0).view(1, 3, 4).repeat(count, 1, 1))
        assert all(tensor.is_contiguous() for tensor in other.inputs.values())


def test_what_a_plan_says_that_it_is_for():
    tokens = torch.zeros(3, 24, dtype=torch.int64)
    plain = Source(nn.Identity, {"x": torch.zeros(2, 5)})
    assert {**plain.about(), "versions": 0} == {"inputs": {"x": "f32[2, 5]"}, "precision": "bf16", "versions": 0}
    assert plain.work(None, None) is None, "nobody has said how many tokens there are"
    given = {"tokens": 72, "length": 24, "name": "Llama", "command": "train.py", "document_length": 7}
    for dtype, fp8, precision in (
        (torch.bfloat16, True, "fp8"), (torch.float32, False, "fp32"), (torch.float16, False, "float16"),
    ):  # fmt: skip
        about = Source(nn.Identity, {"input_ids": tokens}, dtype, fp8=fp8, **given).about()
        assert {**about, "versions": 0} == {
            "model": "Llama", "command": "train.py", "sequence_length": 24, "sequences_per_micro_batch": 3,
            "document_length": 7, "inputs": {"input_ids": "i64[3, 24]"}, "precision": precision, "versions": 0,
        }  # fmt: skip


def test_a_model_is_built_without_values_but_for_its_buffers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.numbers = nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False)
            self.register_buffer("table", torch.arange(3.0))

    for dtype in (torch.bfloat16, torch.float32):
        model, buffers = Source(Model, {}, dtype).build()
        assert [(parameter.dtype, parameter.is_meta) for parameter in model.parameters()] == [
            (torch.int64, True), (dtype, True), (dtype, True)
        ]  # fmt: skip
        assert {name: value.tolist() for name, value in buffers.items()} == {"table": [0, 1, 2]}
