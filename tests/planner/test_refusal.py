"""What a refusal says that memory is needed for."""

import pytest

from nnscaler.plan import GIB, Key
from nnscaler.planner.refusal import DoesNotFit

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
