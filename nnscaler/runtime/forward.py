"""The forward of a pipeline without backward: what its schedule has a rank do, except for all that belongs to backward.

Transfers keep the order of the schedule, on which all ranks agree, so that no two ranks wait for each other. torch's
own `schedule.eval` cannot run V-shaped schedules, and prepares its stages anew at each change between training and
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.runtime.axes import Axes
from nnscaler.runtime.border import Received, Way
from nnscaler.runtime.module import ParallelModule
from nnscaler.schedules import Compute, Post, Schedule, Transfer, Wait, actions

# What is to be waited for, what it works on, and what is then to be put together.
_Started: TypeAlias = tuple[list[dist.Work], list[dist.P2POp], list[Received]]


class ForwardOnly:
    """This rank's part of a pipeline's forward.

    stages    this rank's stages, by index
    received  for each of them but the first, what it receives: names, and tensors alike without values
    ways      for each stage that sends to this rank's, or is one, how what it sends crosses
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, ParallelModule],
        received: Mapping[int, Mapping[str, Tensor]],
        ways: Mapping[int, Way],
        axes: Axes,
    ) -> None:
        self._schedule, self._stages, self._axes = schedule, stages, axes
        self._received, self._ways = received, ways

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
                for works, _, coming in [pending.pop(transfer) for transfer in moved]:
                    for work in works:
                        work.wait()
                    for one in coming:
                        one.put()
        return losses

    def _compute(self, stage: int, received: list[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        module = self._stages[stage]
        given = dict(zip(self._received.get(stage, ()), received, strict=True))
        made = module(**given, **{name: inputs[name] for name in module.input_names if name not in given})
        return [made] if isinstance(made, Tensor) else list(made)

    def _start(self, transfers: list[Transfer], here: dict[tuple[int, int], list[Tensor]]) -> _Started:
        """Starts transfers at once. What is sent leaves `here`; what is received is there after a wait."""
        operations: list[dist.P2POp] = []
        coming: list[Received] = []
        for transfer in transfers:
            key, way = (transfer.stage, transfer.micro_batch), self._ways[transfer.stage]
            if transfer.stage in self._stages:
                operations += way.send(here.pop(key))
            else:
                here[key] = [
                    torch.empty_like(one, device=self._axes.device) for one in self._received[transfer.target].values()
                ]
                coming.append(way.receive(here[key]))
                operations += coming[-1].operations
        return dist.batch_isend_irecv(operations) if operations else [], operations, coming
