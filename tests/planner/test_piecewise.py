"""What is held while a piece runs, by hand: layers of `test_pieces` with what those there do not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnscaler.placement import REPLICATE
from nnscaler.plan import Key
from nnscaler.recompute import RECOMPUTES_ALL, RECOMPUTES_ALL_BUT_ATTENTION
from tests.planner.test_pieces import NARROW, ROWS, WIDE, Mixed, Plain, priced

N, W, WEIGHT = 2 * ROWS * NARROW, 2 * ROWS * WIDE, 2 * NARROW * WIDE  # bytes, in bf16


class Ended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(NARROW, NARROW, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.product(x))


def test_a_result_that_is_read_again_is_there_while_that_runs(tmp_path):
    """While tanh does: its result, and the gradients of that and of what it is given. Around it lie those of the
    layer's input and result, and of the weight, in fp32."""
    _, found = priced(Ended, RECOMPUTES_ALL_BUT_ATTENTION, 4, tmp_path)
    assert found is not None
    assert found.memory[Key("working")] == 3 * N / 4 + 2 * N + 2 * 2 * NARROW * NARROW


class Inside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(nn.functional.silu(h).exp() * h)


@pytest.mark.parametrize("count", [4, 16])
def test_of_what_a_cluster_keeps_inside_a_piece_has_a_part(count, tmp_path):
    """While the cluster runs: what its product reads and makes; its input, and what exp gives, which both are needed;
    the gradient of x from the sum, and that of the last weight."""
    _, found = priced(Inside, RECOMPUTES_ALL_BUT_ATTENTION, count, tmp_path)
    assert found is not None
    own = (3 * W + 2 * W + N) / count + WEIGHT
    assert found.memory[Key("working")] == own + 2 * N + 2 * 2 * WEIGHT, "with the gradients around it"


def test_all_that_a_cluster_keeps_inside_is_made_again_where_it_is_whole(tmp_path):
    stretch, found = priced(Inside, RECOMPUTES_ALL, 1, tmp_path)
    assert found is not None
    assert found.memory[Key("working", stretch.block, "backward")] == 3 * W, "h, what exp gives, and the result"


def test_what_is_gathered_for_a_piece_counts_as_it_is_used(tmp_path):
    """Two devices have a half of the rows each. What the operator mixes is gathered, and all of it computed twice."""
    _, found = priced(Mixed, RECOMPUTES_ALL, 4, tmp_path, 2, REPLICATE)
    assert found is not None
    half, columns = N / 2, W / 4  # of all rows
    # While the operator runs: tanh's result, its inputs, and the gradients of these and of its result.
    own = half + 2 * columns + 3 * columns
    # Around it lie the gradients of the result and of the weights, and two of the layer's input. The result itself is
    # free by then: at least the half that the product after it reads.
    assert found.memory[Key("working")] == own + W + 2 * half + 2 * WEIGHT - W / 2


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_whole_costs_nothing_for_pieces(devices, tmp_path):
    for level in (RECOMPUTES_ALL, RECOMPUTES_ALL_BUT_ATTENTION):
        stretch, found = priced(Mixed, level, 1, tmp_path, devices)
        assert found is not None
        assert Key("again", stretch.block, stretch.name, "in pieces") not in found.seconds
