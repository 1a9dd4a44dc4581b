"""The processes of a run: how they find each other, and what rank 0 finds out for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nnscaler.errors import UserError

T = TypeVar("T")


def join_processes(device: torch.device) -> None:
    """Sets up the default process group: NCCL on GPUs, gloo on CPUs.

    torchrun's processes meet in a store that outlives them. After a restart it still holds the addresses of those that
    were killed, and who reads one waits for a dead process; so each restart uses names of its own there.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device_id)


def from_rank_0(function: Callable[[], T], device: torch.device) -> T:
    """What `function()` gives on rank 0, on every rank. Collective.

    Where it raises UserError, rank 0 raises it and the other ranks exit, so that it is told once.
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
        raise outcome[1] if rank == 0 else SystemExit(2)
    return outcome[0]
