"""A model whose stages lie on the ranks of a pipeline; `torch.distributed.pipelining` runs it.

Each stage is a `ParallelModule` with its own buckets, and a rank has one stage or several. Every rank of a copy reads
the same micro-batches, and each stage takes from them what it uses. Only what crosses between stages is sent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from nnscaler.kernels import note_copy
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import local_shape, parse_placements
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.border import Border, Crossing, Received, Way, border, greet
from nnscaler.runtime.buckets import Bucket, GradientReducer
from nnscaler.runtime.draws import with_draws, without_draws
from nnscaler.runtime.forward import ForwardOnly
from nnscaler.runtime.module import ParallelModule, ReadPart, loss_of
from nnscaler.runtime.shared import SharedAlike, SharedUnevenly, group_across
from nnscaler.schedules import Schedule, torch_schedule
from nnscaler.shards import Box, ParameterSpec


def load_module(directory: Path, device: torch.device) -> TrainedModule:
    """The compiled model in a directory, as this rank runs it."""
    plan = json.loads((directory / "plan.json").read_text())
    return PipelineModule(directory, plan, device) if "pipeline" in plan else ParallelModule(directory, device)


class PipelineModule:
    """This rank's stages, and the schedule that runs them. It is used like a `ParallelModule`."""

    def __init__(self, directory: Path, plan: dict[str, Any], device: torch.device) -> None:
        pipeline, meshes = plan["pipeline"], [part["mesh"] for part in plan["stages"]]
        self.schedule = Schedule(**pipeline["schedule"])
        of_ranks = [meshes[self.schedule.stages_of(rank)[0]] for rank in range(self.schedule.ranks)]
        self.mesh = PipelineMesh.of([tuple(mesh["sizes"]) for mesh in of_ranks], meshes[0]["replicas"])
        self.axes = Axes(self.mesh, device)
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
        if not self.mesh.is_even:
            greet(self.mesh, self.axes)
        crossing: list[Crossing] = pipeline["crossing"]
        borders = dict(self._borders(crossing))
        received = {index: _examples(crossing[index - 1], "received", self.axes.mesh) for index in self.stages if index}
        self._schedule = torch_schedule(
            self.schedule,
            [
                self._torch_stage(index, received.get(index, {}), crossing[index:], borders, pipeline["splits"][index])
                for index in self.stages
            ],
            self._loss,
        )
        self._numbers: list[Tensor] = []  # what the last stage gave in a step
        ways = {index: each.there for index, each in borders.items()}
        self._forward = ForwardOnly(self.schedule, self.stages, received, ways, self.axes)

    def _borders(self, crossing: list[Crossing]) -> Iterator[tuple[int, Border]]:
        """Index of a stage -> the border to the next, where that is on another rank, and this rank is on one side."""
        for index, tensors in enumerate(crossing):
            ranks = self.schedule.rank_of(index), self.schedule.rank_of(index + 1)
            if ranks[0] != ranks[1] and self.axes.pipeline.rank in ranks:
                yield index, border(tensors, self.mesh.ranks[ranks[0]], self.mesh.ranks[ranks[1]], self.axes)

    def _torch_stage(
        self,
        index: int,
        received: Mapping[str, Tensor],
        later: Sequence[Crossing],
        borders: Mapping[int, Border],
        splits: bool,
    ) -> _Stage:
        """Torch's object for one stage.

        received  what the stage receives: names, and tensors alike without values
        later     what this stage sends to the next, and so on; nothing, if it is the last
        borders   of each stage to the next
        """
        sent = tuple(_examples(later[0], "sent", self.axes.mesh).values()) if later else ()
        return _Stage(
            self.stages[index], list(received), index, self.schedule.stages, tuple(received.values()),
            sent or (torch.empty((), device="meta"),), self.axes, splits, (borders.get(index - 1), borders.get(index)),
        )  # fmt: skip

    def _share(self, shared: Mapping[str, list[int]]) -> Iterator[SharedAlike | SharedUnevenly]:
        """The parameters of this rank that several stages use. Every rank makes all groups, in the same order."""
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for name, users in shared.items():
            ranks = tuple(sorted({self.schedule.rank_of(stage) for stage in users}))
            mine = {stage: _buckets_of(self.stages[stage], name) for stage in users if stage in self.stages}
            for stage, buckets in mine.items():
                for bucket in buckets:
                    bucket.is_copy = stage != users[0]
            if not self.mesh.is_even:
                yield SharedUnevenly(name, [bucket for buckets in mine.values() for bucket in buckets], self.axes)
                continue
            if ranks not in groups:
                groups[ranks] = group_across(self.axes, self.mesh, ranks)
            for same in zip(*mine.values(), strict=True):
                yield SharedAlike(same, groups[ranks])

    def accumulate(self, micro_batches: Iterable[Mapping[str, Tensor]], seed: int = 0, step: int = 0) -> Tensor:
        """Runs the schedule over a step's micro-batches, and fills `Bucket.gradient`. As `ParallelModule.accumulate`.

        Returns what `ParallelModule.accumulate` does where `gives_loss`; else 0.
        """
        batches = list(with_draws(micro_batches, self.axes, seed, step))
        inputs = {name: _stacked([batch[name] for batch in batches]) for name in batches[0]}
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
        """The part of a whole parameter that this rank computes with, if any of its stages does."""
        own = (stage.specs[name] for stage in self.stages.values() if name in stage.specs)
        return next(own, self.specs[name]).box(self.axes.mesh, self.axes.place)


TrainedModule: TypeAlias = ParallelModule | PipelineModule


class PeerStage(PipelineStage):
    """A torch stage that connects to other ranks only.

    Torch 2.11 also connects to the next stage where that is on the same rank, which gloo cannot do.

    greeted  whether all are connected already, so that torch need not do it
    """

    greeted = False

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        if self.greeted:
            return []
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """Of torch 2.13, which connects ranks by asking each whether it knows all shapes. They do."""
        if self.greeted:
            return torch.ones(1, dtype=torch.int32, device=self.device)
        return super()._warmup_forward_vote(has_backward, received_acc)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        if self.greeted:
            return torch.ones(1, dtype=torch.int32, device=self.device)
        return super()._warmup_backward_result(received_result)


class _Stage(PeerStage):
    """A torch stage that hands its gradients to the stage's reducer, and exchanges with others by borders.

    Where a schedule runs backward in two parts, the second computes what the first left for later. Where the stage does
    not split its backward, the first does everything.

    borders  to the stage before, and to the next; None: that is on the same rank, or there is none
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
        borders: tuple[Border | None, Border | None],
    ) -> None:
        super().__init__(
            _StageModule(module, received_names), index, stages, axes.device,
            input_args=received, output_args=sent, group=axes.pipeline.group,
            dw_builder=module.axes.later.rest,
        )  # fmt: skip
        self._reducer: GradientReducer = module.reducer
        self._host, self._later = module.axes.host, module.axes.later
        self._splits = splits
        self._before, self._after = borders
        self._coming: dict[tuple[str, int], Received] = {}  # activations or gradients, of a micro-batch
        self.greeted = isinstance(axes.whole, PipelineMesh) and not axes.whole.is_even

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive(
            "F", fwd_chunk_id, None if self._before is None else self._before.there, self.args_recv_info
        )

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive("B", bwd_chunk_id, None if self._after is None else self._after.back, self.grad_recv_info)

    def _receive(self, kind: str, chunk: int, way: Way | None, info: Mapping[int, Any]) -> list[dist.P2POp]:
        if way is None:
            return []
        received = self._coming[kind, chunk] = way.receive([one.buffer for one in info[chunk]])
        return received.operations

    def _put(self, kind: str, chunk: int) -> None:
        """Puts together what has come, which torch has waited for."""
        if (received := self._coming.pop((kind, chunk), None)) is not None:
            received.put()

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return [] if self._after is None else self._after.there.send(self.fwd_cache[fwd_chunk_id][0])

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self._before is None:
            return []
        received: Any = self.args_recv_info[bwd_chunk_id]
        gradients = zip(self.bwd_cache.pop(bwd_chunk_id), received)
        # What backward does not reach has no gradient.
        return self._before.back.send([torch.zeros_like(at.buffer) if one is None else one for one, at in gradients])

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        self._put("F", fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Nothing: shapes are the plan's; and torch 2.11 takes what the last stage gives for one number, which may be
        several in a row."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._put("B", bwd_chunk_id)
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


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return note_copy(torch.stack(list(tensors)), *tensors)


def _buckets_of(stage: ParallelModule, name: str) -> list[Bucket]:
    return [bucket for bucket in stage.buckets if any(slot.name == name for slot in bucket.slots)]


def _examples(tensors: Crossing, side: str, mesh: Mesh) -> dict[str, Tensor]:
    """Names of tensors that cross, and tensors without values, of the types and the need for gradients that plan.json
    says, and of the shapes that a device of the mesh has of them. `side`: "sent" or "received" """
    return {
        tensor["name"]: torch.empty(
            local_shape(tuple(tensor["whole"]), parse_placements(tensor[side]), mesh.sizes),
            dtype=getattr(torch, tensor["dtype"]), device="meta",
        ).requires_grad_(tensor["gradient"])
        for tensor in tensors
    }  # fmt: skip
