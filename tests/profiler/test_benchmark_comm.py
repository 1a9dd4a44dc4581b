"""benchmark_comm, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.hardware.communication import COLLECTIVES, CommunicationTimes, CopyRates, Group
from nnscaler.profiler import collectives
from nnscaler.profiler.collectives import World, find_world, groups, table
from tests.launch import run

MODULE = "nnscaler.profiler.benchmark_comm"


def command(*arguments: str, cache: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    environment |= {"NNSCALER_CACHE": cache, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_two_processes_measure_and_keep_the_times(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = command(*torchrun, "-m", MODULE, "--backend=gloo", cache=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "communication").iterdir()
    assert path.name == "cpu.json"
    times = CommunicationTimes.from_json(json.loads(path.read_text()))
    assert set(times.curves) == {(name, Group(2, 2)) for name in COLLECTIVES}
    assert all(curve[0][0] == 1024 for curve in times.curves.values())
    assert "gloo" in times.source
    assert all(name in done.stdout for name in COLLECTIVES)
    assert "GB/s" in done.stdout
    assert str(path) in done.stderr
    assert times.copies is None
    assert done.stderr.count("there is no GPU here, and so no copies to the host and back to be measured") == 1


def test_one_process_is_told_the_command(tmp_path):
    done = command("-m", MODULE, cache=str(tmp_path))
    assert done.returncode == 2
    assert "torchrun --nnodes=" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_table_ends_with_copies():
    curves = {(name, Group(2, 2)): ((1024, 1e-6),) for name in COLLECTIVES}
    times = CommunicationTimes(curves, "", CopyRates(5.5e10, 5.2e10, 4.4e10))
    last = table(times).splitlines()[-1]
    assert last == "copies to the host 55.0 GB/s, back 52.0 GB/s, at once 44.0 GB/s each way"


def test_copies_of_a_gpu_are_kept_with_the_rest(tmp_path, monkeypatch):
    times = CommunicationTimes({(name, Group(2, 2)): ((1024, 1e-6),) for name in COLLECTIVES}, "a test")
    rates = CopyRates(5.5e10, 5.2e10, 4.4e10)
    world = World(0, 2, 2, "nccl", torch.device("cuda:1"))
    ranks = SimpleNamespace(init_process_group=lambda *args, **named: None, destroy_process_group=lambda: None)
    copied = {world.device: rates}
    for name, value in (
        ("find_world", lambda backend: world), ("measure", lambda world: times), ("dist", ranks),
        ("measure_copies", copied.__getitem__), ("communication_path", lambda name: tmp_path / "times.json"),
    ):  # fmt: skip
        monkeypatch.setattr(collectives, name, value)
    collectives.measure_and_keep(None)
    assert CommunicationTimes.from_json(json.loads((tmp_path / "times.json").read_text())).copies == rates


def keep_of_a_node(folder: Path) -> None:
    os.environ |= {"NNSCALER_CACHE": str(folder / f"node{os.environ['RANK']}"), "LOCAL_WORLD_SIZE": "1"}
    times = CommunicationTimes({(name, Group(2, 1)): ((1024, 1e-6),) for name in COLLECTIVES}, "a test")

    def measure(world: World) -> CommunicationTimes:
        torch.distributed.barrier()  # as measuring does: nobody leaves while another still connects
        return times

    with patch.object(collectives, "measure", measure):
        collectives.measure_and_keep("gloo")


def test_every_node_keeps_the_times(tmp_path):
    """Two nodes, of one process each, whose folders are their own."""
    run(2, keep_of_a_node, tmp_path, init=False)
    first, second = (tmp_path / f"node{rank}" / "communication" / "cpu.json" for rank in range(2))
    assert first.read_text() == second.read_text() != ""


def test_groups_of_a_node():
    assert groups(4, 4) == {Group(2, 2): [[0, 1], [2, 3]], Group(4, 4): [[0, 1, 2, 3]]}
    assert set(groups(6, 6)) == {Group(2, 2), Group(6, 6)}


def test_groups_over_nodes():
    kinds = groups(8, 4)
    assert kinds[Group(2, 1)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert kinds[Group(4, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert kinds[Group(8, 4)] == [list(range(8))]
    assert set(groups(3, 1)) == {Group(3, 1)}


@pytest.mark.parametrize(("world", "per_node"), [(2, 1), (6, 3), (12, 4), (16, 8), (32, 2)])
def test_every_rank_is_in_one_group_of_each_kind(world, per_node):
    for group, ranks in groups(world, per_node).items():
        assert sorted(rank for members in ranks for rank in members) == list(range(world))
        for members in ranks:
            on_nodes = [rank // per_node for rank in members]
            assert {on_nodes.count(node) for node in on_nodes} == {group.per_node}
            assert len(members) == group.size


def test_the_world_is_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = find_world("gloo")
    assert (world.rank, world.size, world.nodes, world.device_name) == (5, 8, 2, "cpu")


@pytest.mark.parametrize(
    ("world", "backend", "wrong"),
    [
        ((0, 1, 0, 1), "gloo", "communication takes at least 2 processes; start them with: torchrun "),
        ((0, 5, 0, 4), "gloo", r"nodes have different numbers of processes \(5 in all, 4 here\)"),
        ((0, 4, 0, 4), "nccl", "--nproc_per_node is 4; this node has 3 GPUs"),
    ],
)
def test_processes_that_cannot_measure_are_told_why(monkeypatch, world, backend, wrong):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), world):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=wrong):
        find_world(backend)


def test_each_process_has_the_gpu_of_its_place_on_its_node(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(collectives, "device_name", lambda: "A GPU")
    for name, value in {"RANK": "7", "WORLD_SIZE": "12", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = find_world("nccl")
    assert world == World(7, 12, 4, "nccl", torch.device("cuda", 3))
    assert (taken, world.nodes, world.device_name) == ([3], 3, "A GPU")
