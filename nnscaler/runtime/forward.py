"""A pipeline's forward without backward: what its schedule has a rank do, but for all that is of backward.

Transfers keep the order of the schedule, which all ranks agree on, so that none waits for one that waits for it.
torch's own `schedule.eval` cannot run V-shaped schedules, and sets its stages up anew at each change to training and
back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.runtime.axes import Axes
from nnscaler.runtime.module import ParallelModule
from nnscaler.schedules import Compute, Post, Schedule, Transfer, Wait, actions

_Started: TypeAlias = tuple[list[dist.Work], list[dist.P2POp]]  # what is to be waited for, and what it works on


class ForwardOnly:
    """This rank's part of a pipeline's forward.

    stages    those of this rank, by index
    crossing  for each stage the tensors that it sends to the next: name, shape, dtype
    """

    def __init__(
        self, schedule: Schedule, stages: Mapping[int, ParallelModule], crossing: list[list[dict[str, Any]]], axes: Axes
    ) -> None:
        self._schedule, self._stages, self._crossing, self._axes = schedule, stages, crossing, axes

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The losses of at most as many micro-batches as the schedule has, where the last stage is; else nothing.

        Every rank of the pipeline gives as many.
        """
        here: dict[tuple[int, int], list[Tensor]] = {}  # (stage, micro-batch) -> what the stage sends on
        pending: dict[Transfer, _Started] = {}
        losses: list[Tensor] = []
        for action in actions(self._schedule)[self._axes.pipeline.rank]:
            if isinstance(action, Compute):
                if action.kind == "F" and action.micro_batch < len(micro_batches):
                    received = here.pop((action.stage - 1, action.micro_batch), [])
                    made = self._compute(action.stage, received, micro_batches[action.micro_batch])
                    if action.stage == self._schedule.stages - 1:
                        losses += made
                    else:
                        here[action.stage, action.micro_batch] = made
                continue
            moved = [one for one in action.transfers if one.kind == "F" and one.micro_batch < len(micro_batches)]
            if isinstance(action, Post):
                pending.update(dict.fromkeys(moved, self._start(moved, here)))
            elif isinstance(action, Wait):
                for work in chain.from_iterable(pending.pop(transfer)[0] for transfer in moved):
                    work.wait()
        return losses

    def _compute(self, stage: int, received: list[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        module = self._stages[stage]
        names = [tensor["name"] for tensor in self._crossing[stage - 1]] if stage else []
        given = dict(zip(names, received, strict=True))
        made = module(**given, **{name: inputs[name] for name in module.input_names if name not in given})
        return [made] if isinstance(made, Tensor) else list(made)

    def _start(self, transfers: list[Transfer], here: dict[tuple[int, int], list[Tensor]]) -> _Started:
        """Starts transfers at once. What is sent is `here` no longer; what is received will be after a wait."""
        group, operations = self._axes.pipeline.group, []
        for transfer in transfers:
            key = transfer.stage, transfer.micro_batch
            sends = transfer.stage in self._stages
            if not sends:
                here[key] = [self._empty(tensor) for tensor in self._crossing[transfer.stage]]
            peer = self._schedule.rank_of(transfer.target if sends else transfer.stage)
            operations += [
                dist.P2POp(dist.isend if sends else dist.irecv, tensor.contiguous(), group=group, group_peer=peer)
                for tensor in (here.pop(key) if sends else here[key])
            ]
        return dist.batch_isend_irecv(operations) if operations else [], operations

    def _empty(self, tensor: dict[str, Any]) -> Tensor:
        return torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]), device=self._axes.device)
