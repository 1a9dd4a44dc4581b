"""Pipelines of two GPUs, in compiled regions: gradients of a backward in two parts are those of the plain model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nnscaler.schedules import Schedule
from tests.distributed.test_split_backward import Job, gradients
from tests.launch import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

JOBS = [
    Job(Schedule("zb-v", 2, 4, 4), 2, compiled=False),  # as tests on CPUs say it: a GPU compiles regions by itself
    Job(Schedule("zb-v", 2, 4, 6), 2, compiled=False, recompute=("Layer",)),
    Job(Schedule("dualpipe-v", 2, 4, 5), 2, compiled=False),
]


def on_gpus(jobs: list[tuple[Path, bool]]) -> list[Any]:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return gradients(jobs, device)


def test_gradients_of_a_split_backward_on_gpus(tmp_path):
    """A GPU adds in another order than a CPU: to 1e-5 rather than 1e-6."""
    directories: list[tuple[Path, bool]] = []
    for number, job in enumerate(JOBS):
        (folder := tmp_path / str(number)).mkdir()
        code = job.compile(folder, 2)
        assert json.loads((code / "plan.json").read_text())["pipeline"]["splits"] == [True] * job.schedule.stages
        directories.append((code, job.compiled))
    results = run(2, on_gpus, directories, init=False)
    for number, job in enumerate(JOBS):
        job.check([rank[number] for rank in results], tolerance=1e-5)
