"""A profile on a GPU: the marks are found around the counted step, and nothing outside of it counts."""

from __future__ import annotations

import json

import pytest
import torch

from nnscaler.profiler.steps import LEAST, StepProfiler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_one_step_is_counted(tmp_path):
    """The last, of three products, and none of the six of those before it."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with StepProfiler(tmp_path, {"matmul": 1.0}) as profiler:
        for step in range(1, LEAST + 1):
            for _ in range(3 if step == LEAST else 6):
                x @ x
            profiler.step()
    counted = json.loads((tmp_path / "profile.json").read_text())["milliseconds"]
    times, name = (tmp_path / "profile.txt").read_text().partition("kernel\n")[2].split()[1:3]
    assert times == "3"
    assert "gemm" in name or "nvjet" in name
    assert 0 < counted["matmul"] <= counted["whole"]
