"""A simulated step takes as long as a real one: torch's run time, real processes, stages that sleep."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nnscaler.pipeline.simulate import StageSeconds, simulate
from nnscaler.runtime.pipeline import PeerStage
from nnscaler.schedules import Schedule, actions, torch_schedule
from tests.launch import run

pytestmark = pytest.mark.quiet


class Sleep(torch.autograd.Function):
    """The same tensor, some time later; so is its gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient.clone(), None, None


class SleepingStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seconds = StageSeconds(0.0, 0.0, 0.0, 0.0)  # until it is told
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return Sleep.apply(x + 0 * self.weight, self.seconds.forward, self.seconds.inputs)

    def rest(self):
        return lambda: time.sleep(self.seconds.weights)


def stage_seconds(schedule: Schedule) -> list[StageSeconds]:
    """Unequal stages: some wait for others whatever the schedule."""
    part = 3 * schedule.ranks / schedule.stages  # so long that what processes take to wake up is little
    each = [(0.04 * part, (0.03 + 0.02 * (stage % 2)) * part, 0.03 * part) for stage in range(schedule.stages)]
    return [StageSeconds(forward, inputs + weights, inputs, weights) for forward, inputs, weights in each]


def measure(schedules: list[Schedule], predicted: list[float]) -> list[float]:
    """The time of a step of each schedule, in seconds on the slowest rank: the shortest of several, since whatever
    else the machine does makes steps longer. There are enough when one is not longer than predicted."""
    found = []
    for schedule, seconds in zip(schedules, predicted):
        modules = {index: SleepingStage() for index in schedule.stages_of(dist.get_rank())}
        stages = []
        for index, module in modules.items():
            received = torch.empty(4, 8, device="meta", requires_grad=index > 0)
            sent = torch.empty(4, 8, device="meta", requires_grad=True)
            stages.append(
                PeerStage(
                    module,
                    index,
                    schedule.stages,
                    torch.device("cpu"),
                    input_args=received,
                    output_args=sent,
                    dw_builder=module.rest,
                )
            )
        step = torch_schedule(schedule, stages, lambda output, target: output.sum())
        run_step(step, schedule)  # makes connections
        for index, module in modules.items():
            module.seconds = stage_seconds(schedule)[index]
        times = [run_step(step, schedule), run_step(step, schedule)]
        while len(times) < MOST and min(times) > (1 + NEAR) * seconds:
            times.append(run_step(step, schedule))
        found.append(min(times))
    return found


def run_step(step: Any, schedule: Schedule) -> float:
    """The seconds that a step takes on the slowest rank."""
    rows = torch.ones(4 * schedule.micro_batches, 8)
    inputs = (rows,) if 0 in schedule.stages_of(dist.get_rank()) else ()
    dist.barrier()
    begin = time.perf_counter()
    step.step(*inputs, target=rows, losses=[], return_outputs=False)
    took = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


NEAR = 0.05  # part of a step that processes may take to wake up
MOST = 30  # steps of a schedule
SCHEDULES = {
    2: [Schedule("1f1b", 2, 2, 4), Schedule("interleaved", 2, 4, 4), Schedule("dualpipe-v", 2, 4, 4)],
    4: [Schedule("1f1b", 4, 4, 4), Schedule("interleaved", 4, 8, 4), Schedule("zb-v", 4, 8, 4)],
}


@pytest.mark.parametrize("ranks", SCHEDULES)
def test_simulated_and_measured_steps_take_equally_long(ranks):
    predicted = [
        simulate(schedule, actions(schedule), stage_seconds(schedule), [0.0] * (schedule.stages - 1)).seconds
        for schedule in SCHEDULES[ranks]
    ]
    measured = run(ranks, measure, SCHEDULES[ranks], predicted)[0]
    assert measured == pytest.approx(predicted, rel=NEAR)
