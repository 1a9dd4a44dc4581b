"""Runs a function in several processes that form a gloo group, as torchrun would."""

from __future__ import annotations

import os
import pickle
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from queue import Empty
from typing import Any

import torch

# Workers are forked from a server that has this loaded already. A process that has used a GPU cannot be forked, and the
# server would: where there is one, each begins anew.
_context: SpawnContext | ForkServerContext
if torch.cuda.is_available():
    _context = SpawnContext()
else:
    _context = ForkServerContext()
    _context.set_forkserver_preload(["tests.preloaded"])


def run(world: int, function: Callable[..., Any], *args: Any, init: bool = True, timeout: float = 580) -> list[Any]:
    """`function(*args)` on ranks 0 .. world - 1; returns what each gave. An error in one is raised here.

    `init`: whether the default process group is set up before, or `function` does it from the environment.
    """
    queue = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = _agent_store()
        ranks = [
            _context.Process(target=_rank, args=(rank, world, folder, store.port, init, queue, function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        results: dict[int, Any] = {}
        try:
            while len(results) < world:
                rank, value, error = pickle.loads(queue.get(timeout=timeout))
                if error is not None:
                    errors = {rank: error, **_other_errors(queue)}  # what came first may be another rank's crash
                    raise AssertionError("\n".join(f"rank {rank} failed:\n{text}" for rank, text in errors.items()))
                results[rank] = value
        finally:
            for process in ranks:
                process.join(timeout=10 if len(results) == world else 0.1)
                process.kill()
            del store  # not before: the ranks meet in it
    return [results[rank] for rank in range(world)]


def start(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Starts `function(*args)` on ranks that set up their own process group, and leaves the processes to the caller.

    What they print is lost, so that killing them makes no noise.
    """
    store = _agent_store()
    _kept.append(store)
    ranks = [
        _context.Process(target=_unattended, args=(rank, world, store.port, function, args)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


_kept: list[Any] = []  # stores of processes that only their starter ends


def _agent_store() -> Any:
    """What torchrun's agent has for its workers to meet in, at a port that was never another's in between."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _unattended(rank: int, world: int, port: int, function: Callable[..., Any], args: Any) -> None:
    _prepare(rank, world, port)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    function(*args)


def _prepare(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip


def _other_errors(queue: Any) -> dict[int, str]:
    errors: dict[int, str] = {}
    with suppress(Empty):
        while True:
            rank, _, error = pickle.loads(queue.get(timeout=1))
            if error is not None:
                errors[rank] = error
    return errors


def _rank(
    rank: int, world: int, folder: str, port: int, init: bool, queue: Any, function: Callable[..., Any], args: Any
) -> None:
    import torch.distributed as dist

    _prepare(rank, world, port)
    try:
        if init and world > 1:
            store = dist.FileStore(os.path.join(folder, "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=580))
        _tell(queue, rank, function(*args), None)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        _tell(queue, rank, None, traceback.format_exc())


def _tell(queue: Any, rank: int, value: Any, error: str | None) -> None:
    # As bytes: a queue itself would send of a tensor where its memory is, which is gone when this process has ended.
    queue.put(pickle.dumps((rank, value, error)))


def free_port() -> int:
    """A port for a program that cannot take any: none of those that the system gives out to others meanwhile."""
    given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(min(20_000, given_out // 2), given_out)  # not that of the tests beside
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
