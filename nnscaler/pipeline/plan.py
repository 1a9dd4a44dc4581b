"""The plan of a pipeline: a plan for each stage, the schedule that runs them, and a simulated step."""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler.graph import TensorMeta
from nnscaler.mesh import PipelineMesh
from nnscaler.pipeline.simulate import Timeline
from nnscaler.plan import Plan
from nnscaler.schedules import Schedule
from nnscaler.searched import Searched

BESIDE = ("exchange", "copies")  # categories of seconds that say by name what they make longer


@dataclass
class PipelinePlan:
    """The plans of all stages, and their schedule.

    stages        the plan of each stage, on the devices of its rank
    crossing      for each stage but the last, the tensors that it sends to the next: name -> shape and type
    shared        trained parameters that several stages use -> the indices of those stages
    splits        for each stage, whether it runs backward in two parts; if not, the first part does everything
    in_flight     for each stage, the most micro-batches whose activations it holds at a time
    timeline      a simulated step, without the optimizer's update
    memory_limit  bytes a device that the stages of a rank may use together; host_limit: likewise of the host
    bound         seconds of a step; none of these stages, with this schedule, takes less: that is how long the busiest
                  rank works at least
    searched      how it was searched for
    """

    stages: list[Plan]
    schedule: Schedule
    crossing: list[dict[str, TensorMeta]]
    shared: dict[str, list[int]]
    splits: list[bool]
    in_flight: list[int]
    timeline: Timeline
    memory_limit: float
    host_limit: float = 0.0
    bound: float = 0.0
    searched: Searched | None = None

    @property
    def update_seconds(self) -> float:
        """Predicted seconds of a step's optimizer update, on the rank where it takes longest."""
        return self._most([update_seconds(stage) * stage.micro_batches for stage in self.stages])

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of an optimizer step."""
        return self.timeline.seconds + self.update_seconds

    @property
    def gap(self) -> float:
        """The largest part of its time, 0 to 1, that better plans of its stages could save, as far as is proven."""
        return max(0.0, 1 - self.bound / self.step_seconds) if self.step_seconds else 0.0

    @property
    def mesh(self) -> PipelineMesh:
        """The mesh of all devices."""
        of_ranks = [self.stages[self.schedule.stages_of(rank)[0]].mesh for rank in range(self.schedule.ranks)]
        return PipelineMesh.of([mesh.sizes for mesh in of_ranks], of_ranks[0].replicas)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has."""
        return self.schedule.micro_batches

    @property
    def memory_bytes(self) -> float:
        """Predicted peak of memory, in bytes a device, on the rank where it is highest."""
        return self._most([stage.memory_bytes for stage in self.stages])

    @property
    def host_bytes(self) -> float:
        """Predicted memory of the host, in bytes a device, on the rank where it is highest."""
        return self._most([stage.host_bytes for stage in self.stages])

    def _most(self, each: list[float]) -> float:
        """The largest sum over the stages of a rank. `each`: a figure of each stage."""
        return max(sum(each[i] for i in self.schedule.stages_of(rank)) for rank in range(self.schedule.ranks))


def update_seconds(stage: Plan) -> float:
    """Predicted seconds of a stage's optimizer update, as a part of one micro-batch's time."""
    return sum(
        seconds
        for key, seconds in stage.seconds.items()
        if key.category == "update" or (key.category, key.name) == ("copies", "update")
    )


def forward_seconds(stage: Plan) -> float:
    """Predicted seconds of a micro-batch's forward."""
    return sum(
        seconds
        for key, seconds in stage.seconds.items()
        if key.category in ("forward", "reshard", "cast") or (key.category in BESIDE and key.name == "forward")
    )
