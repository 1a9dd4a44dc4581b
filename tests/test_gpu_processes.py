"""A rank that fails while the others are in an exchange, on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# Both ranks have exchanged something. Rank 0 begins another exchange, which rank 1 does not join, and leaves.
RANK = """
import sys, time, torch, torch.distributed as dist
from nnscaler.processes import join_processes, leave_processes, own_device
device = own_device()
watch = join_processes(device)
numbers = torch.ones(2**20, device=device)
dist.all_reduce(numbers)
torch.cuda.synchronize()
if dist.get_rank() == 1:
    time.sleep(120)
dist.all_reduce(numbers, async_op=True)
watch.close()
leave_processes(failed=True)
print("left")
"""


def test_it_ends_though_the_others_do_not_join_it() -> None:
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29777", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        assert ranks[0].communicate(timeout=90)[0] == "left\n"
        assert ranks[0].returncode == 0
        assert ranks[1].poll() is None
    finally:
        for one in ranks:
            one.kill()
