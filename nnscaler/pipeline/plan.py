"""The plan of a pipeline: a plan a stage, the schedule that runs them, and what a simulated step looks like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nnscaler.graph import TensorMeta
from nnscaler.pipeline.schedules import Schedule
from nnscaler.pipeline.simulate import Timeline
from nnscaler.placement import local_shape
from nnscaler.plan import GIB, Plan


@dataclass
class PipelinePlan:
    """Stages and their schedule.

    stages    the plan of each stage, all on meshes of equal sizes
    crossing  for each stage but the last, the tensors that it sends to the next: name -> meta
    shared    trained parameters of several stages -> those stages
    splits    for each stage, whether it runs backward in two parts where the schedule says so, or both at once
    timeline  a simulated step, without the optimizer's part
    """

    stages: list[Plan]
    schedule: Schedule
    crossing: list[dict[str, TensorMeta]]
    shared: dict[str, list[int]]
    splits: list[bool]
    timeline: Timeline

    @property
    def update_seconds(self) -> float:
        """Predicted time of the optimizer's part of a step, on the rank where it takes longest."""
        each = [update_seconds(stage) * stage.micro_batches for stage in self.stages]
        return max(sum(each[i] for i in self.schedule.stages_of(rank)) for rank in range(self.schedule.ranks))

    @property
    def step_seconds(self) -> float:
        """Predicted time of an optimizer step."""
        return self.timeline.seconds + self.update_seconds

    @property
    def memory_bytes(self) -> float:
        """Predicted peak of memory a device, on the rank where it is highest."""
        ranks = range(self.schedule.ranks)
        return max(sum(self.stages[i].memory_bytes for i in self.schedule.stages_of(rank)) for rank in ranks)

    def to_json(self) -> dict[str, Any]:
        """The plan without its graphs, as plain values."""
        return {
            "pipeline": {
                "schedule": asdict(self.schedule),
                "crossing": [self._crossing_json(index, tensors) for index, tensors in enumerate(self.crossing)],
                "shared": self.shared,
                "splits": self.splits,
                "predicted": {
                    "step_seconds": self.step_seconds,
                    "update_seconds": self.update_seconds,
                    "memory_gib": self.memory_bytes / GIB,
                    "computing": [self.timeline.busy(rank) / self.step_seconds for rank in range(self.schedule.ranks)],
                },
                "timeline": [
                    [span.rank, span.work.kind, span.work.stage, span.work.micro_batch, span.start, span.end]
                    for span in self.timeline.spans
                ],
            },
            "stages": [stage.to_json() for stage in self.stages],
        }

    def _crossing_json(self, index: int, tensors: dict[str, TensorMeta]) -> list[dict[str, Any]]:
        """The crossing tensors as a device has them."""
        stage = self.stages[index]
        root = stage.graph.root
        layouts = dict(zip(root.outputs, stage.outputs[root.name]))
        return [
            {
                "name": name,
                "shape": list(local_shape(meta.shape, layouts[name], stage.mesh.sizes)),
                "dtype": str(meta.dtype).removeprefix("torch."),
                "gradient": meta.requires_grad,
            }
            for name, meta in tensors.items()
        ]


def update_seconds(stage: Plan) -> float:
    """Predicted time of the optimizer's part of a stage, spread over micro-batches."""
    return sum(seconds for key, seconds in stage.seconds.items() if key.category == "update")


def forward_seconds(stage: Plan) -> float:
    """Predicted time of a micro-batch's forward."""
    return sum(
        seconds
        for key, seconds in stage.seconds.items()
        if key.category in ("forward", "reshard") or (key.category, key.name) == ("exchange", "forward")
    )
