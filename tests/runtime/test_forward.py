"""The forward of a pipeline without backward, on three ranks that are threads."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler.mesh import PipelineMesh
from nnscaler.runtime import border, forward
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.forward import ForwardOnly
from nnscaler.schedules import Schedule
from tests import threads
from tests.threads import Ranks


class Stage:
    """Uses what the stage before sends, and inputs of the model; and sends on a count, and rows that lie otherwise in
    memory."""

    def __init__(self, index: int, stages: int) -> None:
        self.index, self.last = index, index == stages - 1
        self.input_names = ["x", *(["row", "count"] if index else []), *(["scale"] if index % 2 else [])]

    def __call__(self, **given: Tensor) -> Any:
        assert set(given) == set(self.input_names)
        row = given["x"] * (self.index + 1) + given.get("row", torch.zeros(())) * 3 * given.get("scale", 1.0)
        count = given.get("count", torch.zeros((), dtype=torch.int64)) * 10 + self.index
        assert not torch.is_grad_enabled()
        return row.sum() + count if self.last else (row.t().contiguous().t(), count)


LAYOUT = {"sent": "R", "received": "R", "gradient": False}
CROSSING = [{"name": "row", "whole": [3, 2], **LAYOUT}, {"name": "count", "whole": [], **LAYOUT}]
RECEIVED = {
    "row": torch.empty((3, 2), dtype=torch.float64, device="meta"),
    "count": torch.empty((), dtype=torch.int64, device="meta"),
}


def plainly(stages: int, inputs: Mapping[str, Tensor]) -> float:
    made: dict[str, Tensor] = {}
    for index in range(stages):
        stage = Stage(index, stages)
        with torch.no_grad():
            found = stage(**{name: made.get(name, inputs.get(name)) for name in stage.input_names})
        made = dict(zip(("row", "count"), found)) if not stage.last else {"loss": found}
    return made["loss"].item()


@pytest.mark.parametrize(
    ("kind", "stages", "micro_batches"), [("1f1b", 3, 7), ("interleaved", 6, 6), ("zb-v", 6, 5), ("dualpipe-v", 6, 8)]
)
def test_losses_are_those_of_one_stage_after_the_other(kind, stages, micro_batches, monkeypatch):
    """Of as many micro-batches as the schedule has, or less; only who has the last stage has them."""
    dist = SimpleNamespace(
        P2POp=lambda op, tensor, peer, group: threads.P2POp(op, tensor, group, peer), isend="isend", irecv="irecv",
        batch_isend_irecv=threads.batch_isend_irecv, Work=object,
    )  # fmt: skip
    monkeypatch.setattr(forward, "dist", dist)
    monkeypatch.setattr(border, "dist", dist)
    mesh = PipelineMesh.of([(1,)] * 3, 1)
    schedule = Schedule(kind, 3, stages, micro_batches)
    inputs = [
        {"x": torch.full((3, 2), 1.0 + number, dtype=torch.float64), "scale": torch.tensor(0.5 + number)}
        for number in range(micro_batches)
    ]
    wanted = [plainly(stages, one) for one in inputs]
    counts = (micro_batches, 1, 4)

    def run(axis: Axis) -> list[list[float]]:
        axes = SimpleNamespace(
            pipeline=axis, device=torch.device("cpu"), crossing=axis.group, rank=axis.rank, replica=0
        )
        mine = {index: Stage(index, stages) for index in schedule.stages_of(axis.rank)}
        ways = {}
        for index in range(stages - 1):
            ranks = [schedule.rank_of(one) for one in (index, index + 1)]
            if ranks[0] != ranks[1] and axis.rank in ranks:
                ways[index] = border.border(CROSSING, *(mesh.ranks[rank] for rank in ranks), axes).there
        received = {index: RECEIVED for index in mine if index}
        part = ForwardOnly(schedule, mine, received, ways, axes)  # type: ignore[arg-type]
        return [[loss.item() for loss in part.run(inputs[:count])] for count in counts]

    for rank, found in enumerate(Ranks(3).run(run)):
        has_last = rank == schedule.rank_of(stages - 1)
        assert found == [wanted[:count] if has_last else [] for count in counts]
