"""What a refusal says that memory is needed for."""

from nnscaler.plan import GIB, Key
from nnscaler.planner.refusal import DoesNotFit

MEMORY = {
    Key("parameter", "layer", "weight", "parameters"): 2 * GIB,
    Key("parameter", "layer", "weight", "master weights"): 4 * GIB,
    Key("parameter", "layer", "weight", "moments"): 8 * GIB,
    Key("saved", "layer", "output", "keeps all"): 3 * GIB,
}


def test_state_that_lies_on_the_host_is_not_counted():
    moved = {**MEMORY, Key("state", "", "on the host"): -9 * GIB}
    said = str(DoesNotFit(moved, "layer.linear", GIB))
    assert "needs 8.0 GiB a device, constraint 1.0 GiB" in said
    assert "kept for backward 3.0 GiB, weights 2.0 GiB, moments 2.0 GiB, master weights 1.0 GiB" in said


def test_what_is_not_needed_is_not_said():
    everything = {**MEMORY, Key("state", "", "on the host"): -12 * GIB}
    assert "moments" not in str(DoesNotFit(everything, "layer.linear", GIB))
