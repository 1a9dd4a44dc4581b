"""What a refusal says that memory is needed for."""

import pytest
import torch

from nnscaler.plan import GIB, Key
from nnscaler.planner import find_plan
from nnscaler.planner.program import Program
from nnscaler.planner.refusal import WEIGHTS, DoesNotFit
from nnscaler.planner.solve import least_bytes
from nnscaler.source import Source
from nnscaler.trace import trace
from tests.planner.test_masters import INNER, OUTER, TWO, TwoProducts, machine, stated  # noqa: F401  a fixture

MEMORY = {
    Key("parameter", "layer", "weight", "parameters"): 2 * GIB,
    Key("parameter", "layer", "weight", "master weights"): 4 * GIB,
    Key("parameter", "layer", "weight", "moments"): 8 * GIB,
    Key("parameter", "layer", "weight", "gradients"): 4 * GIB,
    Key("saved", "layer", "output", "keeps all"): 3 * GIB,
}


def test_what_lies_on_the_host_is_not_counted():
    moved = {**MEMORY, Key("state", "", "on the host"): -9 * GIB, Key("gradients", "", "on the host"): -3.5 * GIB}
    said = str(DoesNotFit(moved, "layer.linear", GIB))
    assert "needs 8.5 GiB a device, constraint 1.0 GiB" in said
    assert (
        "kept for backward 3.0 GiB, weights 2.0 GiB, moments 2.0 GiB, master weights 1.0 GiB, gradients 0.5 GiB" in said
    )


def test_what_is_not_needed_is_not_said():
    everything = {**MEMORY, Key("state", "", "on the host"): -12 * GIB}
    assert "moments" not in str(DoesNotFit(everything, "layer.linear", GIB))


def test_every_kind_of_bytes_has_its_words_the_largest_first():
    memory = {
        Key("working"): 5 * GIB,
        Key("working", "layer", "backward"): 4 * GIB,
        Key("working", "", "workspaces"): 3.5 * GIB,
        Key("buffers"): 1 * GIB,
        Key("buffers", "", "gathered early"): 1.5 * GIB,
        Key("inside", "layer", "up", "keeps all"): 0.25 * GIB,
        Key("saved", "layer", "up", "keeps all"): 0.5 * GIB,
        Key("parameter", "layer", "w", "gradients"): 0.001 * GIB,
    }
    error = DoesNotFit(memory, "layer.up", 0.05 * GIB)
    assert error.needed == pytest.approx(15.751 * GIB)
    assert str(error) == (
        "no plan fits: needs 15.8 GiB a device, constraint 0.05 GiB: while layer.up runs 5.0 GiB, one layer computed "
        "again 4.0 GiB, workspaces of libraries 3.5 GiB, "
        "buffers of communication 2.5 GiB, kept for backward 0.8 GiB; the largest items are "
        "working memory of layer.up 5.0 GiB, working memory of layer.backward 4.0 GiB, "
        "working memory of .workspaces 3.5 GiB"
    ), "what is less than a thousandth is not said"
    items = {
        Key("saved", "layer", "up", "keeps all"): "activation layer.up",
        Key("inside", "layer", "up", "keeps all"): "activations inside layer.up",
        Key("parameter", "layer", "w", "moments"): "moments of layer.w",
        Key("buffers", "", "state"): "buffers of communication",
    }
    for key, words in items.items():
        assert str(DoesNotFit({key: GIB}, "", GIB)).endswith(f"; the largest items are {words} 1.0 GiB")


HALF = (INNER * INNER + INNER * OUTER) // 2  # of the weights, on each of two devices


@pytest.fixture(scope="module")
def long():
    inputs = {"x": torch.empty((2**17, INNER), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(TwoProducts, inputs).build()
    return trace(model, inputs, buffers)


def test_bytes_of_weights_alone(long, machine):  # noqa: F811
    """Masters and moments are 12 bytes a weight; with a bf16 copy and gradients, 18. The rest is over 64 MiB."""
    program = Program(stated(long, machine))
    assert 12 * HALF <= least_bytes(program, WEIGHTS) <= 18 * HALF
    assert least_bytes(program) > 2**26


@pytest.mark.parametrize(("each", "at_any_length"), [(11.9, True), (18.1, False)])
def test_whether_weights_alone_are_too_large(each, at_any_length, long, machine):  # noqa: F811
    with pytest.raises(DoesNotFit) as refused:
        find_plan(long, [TWO], machine, memory=each * HALF)
    assert refused.value.at_any_length == at_any_length
