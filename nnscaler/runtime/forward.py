"""The forward of a pipeline without backward: what its schedule has a rank do, except for all that belongs to backward.

Transfers keep the order of the schedule, on which all ranks agree, so that no two ranks wait for each other. torch's
own `schedule.eval` cannot run V-shaped schedules, and prepares its stages anew at each change between training and
evaluation.
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

    stages    this rank's stages, by index
    crossing  for each stage, the tensors that it sends to the next: name, shape, dtype
    """

    def __init__(
        self, schedule: Schedule, stages: Mapping[int, ParallelModule], crossing: list[list[dict[str, Any]]], axes: Axes
    ) -> None:
        self._schedule, self._stages, self._crossing, self._axes = schedule, stages, crossing, axes

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The losses of some micro-batches, at most as many as the schedule has; on ranks without the last stage,
        nothing.

        Every rank of the pipeline must pass the same number.
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
        """Starts transfers at once. What is sent leaves `here`; what is received is there after a wait."""
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
