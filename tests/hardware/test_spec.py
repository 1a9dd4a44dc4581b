"""Hardware: which of measured times, profile and roofline answers, and what identifies it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.hardware import detect_hardware, load_hardware, spec
from nnscaler.hardware.communication import NO_TIMES, CommunicationTimes, Group
from nnscaler.hardware.local import communication_path, write_text

MEASURED = CommunicationTimes({("all_gather", Group(2, 2)): ((1024, 0.5),)}, "a test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSCALER_CACHE", str(tmp_path))
    return tmp_path


def keep(device: str, times: CommunicationTimes = MEASURED) -> None:
    write_text(communication_path(device), times.dumps())


def test_measured_comes_before_profile_and_profile_before_roofline():
    hardware = load_hardware("h200")
    measured = replace(hardware, measured=MEASURED)
    assert measured.collective_seconds("all_gather", 1024, 2, False) == (0.5, "measured")
    # Only inside a node, and only all_gather, was measured.
    assert measured.collective_seconds("all_gather", 1024, 2, True).origin == "profile"
    assert measured.collective_seconds("all_reduce", 1024, 2, False).origin == "profile"
    bare = replace(hardware, profile=NO_TIMES)
    seconds, origin = bare.collective_seconds("all_gather", 2**30, 4, False)
    assert (seconds, origin) == (
        pytest.approx(bare.intra.latency + 3 / 4 * 2**30 / bare.intra.bandwidth),
        "roofline",
    )
    assert hardware.collective_seconds("all_gather", 2**30, 1, False).seconds == 0


def test_over_nodes_it_matters_how_many_devices_are_on_each():
    hardware = load_hardware("h100")
    apart = hardware.collective_seconds("all_gather", 2**30, 16, True)
    together = hardware.collective_seconds("all_gather", 2**30, 16, True, per_node=8)
    assert 3 * together.seconds < apart.seconds


def test_what_was_measured_here_joins_hardware_of_that_name():
    assert load_hardware("h100").measured == NO_TIMES
    keep("NVIDIA H100 80GB HBM3")
    assert load_hardware("H100").measured == MEASURED
    assert load_hardware("h200").measured == NO_TIMES


def test_what_was_measured_here_joins_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keep("NVIDIA H100 80GB HBM3")
    assert detect_hardware().measured == NO_TIMES
    keep("cpu")
    assert detect_hardware().measured == MEASURED


def test_a_file_of_hardware_is_taken_as_it_is(tmp_path):
    keep("cpu")
    path = tmp_path / "mine.json"
    fields = json.loads((spec._SPECS / "cpu.json").read_text())
    del fields["profile"]
    path.write_text(json.dumps(fields))
    hardware = load_hardware(str(path))
    assert hardware.collective_seconds("all_gather", 1024, 2, False).origin == "roofline"


def test_a_bad_profile_in_a_file_of_hardware_is_an_error(tmp_path):
    path = tmp_path / "mine.json"
    fields = json.loads((spec._SPECS / "cpu.json").read_text())
    path.write_text(json.dumps({**fields, "profile": {"tables": [{}]}}))
    with pytest.raises(UserError, match=r"mine\.json"):
        load_hardware(str(path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tables": 3}', '{"source": "x", "tables": [{}]}', "\x00"])
def test_a_bad_file_of_measurements_is_ignored_and_named(content, caplog):
    path = communication_path("cpu")
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load_hardware("cpu").measured == NO_TIMES
    assert str(path) in caplog.text


def test_the_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NNSCALER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="NNSCALER_CACHE"):
        keep("cpu")


def test_writing_leaves_nothing_else_behind():
    keep("cpu")
    keep("cpu")
    assert [path.name for path in communication_path("cpu").parent.iterdir()] == ["cpu.json"]


def test_identity_changes_with_whatever_costs_depend_on():
    hardware = load_hardware("h200")
    other = CommunicationTimes({("all_gather", Group(2, 2)): ((1024, 0.6),)}, "a test")
    variants = [
        hardware,
        replace(hardware, memory=1.0),
        replace(hardware, measured=MEASURED),
        replace(hardware, measured=other),
        replace(hardware, profile=NO_TIMES),
    ]
    assert len({variant.identity() for variant in variants}) == len(variants)
    assert hardware.identity() == load_hardware("H200").identity()
    assert hardware.identity().startswith("H200 ")
