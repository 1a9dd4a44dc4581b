"""How long a run's processes wait for each other."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from nnscaler import processes
from nnscaler.errors import UserError
from nnscaler.identity import DONE
from nnscaler.watch import Watch
from tests.launch import run


def patience_and_timeouts(folder: str, seconds: float) -> tuple[float, list[float]]:
    store = dist.FileStore(f"{folder}/watch", 1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/group", 1), rank=0, world_size=1)
    groups = [dist.group.WORLD, dist.new_group([0], timeout=timedelta(minutes=1))]
    watch = Watch(store, 0, 1, timedelta(minutes=5))
    processes.wait_for_steps_of(seconds, watch)
    watch.close()
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return watch.patience, [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize(("seconds", "patience"), [(1.0, 300.0), (1000.0, 3000.0)])
def test_processes_wait_as_long_as_a_step_asks_for(tmp_path, seconds, patience):
    """Five minutes and ten, or three predicted steps and six: in every group."""
    ((found, timeouts),) = run(1, patience_and_timeouts, str(tmp_path), seconds, init=False)
    assert found == patience
    assert timeouts == [2 * patience, 2 * patience]


@pytest.mark.parametrize(("joined", "backend", "failed", "way"), [
    (True, "nccl", False, ["in peace"]), (True, "nccl", True, ["at once"]), (True, "gloo", True, ["in peace"]),
    (False, "nccl", True, []),
])  # fmt: skip
def test_nccl_is_not_waited_for_by_a_process_that_failed(monkeypatch, joined, backend, failed, way):
    """The others may be in an exchange that it will not join."""
    ways: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ways.append("in peace"))
    monkeypatch.setattr(processes.distributed_c10d, "_abort_process_group", lambda: ways.append("at once"))
    processes.leave_processes(failed)
    assert ways == way


def wrong() -> NoReturn:
    raise UserError(f"rank {dist.get_rank()} found the dataset empty")


def what_is_raised() -> str:
    try:
        processes.from_rank_0(wrong, torch.device("cpu"))
    except UserError as error:
        return str(error)


def test_what_rank_0_finds_wrong_every_rank_raises():
    """A rank that only exited would have torchrun end the others, rank 0 perhaps before it has said why."""
    assert run(2, what_is_raised) == ["rank 0 found the dataset empty"] * 2


def test_a_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "a user's own")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for local_world in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
        assert processes.own_device() == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] * 2
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "a user's own"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    processes.own_device()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="torchrun started 3 processes here, this node has 2 GPUs"):
        processes.own_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.own_device() == torch.device("cpu")


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_processes_meet_under_names_of_this_restart(monkeypatch, device, backend):
    """Those of a restart before may have left an address there. A collective waits as long as the start may take, and
    the watch half of that."""
    told, store = [], dist.HashStore()
    rendezvous = iter([(store, 1, 2)])
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: told.append((url, timeout)) or rendezvous)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: told.append((*given, named)))
    monkeypatch.setattr(processes, "Watch", lambda *given: given)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    store.set("restart3/here/0", "first")
    store.set("restart2/here/1", "killed")
    there, rank, world, patience = processes.join_processes(torch.device(device), timedelta(seconds=8))
    assert store.get("restart3/here/1").decode() == socket.gethostname()
    assert (rank, world, patience) == (1, 2, timedelta(seconds=4))
    given = {"store": there, "rank": 1, "world_size": 2, "timeout": timedelta(seconds=8)}
    own = torch.device(device) if backend == "nccl" else None
    assert told == [("env://", timedelta(seconds=8)), (backend, given | {"device_id": own})]


def test_as_many_processes_as_the_plan_is_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.check_world(1)
    with pytest.raises(UserError, match=r"runtime_ngpus is 2, but 1 process runs; .* --nproc_per_node=2 \("):
        processes.check_world(2)
    monkeypatch.setenv("WORLD_SIZE", "16")
    processes.check_world(16)
    with pytest.raises(UserError, match="runtime_ngpus is 8, but 16 processes run"):
        processes.check_world(8)


def test_one_process_finds_out_for_itself():
    assert processes.from_rank_0(lambda: 5, torch.device("cpu")) == 5
    assert processes.from_all("mine") == ["mine"]
    with pytest.raises(UserError, match="empty"):
        processes.from_rank_0(empty, torch.device("cpu"))


def empty() -> NoReturn:
    raise UserError("empty")


class Nodes(SimpleNamespace):
    """The collectives of a node that is not the first, which sends `texts` and `files`."""

    def __init__(self, *sent: object) -> None:
        super().__init__(sent=list(sent), barriers=0)

    def get_rank(self) -> int:
        return 1

    def broadcast_object_list(self, values: list, src: int, device: torch.device) -> None:
        assert src == 0
        values[0] = self.sent.pop(0)

    def all_reduce(self, value: torch.Tensor) -> None:
        pass

    def barrier(self) -> None:
        self.barriers += 1


@pytest.mark.parametrize(("local_rank", "takes"), [("0", True), ("1", False)])
def test_a_node_that_lacks_a_folder_takes_it_from_rank_0(monkeypatch, tmp_path, local_rank, takes):
    """Its first process does; where the folder is there already, nothing is sent."""
    theirs, ours = tmp_path / "theirs" / "code", tmp_path / "ours" / "code"
    theirs.mkdir(parents=True)
    for name in ("plan.json", DONE, "gencode_stage0.py", "own.ckpt"):
        (theirs / name).write_text(name)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    files = processes._read_all(theirs)
    assert sorted(files) == sorted(["plan.json", DONE, "gencode_stage0.py"]), "what compiling wrote, and no more"
    nodes = Nodes(processes._digest(theirs), files)
    monkeypatch.setattr(processes, "dist", nodes)
    processes.share_folder(ours, torch.device("cpu"))
    assert ours.exists() == takes
    if takes:
        assert processes._read_all(ours) == files
        assert [path.name for path in ours.parent.iterdir()] == ["code"]
        assert (nodes.sent, nodes.barriers) == ([], 1)
        nodes.sent = [processes._digest(theirs)]
        processes.share_folder(ours, torch.device("cpu"))
        (ours / "plan.json").write_text("another")
        assert processes._digest(ours) != processes._digest(theirs)
    else:
        assert nodes.sent == [files], "it leaves that to the first one"
