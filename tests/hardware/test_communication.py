"""Communication tables: interpolation, groups that were not measured, and files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnscaler.hardware import hardware_names, load_hardware
from nnscaler.hardware.communication import (
    COLLECTIVES,
    CommunicationTimes,
    CopyRates,
    Group,
    Link,
    Network,
    interpolate,
    without_noise,
)

CURVE = ((1024, 1e-5), (4096, 1e-5), (2**20, 3e-5), (2**30, 4e-3))
NETWORK = Network(intra=Link(100e9, 1e-5), inter=Link(10e9, 3e-5))
PAIR, QUAD, APART = Group(2, 2), Group(4, 4), Group(2, 1)
TIMES = CommunicationTimes({("all_gather", PAIR): CURVE}, "a test")

noisy = st.dictionaries(st.integers(1, 2**32), st.floats(1e-6, 10), min_size=1, max_size=12)


@given(noisy)
def test_a_curve_is_exact_where_it_was_measured_and_never_falls(points):
    curve = without_noise(points.items())
    assert [interpolate(curve, size) for size, _ in curve] == [seconds for _, seconds in curve]
    assert all(seconds <= points[size] for size, seconds in curve)
    between = sorted({*points, *(size // 2 for size in points), *(3 * size // 2 for size in points), 0, 2**34})
    seconds = [interpolate(curve, size) for size in between]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(seconds))


def test_a_disturbed_measurement_is_cut_to_that_of_the_next_larger_message():
    assert without_noise([(1, 1.0), (2, 9.0), (4, 2.0), (8, 3.0)]) == ((1, 1.0), (2, 2.0), (4, 2.0), (8, 3.0))


def test_between_points_it_is_linear_and_outside_latency_and_bandwidth():
    assert interpolate(CURVE, (4096 + 2**20) / 2) == pytest.approx(2e-5)
    assert interpolate(CURVE, 1) == interpolate(CURVE, 0) == 1e-5
    assert interpolate(CURVE, 2**33) == pytest.approx(8 * 4e-3)


def test_a_measured_group_is_taken_as_it_is():
    assert TIMES.seconds("all_gather", 2**20, PAIR, NETWORK) == pytest.approx(3e-5)


def test_a_group_that_was_not_measured_is_scaled_from_the_nearest():
    # Latency goes with the depth of a tree, 2 to 1; the rest with what a ring passes on, 3/4 to 1/2 of the tensor.
    assert TIMES.seconds("all_gather", 2**20, QUAD, NETWORK) == pytest.approx(1e-5 * 2 + 2e-5 * 1.5)
    slow = tuple((size, 100 * seconds) for size, seconds in CURVE)
    both = CommunicationTimes({("all_gather", PAIR): slow, ("all_gather", Group(8, 8)): CURVE}, "a test")
    assert both.seconds("all_gather", 2**30, Group(16, 16), NETWORK) < 1.1 * interpolate(CURVE, 2**30)


def test_over_nodes_a_group_with_as_many_devices_on_each_is_the_nearest():
    curves = {("all_gather", APART): CURVE, ("all_gather", Group(16, 8)): tuple((b, s / 4) for b, s in CURVE)}
    times = CommunicationTimes(curves, "a test")
    assert times.seconds("all_gather", 1, Group(16, 1), NETWORK) == pytest.approx(4 * 1e-5)
    assert times.seconds("all_gather", 1, Group(32, 8), NETWORK) == pytest.approx(1e-5 / 4 * 5 / 4)


@pytest.mark.parametrize(("collective", "group"), [("all_reduce", PAIR), ("all_gather", APART)])
def test_nothing_is_said_of_what_no_table_is_like(collective, group):
    assert TIMES.seconds(collective, 1024, group, NETWORK) is None


def test_the_network_counts_what_goes_through_each_link():
    inside, outside = 1 / NETWORK.intra.bandwidth, 1 / NETWORK.inter.bandwidth
    assert NETWORK.seconds_per_byte("all_gather", QUAD) == pytest.approx(3 / 4 * inside)
    assert NETWORK.seconds_per_byte("all_reduce", QUAD) == pytest.approx(6 / 4 * inside)
    assert NETWORK.seconds_per_byte("all_to_all", QUAD) == pytest.approx(3 / 4 * inside)
    assert NETWORK.seconds_per_byte("reduce_scatter", APART) == pytest.approx(1 / 2 * outside)
    # 8 rings cross the border of a node with 8 devices; an all-to-all has no such luck.
    assert NETWORK.seconds_per_byte("all_gather", Group(16, 8)) == pytest.approx(15 / 16 / 8 * outside)
    assert NETWORK.seconds_per_byte("all_to_all", Group(16, 8)) == pytest.approx(8 / 16 * outside)


def test_the_latency_is_that_of_the_slowest_link_on_the_way():
    for group, link in ((QUAD, NETWORK.intra), (APART, NETWORK.inter), (Group(16, 8), NETWORK.inter)):
        assert NETWORK.latency(group) == link.latency


def test_tables_survive_writing_and_reading():
    for times in (TIMES, replace(TIMES, copies=CopyRates(3e10, 2e10, 1e10))):
        assert CommunicationTimes.from_json(json.loads(times.dumps())) == times


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rates_of_copies_are_refused(rate):
    copies = {"to_host": 1e10, "to_device": rate, "both_ways": 1e10}
    with pytest.raises(ValueError, match=r"to_device of copies is .*; it must be more than 0"):
        CommunicationTimes.from_json({"source": "a test", "copies": copies, "tables": []})


@pytest.mark.parametrize(
    "change",
    [
        {"collective": "broadcast"},
        {"group_size": 1},
        {"per_node": 0},
        {"group_size": 4, "per_node": 3},
        {"bytes_seconds": []},
        {"bytes_seconds": [[1, 0.0]]},
        {"bytes_seconds": [[1, float("nan")]]},
        {"bytes_seconds": [[2, 1.0], [1, 2.0]]},
        {"bytes_seconds": [[1, 2.0], [2, 1.0]]},
        {"bytes_seconds": [[1, 1.0], [2, 3.0], [3, 2.0]]},
        {"bytes_seconds": [[1, 1.0], [1, 2.0]]},
        {"bytes_seconds": [[0, 1.0], [1, 2.0]]},
        {"bytes_seconds": [[1, 1.0], [2, float("inf")]]},
    ],
)
def test_a_bad_table_is_refused(change):
    table = {"collective": "all_gather", "group_size": 2, "per_node": 2, "bytes_seconds": [[1, 1.0]], **change}
    with pytest.raises(ValueError):
        CommunicationTimes.from_json({"source": "a test", "tables": [table]})


@pytest.mark.parametrize("name", hardware_names())
def test_every_bundled_device_has_a_profile(name):
    profile = load_hardware(name).profile
    assert profile.source
    for collective in COLLECTIVES:
        groups = [group for known, group in profile.curves if known == collective]
        assert {group.spans_nodes for group in groups} == {False, True}


@pytest.mark.parametrize(
    ("collective", "rate"), [("all_reduce", 235), ("all_gather", 433), ("reduce_scatter", 426), ("all_to_all", 447)]
)
def test_the_bundled_h200_is_what_was_measured_on_four(collective, rate):
    estimate = load_hardware("h200").collective_seconds(collective, 2**30, 4, spans_nodes=False)
    assert 2**30 / estimate.seconds / 1e9 == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in hardware_names() if name != "cpu"])
def test_every_bundled_gpu_has_a_host_and_says_where_its_figures_are_from(name):
    """Copies both ways at once are slower than one way, and none faster than the slots: 16 lanes of PCIe 4 or 5."""
    hardware = load_hardware(name)
    slot = 31.5e9 if name in ("a100", "mi250") else 63e9
    assert hardware.host.memory in (2**40 / 8, 2**41 / 8), "a node's 1 or 2 TiB, for each of eight devices"
    assert hardware.host.both_ways < min(hardware.host.to_host, hardware.host.to_device)
    assert 0.7 * slot < min(hardware.host.to_host, hardware.host.to_device)
    assert max(hardware.host.to_host, hardware.host.to_device) < slot
    assert "Host: " in hardware.source


def test_the_bundled_h100_copies_as_was_measured():
    host = load_hardware("h100").host
    assert (host.to_host, host.to_device, host.both_ways) == (55e9, 52e9, 44e9)
