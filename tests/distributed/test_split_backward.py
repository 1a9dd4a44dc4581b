"""Backward in two parts, in pipelines of two stages a rank: gradients are those of the plain model, and its order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, Source, compile_model
from nnscaler.runtime import later
from nnscaler.runtime.pipeline import PipelineModule, _Stage
from nnscaler.schedules import Compute, Schedule, actions
from tests import tiny
from tests.launch import run
from tests.parity import compiled_regions

WIDTH, WORDS, LAYERS = 16, 24, 8
DW = ("dW", 0, 0)
CPU = torch.device("cpu")


class Layer(nn.Module):
    """Products with a bias and without one, twice with the same weight, and with a frozen weight; and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.twice, self.frozen = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(self.norm(x)).tanh())
        return x + self.frozen(self.twice(self.twice(y).tanh()))


class Model(nn.Module):
    """The embedding, in the first stage, is the last stage's projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().sum()


def with_weights() -> Model:
    model, generator = Model(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(schedule: Schedule, step: int, replica: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2 * step + replica)
    return [{"ids": torch.randint(WORDS, (2, 8), generator=generator)} for _ in range(schedule.micro_batches)]


@contextmanager
def events_noted() -> Iterator[list[tuple[str, int, int]]]:
    """Inside, what this rank does of backward is noted: (kind of work, stage, micro-batch) where it begins; and DW for
    each gradient of a weight that waits, or could, where it is computed."""
    noted: list[tuple[str, int, int]] = []
    backward, rest, gradient = _Stage.backward_one_chunk, _Stage.backward_weight_one_chunk, later.weight_gradient

    def noting_backward(self: Any, number: int, loss: Any = None, full_backward: bool = True, **given: Any) -> None:
        noted.append(("B" if full_backward else "I", self.stage_index, number))
        backward(self, number, loss, full_backward, **given)

    def noting_rest(self: Any, number: int, **given: Any) -> None:
        noted.append(("W", self.stage_index, number))
        rest(self, number, **given)

    def noting_gradient(x: Tensor, dy: Tensor) -> Tensor:
        noted.append(DW)
        return gradient(x, dy)

    with (
        patch.object(_Stage, "backward_one_chunk", noting_backward),
        patch.object(_Stage, "backward_weight_one_chunk", noting_rest),
        patch.object(later, "weight_gradient", noting_gradient),
    ):
        yield noted


def gradients(jobs: list[tuple[Path, bool]], device: torch.device = CPU) -> list[Any]:
    """For each directory, and whether regions are compiled: the losses of two steps; the parts of the second one's
    gradients that this rank owns; and what was noted of that step."""
    found = []
    for directory, compiled in jobs:
        plan = json.loads((directory / "plan.json").read_text())
        with compiled_regions() if compiled else nullcontext(), events_noted() as events:
            module = PipelineModule(directory, plan, device)
            weights = dict(with_weights().named_parameters())
            module.load(lambda name, box, weights=weights: weights[name].detach()[box.slices])
            losses = []
            for step in range(2):
                events.clear()
                batches = inputs(module.schedule, step, module.axes.replica)
                on_device = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
                losses.append(module.accumulate(on_device).item())
        parts = [
            (part.name, part.box.slices, gradient[part.start : part.stop].view(part.box.sizes).numpy())
            for bucket in module.buckets
            for gradient in [bucket.gradient.cpu().clone()]
            for part in bucket.owned_parts()
        ]
        found.append((module.axes.replica, module.axes.pipeline.rank, losses, parts, events))
    return found


def plain(schedule: Schedule, copies: int) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Of each copy the losses of two steps; and the gradients of the second."""
    losses = []
    for step in range(2):
        model = with_weights()
        every = [[model(**batch) for batch in inputs(schedule, step, replica)] for replica in range(copies)]
        sum(map(sum, every)).backward()
        losses.append([sum(loss.item() for loss in own) for own in every])
    return [list(own) for own in zip(*losses)], {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Job:
    schedule: Schedule
    plan: int
    compiled: bool
    recompute: tuple[str, ...] = ()
    policy: str = "autodist"

    def compile(self, folder: Path, world: int) -> Path:
        source = Source(Model, inputs(self.schedule, 0)[0], torch.float32)
        config = ComputeConfig(
            self.plan, world, hardware=tiny.write_hardware(folder), micro_batches=self.schedule.micro_batches,
            explore_pipeline=True, pipeline_schedule=self.schedule.kind, pipeline_nstages=self.schedule.stages,
            recompute_modules=self.recompute, pas_policy=self.policy,
        )  # fmt: skip
        return compile_model(source, config, folder / "code")

    def check(self, results: list[Any], tolerance: float = 1e-6) -> None:
        """Losses and gradients are the plain model's. Gradients of weights that wait are computed in the second part of
        a micro-batch's backward, where it has two, and all of them there."""
        schedule, copies = self.schedule, len(results) // self.plan
        losses, wanted = plain(schedule, copies)
        seen = set()
        for replica, rank, found, parts, events in results:
            if schedule.stages - 1 in schedule.stages_of(rank):
                assert found == pytest.approx(losses[replica], rel=tolerance)
            for name, slices, value in parts:
                seen.add(name)
                assert tiny.close(torch.from_numpy(value), wanted[name][slices]) < tolerance, (self, name)
            done: list[tuple[str, int, int]] = []
            for one in actions(schedule)[rank]:
                if isinstance(one, Compute) and one.kind != "F":
                    # Of each layer, `up` and `down`; and the head, where it is used as other stages store it.
                    head = one.stage == schedule.stages - 1 and self.policy != "tp"
                    waiting = 2 * LAYERS // schedule.stages + head
                    done += [(one.kind, one.stage, one.micro_batch), *[DW] * (waiting if one.kind != "I" else 0)]
            assert events == done
        assert seen == set(wanted)


JOBS = {
    2: [
        Job(Schedule("zb-v", 2, 4, 4), 2, compiled=False),
        Job(Schedule("zb-v", 2, 4, 4), 2, compiled=True, recompute=("Layer",)),
        Job(Schedule("dualpipe-v", 2, 4, 5), 2, compiled=False, recompute=("Layer",)),
        Job(Schedule("dualpipe-v", 2, 4, 5), 2, compiled=True),
    ],
    4: [
        Job(Schedule("dualpipe-v", 4, 8, 8), 4, compiled=False, recompute=("Layer",)),
        Job(Schedule("zb-v", 2, 4, 4), 2, compiled=True),  # two copies of the model
        Job(Schedule("zb-v", 2, 4, 4), 4, compiled=False, policy="tp"),
    ],
}


@pytest.mark.parametrize("world", JOBS)
def test_gradients_of_a_split_backward(world, tmp_path):
    directories: list[tuple[Path, bool]] = []
    for number, job in enumerate(JOBS[world]):
        (folder := tmp_path / str(number)).mkdir()
        plan = json.loads(((code := job.compile(folder, world)) / "plan.json").read_text())
        splits = [stage["splits"] for stage in plan["stages"]]
        assert plan["pipeline"]["splits"] == splits == [True] * job.schedule.stages
        directories.append((code, job.compiled))
    results = run(world, gradients, directories)
    for number, job in enumerate(JOBS[world]):
        job.check([rank[number] for rank in results])
