"""How much of the host a plan may use, and what its copies cost a plan, in the words of its report."""

from __future__ import annotations

import pytest

from nnscaler.config import ComputeConfig
from nnscaler.hardware import load_hardware
from nnscaler.report.categories import COPIES
from nnscaler.report.limits import _memory


def test_a_plan_may_use_four_fifths_of_the_host_or_what_is_given():
    h100, cpu = load_hardware("h100"), load_hardware("cpu")
    assert h100.host is not None
    assert ComputeConfig().host_bytes(h100) == pytest.approx(0.8 * h100.host.memory)
    assert ComputeConfig(host_mem_constraint=3).host_bytes(h100) == 3 * 2**30
    assert ComputeConfig(host_mem_constraint=3, offload="off").host_bytes(h100) == 0
    assert ComputeConfig(host_mem_constraint=3).host_bytes(cpu) == 0


def test_copies_that_nothing_hides_are_the_price_of_memory():
    predicted = {"memory_bytes": 1.0, "memory_limit_bytes": 2.0, "seconds_by_category": {COPIES: 2.5}}
    seconds, text = _memory({"predicted": predicted, "costs": {}, "collectives": []})
    assert seconds == 2.5
    assert "2.50 s of copies to the host and back" in text
