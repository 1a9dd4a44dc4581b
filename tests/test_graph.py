"""Arguments of nodes as source."""

from __future__ import annotations

import pytest

from nnscaler.graph import Ref, format_argument, format_arguments


@pytest.mark.parametrize("value", [(), (1,), (1, 2), [], [1], ((1,), [(2,)]), {"a": (None,)}, "x", 0.5])
def test_an_argument_is_written_as_what_it_is(value):
    """A tuple of one has a comma."""
    found = eval(format_argument(value))
    assert (found, type(found)) == (value, type(value))


def test_tensors_are_written_by_name():
    assert format_arguments([Ref("x"), (Ref("y"),)], {"dim": [Ref("z")]}) == "x, (y,), dim=[z]"
