"""The processes of a run: how they meet, what rank 0 finds out for all of them, and files that every node needs."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nnscaler.compiler import OWN_FILES, put_in_place
from nnscaler.counting import counted
from nnscaler.directory import work_beside, writing
from nnscaler.errors import UserError
from nnscaler.watch import Watch, is_leader

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # of the start, and of every collective, unless a step takes long
STEPS = 6  # of a predicted length, in which a collective may wait: half of them until the watch says whom it waits for


def join_processes(device: torch.device, timeout: timedelta = TIMEOUT) -> Watch:
    """Sets up the default process group: NCCL on GPUs, gloo on CPUs.

    The processes of torchrun meet in a store that outlives them. After a restart, it still holds the addresses of those
    that were killed, and a process that reads one would wait for ever. So each restart uses its own names there.

    Raises UserError that names the ranks that did not come within `timeout`.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    keys = [f"here/{other}" for other in range(world)]
    store.set(keys[rank], socket.gethostname())
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [str(other) for other in range(world) if not store.check([keys[other]])]
        raise UserError(
            f"rank {', '.join(missing)} of {world} did not start within {timeout.total_seconds():.0f} s; is torchrun "
            "running on every node, with the same --nnodes and --master_addr and its own --node_rank?"
        ) from error
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id
    )  # fmt: skip
    return Watch(store, rank, world, timeout / 2)


def leave_processes(failed: bool) -> None:
    """Ends this process's part in all groups, if it has joined any.

    failed  whether it ends where the others do not, perhaps. They may be in an exchange then that it will not join, for
            which NCCL would wait for ever if it were to end in peace
    """
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() == "nccl":
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def own_device() -> torch.device:
    """The GPU of this process, which becomes its current one; or the CPU, where there is no GPU.

    Raises UserError where torchrun started more processes on this node than it has GPUs.
    """
    # Near a device's limit fixed segments break up; read when the first tensor is made there.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, "
            f"this node has {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def check_world(runtime_ngpus: int) -> None:
    """Raises UserError unless as many processes run as a configuration is for."""
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world != runtime_ngpus:
        raise UserError(
            f"runtime_ngpus is {runtime_ngpus}, but {counted(world, 'process runs', 'processes run')}; start with "
            f"torchrun --nproc_per_node={runtime_ngpus} (or --nnodes and --nproc_per_node that multiply to it)"
        )


def wait_for_steps_of(seconds: float, watch: Watch | None = None) -> None:
    """Lets collectives, and the watch, wait long enough for steps of so many seconds."""
    timeout = max(TIMEOUT, timedelta(seconds=STEPS * seconds))
    if watch is not None:
        watch.patience = timeout.total_seconds() / 2
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def from_rank_0(function: Callable[[], T], device: torch.device) -> T:
    """What `function()` gives on rank 0, on every rank. Collective.

    Where it raises UserError, every rank raises it. If only rank 0 ended, torchrun would end the others, perhaps before
    rank 0 has said why.
    """
    outcome: list[Any] = [None, None]
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, device=device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Collective."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def share_folder(folder: Path, device: torch.device) -> None:
    """Gives the files in rank 0's folder to every node that does not have them. Collective."""
    wanted = [_digest(folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(wanted, src=0, device=device)
    lacks = is_leader() and _digest(folder) != wanted[0]
    lacking = torch.tensor(int(lacks), device=device)
    dist.all_reduce(lacking)
    if not lacking.item():
        return
    files: list[dict[str, bytes]] = [_read_all(folder) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(files, src=0, device=device)
    if lacks:
        with writing(folder), work_beside(folder) as work:
            for name, content in files[0].items():
                (work / name).write_bytes(content)
            put_in_place(work, folder)
        logger.info("took the compiled plan from rank 0")
    dist.barrier()


def _read_all(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [path for path in paths if any(fnmatch(path.name, pattern) for pattern in OWN_FILES)]
    return {path.name: path.read_bytes() for path in own if path.is_file()}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, content in _read_all(folder).items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
