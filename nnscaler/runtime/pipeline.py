"""A model whose stages lie on the ranks of a pipeline; `torch.distributed.pipelining` runs it.

Each stage is a `ParallelModule` with its own buckets, and a rank has one stage or several. Every rank of a copy reads
the same micro-batches, and each stage takes from them what it uses. Only what crosses between stages is sent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from nnscaler.mesh import Mesh
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import Bucket, GradientReducer
from nnscaler.runtime.draws import with_draws, without_draws
from nnscaler.runtime.forward import ForwardOnly
from nnscaler.runtime.module import ParallelModule, ReadPart, loss_of
from nnscaler.schedules import Schedule, torch_schedule
from nnscaler.shards import Box, ParameterSpec


def load_module(directory: Path, device: torch.device) -> TrainedModule:
    """The compiled model in a directory, as this rank runs it."""
    plan = json.loads((directory / "plan.json").read_text())
    return PipelineModule(directory, plan, device) if "pipeline" in plan else ParallelModule(directory, device)


class PipelineModule:
    """This rank's stages, and the schedule that runs them. It is used like a `ParallelModule`."""

    def __init__(self, directory: Path, plan: dict[str, Any], device: torch.device) -> None:
        pipeline, mesh = plan["pipeline"], plan["stages"][0]["mesh"]
        self.schedule = Schedule(**pipeline["schedule"])
        self.axes = Axes(Mesh(tuple(mesh["sizes"]), mesh["replicas"], self.schedule.ranks), device)
        self.specs: dict[str, ParameterSpec] = {}
        self.tied: dict[str, str] = {}
        for part in plan["stages"]:
            self.specs.update({name: ParameterSpec.from_json(fields) for name, fields in part["parameters"].items()})
            self.tied.update(part["tied"])
        shared: dict[str, list[int]] = pipeline["shared"]
        self.stages = {
            index: ParallelModule.of_stage(directory, plan["stages"][index], index, self.axes, shared)
            for index in self.schedule.stages_of(self.axes.pipeline.rank)
        }
        self.predicted_seconds: Counter[str] = Counter()
        for stage in self.stages.values():
            self.predicted_seconds.update(stage.predicted_seconds)
        self.buckets = [bucket for stage in self.stages.values() for bucket in stage.buckets]
        self.state_on_host: list[int] = []
        for stage in reversed(self.stages.values()):
            self.state_on_host = stage.state_on_host + [len(stage.buckets) + i for i in self.state_on_host]
        self._shared = list(self._share(shared))
        self.gives_loss = self.schedule.stages - 1 in self.stages
        self._schedule = torch_schedule(
            self.schedule,
            [self._torch_stage(index, pipeline["crossing"], pipeline["splits"][index]) for index in self.stages],
            self._loss,
        )
        self._numbers: list[Tensor] = []  # what the last stage gave in a step
        self._forward = ForwardOnly(self.schedule, self.stages, pipeline["crossing"], self.axes)

    def _torch_stage(self, index: int, crossing: list[list[dict[str, Any]]], splits: bool) -> _Stage:
        """Torch's object for one stage. `crossing`: for each stage, the tensors that it sends to the next"""
        received = _examples(crossing[index - 1]) if index else ()
        sent = _examples(crossing[index]) if index < self.schedule.stages - 1 else (torch.empty((), device="meta"),)
        names = [tensor["name"] for tensor in crossing[index - 1]] if index else []
        return _Stage(self.stages[index], names, index, self.schedule.stages, received, sent, self.axes, splits)

    def _share(self, shared: Mapping[str, list[int]]) -> Iterator[_SharedParameter]:
        """The parameters of this rank that several stages use. Every rank makes all groups, in the same order."""
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for name, users in shared.items():
            ranks = tuple(sorted({self.schedule.rank_of(stage) for stage in users}))
            if ranks not in groups:
                groups[ranks] = _group_across(self.axes, ranks)
            mine = {stage: _buckets_of(self.stages[stage], name) for stage in users if stage in self.stages}
            for stage, buckets in mine.items():
                for bucket in buckets:
                    bucket.is_copy = stage != users[0]
            for same in zip(*mine.values(), strict=True):
                yield _SharedParameter(same, groups[ranks])

    def accumulate(self, micro_batches: Iterable[Mapping[str, Tensor]], seed: int = 0, step: int = 0) -> Tensor:
        """Runs the schedule over a step's micro-batches, and fills `Bucket.gradient`. As `ParallelModule.accumulate`.

        Returns what `ParallelModule.accumulate` does where `gives_loss`; else 0.
        """
        batches = list(with_draws(micro_batches, self.axes, seed, step))
        inputs = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
        target = next(iter(inputs.values())) if self.gives_loss else None
        self._numbers.clear()
        self._schedule.step(target=target, return_outputs=False, **inputs)
        for stage in self.stages.values():
            stage.reducer.finish()
        for parameter in self._shared:
            parameter.add_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.axes.device)
        for numbers in self._numbers:
            total = total + numbers.double()
        return total

    def _loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """The loss, of what the last stage gives for a micro-batch."""
        self._numbers.append(numbers.detach())
        return loss_of(numbers)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """As `accumulate`, of any number of micro-batches, as many on each rank, by forward alone."""
        total = torch.zeros((), dtype=torch.float64, device=self.axes.device)
        left = without_draws(micro_batches, self.axes)
        while some := list(islice(left, self.schedule.micro_batches)):
            for loss in self._forward.run(some):
                total = total + loss.double()
        return total

    def hold_unused(self, tensors: Mapping[str, Tensor]) -> None:
        """As `ParallelModule.hold_unused`. The first of this rank's stages takes them."""
        first = next(iter(self.stages.values()))
        first.hold_unused(tensors)
        self.specs.update({name: first.specs[name] for name in tensors})

    def tensors_called(self, name: str) -> list[Tensor]:
        """This rank's shard of a parameter, or a buffer, in each stage that has it."""
        return [tensor for stage in self.stages.values() for tensor in stage.tensors_called(name)]

    def parameters_to_load(self) -> dict[str, ParameterSpec]:
        """The parameters of this rank's stages that have no value yet."""
        return {name: spec for stage in self.stages.values() for name, spec in stage.parameters_to_load().items()}

    def load(self, read: ReadPart) -> None:
        """Fills this rank's shards. `read(name, box)` gives this part of a whole parameter, in any float type."""
        for stage in self.stages.values():
            stage.load(read)

    def load_one(self, name: str, part: Tensor) -> None:
        """Fills this rank's shard of one parameter or buffer, in each stage that has it."""
        for stage in self.stages.values():
            if name in stage.specs:
                stage.load_one(name, part)

    def box(self, name: str) -> Box:
        """The part of a whole parameter that this rank computes with."""
        return self.specs[name].box(self.axes.mesh, self.axes.place)


TrainedModule: TypeAlias = ParallelModule | PipelineModule


class PeerStage(PipelineStage):
    """A torch stage that connects to other ranks only.

    Torch 2.11 also connects to the next stage where that is on the same rank, which gloo cannot do.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Stage(PeerStage):
    """A torch stage that hands its gradients to the stage's reducer.

    Where a schedule runs backward in two parts, the second computes what the first left for later. Where the stage does
    not split its backward, the first does everything.
    """

    def __init__(
        self,
        module: ParallelModule,
        received_names: list[str],
        index: int,
        stages: int,
        received: tuple[Tensor, ...],
        sent: tuple[Tensor, ...],
        axes: Axes,
        splits: bool,
    ) -> None:
        super().__init__(
            _StageModule(module, received_names), index, stages, axes.device,
            input_args=received, output_args=sent, group=axes.pipeline.group,
            dw_builder=module.axes.later.rest,
        )  # fmt: skip
        self._reducer: GradientReducer = module.reducer
        self._host, self._later = module.axes.host, module.axes.later
        self._splits = splits

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Nothing: shapes are the plan's; and torch 2.11 takes what the last stage gives for one number, which may be
        several in a row."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._later.waits = self._splits and not full_backward
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._host.clear()
        if full_backward or not self._splits:
            self._reducer.end_micro_batch()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self._splits:
            self._reducer.end_micro_batch()


class _StageModule(nn.Module):
    """A stage as torch calls it: what it received comes by place, the model's inputs by name, in rows of one."""

    def __init__(self, module: ParallelModule, received: list[str]) -> None:
        super().__init__()
        self._run = module.forward
        self._received = received
        self._own = [name for name in module.input_names if name not in received]

    def forward(self, *received: Tensor, **inputs: Tensor) -> Any:
        return self._run(**dict(zip(self._received, received, strict=True)), **{n: inputs[n][0] for n in self._own})


@dataclass(frozen=True)
class _SharedParameter:
    """A part of a parameter that several stages use.

    buckets  it lies in, one for each of this rank's stages that use it
    group    of all ranks whose stages use it; None: only this rank
    """

    buckets: tuple[Bucket, ...]
    group: dist.ProcessGroup | None

    def add_gradients(self) -> None:
        """Gives every stage the sum of all stages' gradients, so that all make the same update."""
        total = self.buckets[0].gradient
        for bucket in self.buckets[1:]:
            total += bucket.gradient
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        for bucket in self.buckets[1:]:
            bucket.gradient.copy_(total)


def _buckets_of(stage: ParallelModule, name: str) -> list[Bucket]:
    return [bucket for bucket in stage.buckets if any(slot.name == name for slot in bucket.slots)]


def _group_across(axes: Axes, pipeline_ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The group of those devices on these pipeline ranks that have this device's place on the other axes."""
    if len(pipeline_ranks) == 1:
        return None
    each = axes.mesh.runtime_ngpus // axes.mesh.pipeline
    found = None
    for place in range(each):
        ranks = [rank * each + place for rank in pipeline_ranks]
        group = dist.new_group(ranks)
        if axes.rank in ranks:
            found = group
    return found


def _examples(tensors: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    """Tensors without values, of the shapes, types and need for gradients that plan.json says."""
    return tuple(
        torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]), device="meta").requires_grad_(
            tensor["gradient"]
        )
        for tensor in tensors
    )
