"""Parts of tensors, which ranks own, as whole tensors; and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.checkpoint.sharded import Part
from nnscaler.errors import UserError
from nnscaler.processes import from_all


def gather_whole(parts: Sequence[Part]) -> dict[str, Tensor]:
    """All ranks' parts as whole tensors, by name, on the CPU of rank 0; nothing on other ranks. Collective.

    One tensor is sent at a time. A part that several ranks have is sent by one of them.
    """
    senders: dict[tuple[str, tuple[int, ...]], int] = {}
    for rank, keys in enumerate(from_all([part.key for part in parts])):
        for key in keys:
            senders.setdefault(key, rank)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine: dict[str, list[Part]] = {}
    for part in {part.key: part for part in parts if senders[part.key] == rank}.values():
        mine.setdefault(part.name, []).append(part)
    found = {}
    for name in dict.fromkeys(name for name, _ in senders):
        sent = [(part.shape, part.box, part.tensor.detach().cpu().clone()) for part in mine.get(name, ())]
        pieces = [piece for of_rank in _to_rank_0(sent) for piece in of_rank]
        if rank == 0:
            found[name] = torch.empty(pieces[0][0], dtype=pieces[0][2].dtype)
            for _, box, tensor in pieces:
                found[name][box.slices] = tensor
    return found


def _to_rank_0(value: Any) -> list[Any]:
    """Every rank's value on rank 0, nothing on the others."""
    if not dist.is_initialized():
        return [value]
    rank = dist.get_rank()
    values: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


@torch.no_grad()
def scatter_whole(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> None:
    """Fills this rank's parts from whole tensors. Raises UserError where one is missing, or has another shape."""
    for part in parts:
        if part.name not in tensors:
            raise UserError(f"the state has no '{part.name}'")
        given = tensors[part.name]
        if tuple(given.shape) != part.shape:
            raise UserError(f"the state's '{part.name}' has shape {list(given.shape)}, the model's {list(part.shape)}")
    for part in parts:
        part.tensor.copy_(tensors[part.name][part.box.slices])
