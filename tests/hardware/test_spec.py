"""Hardware: which of measured times, profile and roofline answers, and what identifies it."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.hardware import detect_hardware, find_hardware, load_hardware, spec
from nnscaler.hardware.communication import NO_TIMES, CommunicationTimes, CopyRates, Group
from nnscaler.hardware.local import communication_path, is_kind, measured_on_kind, operators_path, write_text
from nnscaler.kernels import products

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


def test_of_several_devices_of_a_kind_the_last_one_measured_counts(cache):
    other = CommunicationTimes({("all_gather", Group(2, 2)): ((1024, 0.6),)}, "a test")
    for index, (device, times) in enumerate((("NVIDIA H100 PCIe", MEASURED), ("NVIDIA H100 NVL", other))):
        keep(device, times)
        os.utime(communication_path(device), (index, index))
    assert measured_on_kind("h100") == other
    os.utime(communication_path("NVIDIA H100 PCIe"), (5, 5))
    assert measured_on_kind("h100") == MEASURED
    assert communication_path("NVIDIA H100 (PCIe)") == cache / "communication" / "nvidia-h100-pcie.json"
    assert operators_path("NVIDIA H100 (PCIe)") == cache / "operators" / "nvidia-h100-pcie.json"
    found = [is_kind(*each) for each in (("h100", "NVIDIA H100"), ("H200", "nvidia-gh200"), ("a100", "RTX A1000"))]
    assert found == [True, False, False]


def test_measured_copies_come_before_bundled_ones():
    bundled = load_hardware("h100").host
    keep("NVIDIA H100 80GB HBM3", replace(MEASURED, copies=CopyRates(3e10, 2e10, 1e10)))
    assert load_hardware("h100").host == replace(bundled, to_host=3e10, to_device=2e10, both_ways=1e10)
    assert load_hardware("h200").host.to_host != 3e10


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


def test_writing_leaves_nothing_else_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSCALER_CACHE", str(tmp_path / "not" / "there" / "yet"))
    keep("cpu")
    keep("cpu")
    folder = communication_path("cpu").parent
    assert [path.name for path in folder.iterdir()] == ["cpu.json"]
    moved = []

    def replace_file(source, target):
        moved.append(Path(source).parent)
        raise OSError(errno.EACCES, "no right to")

    monkeypatch.setattr(os, "replace", replace_file)
    with pytest.raises(UserError, match=r"cannot write .*cpu\.json: no right to; NNSCALER_CACHE names"):
        keep("cpu")
    assert moved == [folder], "a file is moved within a file system"
    assert [path.name for path in folder.iterdir()] == ["cpu.json"]


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


def gpus(monkeypatch, name: str, count: int = 8, capability: tuple[int, int] = (10, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=180 * 2**30))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("AMD Instinct MI300X", "MI300X")],
)
def test_a_bundled_device_is_known_by_its_name(monkeypatch, name, kind):
    gpus(monkeypatch, name)
    hardware = detect_hardware()
    assert (hardware.name, hardware.remark) == (kind, "")
    assert hardware.memory == 180 * 2**30
    assert hardware.peak(torch.bfloat16) == hardware.flops["bfloat16"]


def test_the_host_s_memory_is_that_of_this_machine_in_equal_parts(monkeypatch):
    monkeypatch.setattr(spec, "host_memory", lambda: 800 * 2**30)
    gpus(monkeypatch, "NVIDIA H100 80GB HBM3", count=4)
    keep("NVIDIA H100 80GB HBM3", replace(MEASURED, copies=CopyRates(3e10, 2e10, 1e10)))
    found, bundled = detect_hardware(), load_hardware("h100")
    assert found.host == replace(bundled.host, memory=200 * 2**30, to_host=3e10, to_device=2e10, both_ways=1e10)
    assert (found.measured, found.devices_per_node) == (replace(MEASURED, copies=CopyRates(3e10, 2e10, 1e10)), 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_hardware().memory == 800 * 2**30


def test_a_container_may_have_less_than_the_machine(monkeypatch):
    monkeypatch.setattr(spec.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    limits: dict[str, str] = {}

    def read_text(path):
        if path.name not in limits:
            raise FileNotFoundError(path)
        return limits[path.name]

    monkeypatch.setattr(spec.Path, "read_text", read_text)
    assert spec.host_memory() == 4096 * 1000
    for name in ("memory.max", "memory.limit_in_bytes"):
        limits.clear()
        for limit, left in (("max", 4096 * 1000), ("1234567\n", 1234567), ("9999999999999", 4096 * 1000)):
            limits[name] = limit
            assert spec.host_memory() == left


def test_products_that_a_cpu_computes_in_fp32_take_a_quarter_longer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "are_slow", lambda device, dtype: dtype == torch.bfloat16)
    found, bundled = detect_hardware(), load_hardware("cpu")
    assert found.flops == {**bundled.flops, "bfloat16": 0.8 * bundled.flops["float32"]}


@pytest.mark.parametrize(
    ("name", "capability", "rates"),
    [
        ("NVIDIA B200", (10, 0), "H200"),
        ("NVIDIA GH200 480GB", (9, 0), "H200"),
        ("NVIDIA RTX A1000", (8, 6), "A100"),
        ("Tesla V100", (7, 0), "A100"),
    ],
)
def test_a_device_that_is_not_bundled_says_whose_rates_it_takes(monkeypatch, name, capability, rates):
    gpus(monkeypatch, name, capability=capability)
    hardware = detect_hardware()
    assert hardware.remark.startswith(f"no figures of {name} are bundled: planning with the rates of {rates} ")
    assert hardware.name == f"{name} with the rates of {rates}"
    assert hardware.memory == 180 * 2**30
    assert hardware.flops == load_hardware(rates).flops
    assert hardware.peak(torch.bfloat16) is None, "no share of a peak that is another device's"


@pytest.mark.parametrize(
    ("name", "rates"),
    [("NVIDIA H100 PCIe", "H100"), ("NVIDIA A100-PCIE-40GB", "A100"), ("NVIDIA H200 NVL", "H200"),
     ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "A100")],
)  # fmt: skip
def test_another_board_than_the_bundled_one_is_said(monkeypatch, name, rates):
    gpus(monkeypatch, name)
    hardware = detect_hardware()
    assert hardware.name == rates
    assert hardware.remark.startswith(f"the bundled figures of {rates} are those of its SXM board, and {name} may be ")


def test_planning_for_a_cpu_for_want_of_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "planning for this computer's CPU" in detect_hardware().remark
    assert load_hardware("cpu").remark == ""


def test_processes_share_the_memory_of_a_cpu(monkeypatch):
    """Twelve are on two nodes: eight share one, as the bundled file has it, or three. A device that is named has what
    its file says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(spec, "host_memory", lambda: 24 * 2**30)
    alone = ComputeConfig().find_hardware()
    assert (alone.memory, "share" in alone.remark) == (24 * 2**30, False)
    for config, each in (
        (ComputeConfig(1, 2), 12), (ComputeConfig(2, 2), 12), (ComputeConfig(2, 12), 3),
        (ComputeConfig(3, 12, devices_per_node=3), 8), (ComputeConfig(1, 2, hardware="cpu"), 16),
    ):  # fmt: skip
        hardware = config.find_hardware()
        assert hardware.memory == each * 2**30
        assert (f"share its memory, and each plans with {each} GiB" in hardware.remark) == (config.hardware is None)
    gpus(monkeypatch, "NVIDIA H100 80GB HBM3", count=4)
    assert ComputeConfig(4, 4).find_hardware().memory == detect_hardware().memory


def test_memory_of_a_host_that_is_not_there_is_not_limited():
    with pytest.raises(
        UserError, match="host_mem_constraint is 12, but CPU has no host with memory beside the devices"
    ):
        ComputeConfig(hardware="cpu", host_mem_constraint=12.0).find_hardware()
    assert ComputeConfig(hardware="cpu", host_mem_constraint=0.0).find_hardware().host is None
    assert ComputeConfig(hardware="h100", host_mem_constraint=12.0).find_hardware().host is not None


def test_more_of_the_host_than_there_is_is_said(monkeypatch):
    """Of 240 GiB, four devices may have 60 each; a device that is named is not of this computer."""
    gpus(monkeypatch, "NVIDIA H100 80GB HBM3", count=4)
    monkeypatch.setattr(spec, "host_memory", lambda: 240 * 2**30)
    said = "host_mem_constraint is 61, which is 244 GiB for the devices of a node, and this computer has 240"
    for given, devices, hardware, wrong in (
        (60.0, 4, None, False), (61.0, 4, None, True), (61.0, 8, None, True), (61.0, 2, None, False),
        (61.0, 4, "h100", False), (None, 4, None, False),
    ):  # fmt: skip
        found = ComputeConfig(devices, devices, hardware=hardware, host_mem_constraint=given).find_hardware()
        assert (said in found.remark) == wrong
        assert found.host.memory == (60 if hardware is None else 256) * 2**30


def test_a_device_that_copies_alone_has_its_own_rate_both_ways():
    """In a run of one device for each node, too; but what was measured here comes before all that is bundled."""
    both, alone = (load_hardware("h200").host.__dict__[name] for name in ("both_ways", "both_ways_alone"))
    assert both < alone
    for config, rate in (
        (ComputeConfig(1, 1, hardware="h200"), alone), (ComputeConfig(1, 2, hardware="h200"), both),
        (ComputeConfig(1, 2, hardware="h200", devices_per_node=1), alone), (ComputeConfig(2, 2, hardware="h200"), both),
    ):  # fmt: skip
        assert config.find_hardware().host.both_ways == rate
    assert ComputeConfig(1, 1, hardware="h100").find_hardware().host.both_ways == load_hardware("h100").host.both_ways
    keep("NVIDIA H200", replace(MEASURED, copies=CopyRates(3e10, 2e10, 1e10)))
    assert ComputeConfig(1, 1, hardware="h200").find_hardware().host.both_ways == 1e10


def test_nodes_are_as_they_are(monkeypatch):
    assert find_hardware("h100").devices_per_node == 8
    assert find_hardware("h100", devices_per_node=2).devices_per_node == 2
    gpus(monkeypatch, "NVIDIA H100 80GB HBM3", count=4)
    assert find_hardware(None).devices_per_node == 4
    alone = ComputeConfig(8, 8).find_hardware()
    assert "nodes of 4 devices" in alone.remark
    assert "nodes of 4 devices" in ComputeConfig(2, 8).find_hardware().remark, "copies of the model on several"
    assert ComputeConfig(4, 4).find_hardware().remark == ""
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}.items():  # four nodes of two
        monkeypatch.setenv(name, value)
    assert find_hardware(None).devices_per_node == 2
    assert find_hardware("h100").devices_per_node == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # one node, of which a run may take some
    assert ComputeConfig(8, 8).find_hardware().devices_per_node == 4
    assert ComputeConfig(8, 8).find_hardware().identity() == alone.identity()


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": -1}, {"memory": float("nan")}, {"memory": "much"}, {"flops": {}}, {"flops": {"float32": 0}},
        {"efficiency": {"default": -0.5}}, {"launch": -1}, {"devices_per_node": 0}, {"devices_per_node": 1.5},
        {"intra": {"bandwidth": 0, "latency": 0}}, {"inter": {"bandwidth": 1}}, {"no_such_field": 1},
    ],
)  # fmt: skip
def test_a_file_with_figures_that_no_machine_has_is_an_error(tmp_path, wrong):
    fields = json.loads((spec._SPECS / "cpu.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**fields, **wrong}))
    with pytest.raises(UserError, match="does not describe a machine"):
        load_hardware(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("at", "label", "zero"),
    [
        ("memory", "memory", False), ("memory_bandwidth", "memory_bandwidth", False),
        ("flops bfloat16", "flops of bfloat16", False), ("flops float32", "flops of float32", False),
        ("efficiency default", "efficiency by default", False),
        ("efficiency aten.mm.default", "efficiency of aten.mm.default", False),
        ("intra bandwidth", "bandwidth of intra", False), ("inter bandwidth", "bandwidth of inter", False),
        ("devices_per_node", "devices_per_node", False), ("host memory", "memory of host", False),
        ("host to_host", "to_host of host", False), ("host to_device", "to_device of host", False),
        ("host both_ways", "both_ways of host", False),
        ("host both_ways_alone", "both_ways_alone of host", False),
        ("launch", "launch", True), ("workspaces", "workspaces", True),
        ("interference", "interference", True), ("intra latency", "latency of intra", True),
        ("inter latency", "latency of inter", True), ("host interference", "interference of host", True),
    ],
)  # fmt: skip
def test_every_figure_of_a_file_is_checked_and_named(tmp_path, at, label, zero):
    path = tmp_path / "mine.json"
    for value in (-1, float("inf"), 0):
        fields = json.loads((spec._SPECS / "h100.json").read_text())
        *outer, last = at.split()
        inside = fields[outer[0]] if outer else fields
        inside[last] = value
        path.write_text(json.dumps(fields))
        if value == 0 and zero:
            assert load_hardware(str(path)).name == "H100"
            continue
        with pytest.raises(UserError, match=rf"{label} is {value}; it must be {'at least' if zero else 'more than'} 0"):
            load_hardware(str(path))


LINK = {"memory": 1, "to_host": 1, "to_device": 1, "both_ways": 1}


@pytest.mark.parametrize(("wrong", "said"), [
    ({"memory": "much"}, "memory is 'much'; it must be a number, more than 0"),
    ({"launch": None}, "launch is None; it must be a number, at least 0"),
    ({"interference": 1.5}, "interference is 1.5; it must be at most 1"),
    ({"host": [1]}, "host is [1]; it must have the fields memory, to_host, to_device, both_ways, interference, both"),
    ({"host": {**LINK, "speed": 1}}, "it must have the fields memory, to_host, to_device, both_ways, interference"),
    ({"host": {"memory": 1, "to_host": 1}}, "host has no to_device and no both_ways"),
    ({"host": {**LINK, "interference": 2}}, "interference of host is 2; it must be at most 1"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_what_is_allowed(tmp_path, wrong, said):
    fields = json.loads((spec._SPECS / "cpu.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**fields, **wrong}))
    with pytest.raises(UserError, match=re.escape(said)):
        load_hardware(str(tmp_path / "mine.json"))


def test_a_type_or_an_operator_without_a_figure_has_that_of_another():
    rates = {"float32": 100.0, "bfloat16": 400.0}
    hardware = replace(load_hardware("h100"), flops=rates, efficiency={"default": 0.5, "aten.mm.default": 0.75})
    found = [
        hardware.flops_per_second(operator, dtype)
        for operator in ("aten.mm.default", "attention")
        for dtype in (torch.bfloat16, torch.float16)
    ]
    assert found == [300, 75, 200, 50]
    assert [hardware.peak(dtype) for dtype in (torch.bfloat16, torch.float16)] == [400, None]
    assert [hardware.multiplies(dtype) for dtype in (torch.bfloat16, torch.float16)] == [True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [("b9000", ""), ("../specs/h100", ""), ("", ""), ("nowhere.json", ", which does not exist")],
)
def test_hardware_that_is_not_there(name, said):
    with pytest.raises(UserError, match=rf"^hardware is '{name}'{said}; known are a100"):
        load_hardware(name)
