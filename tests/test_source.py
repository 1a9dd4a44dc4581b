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
