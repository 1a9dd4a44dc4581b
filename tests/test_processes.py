"""How long a run's processes wait for each other."""

from __future__ import annotations

from datetime import timedelta
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from nnscaler import processes
from nnscaler.errors import UserError
from nnscaler.watch import Watch
from tests.launch import run


def patience_and_timeouts(folder: str, seconds: float) -> tuple[float, list[float]]:
    store = dist.FileStore(f"{folder}/watch", 1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/group", 1), rank=0, world_size=1)
    groups = [dist.group.WORLD, dist.new_group([0], timeout=timedelta(minutes=1))]
    watch = Watch(store, 0, 1, timedelta(minutes=5))
    processes.wait_for_steps_of(seconds, watch)
    watch.close()
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return watch.patience, [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize(("seconds", "patience"), [(1.0, 300.0), (1000.0, 3000.0)])
def test_processes_wait_as_long_as_a_step_asks_for(tmp_path, seconds, patience):
    """Five minutes and ten, or three predicted steps and six: in every group."""
    ((found, timeouts),) = run(1, patience_and_timeouts, str(tmp_path), seconds, init=False)
    assert found == patience
    assert timeouts == [2 * patience, 2 * patience]


def wrong() -> NoReturn:
    raise UserError(f"rank {dist.get_rank()} found the dataset empty")


def what_is_raised() -> str:
    try:
        processes.from_rank_0(wrong, torch.device("cpu"))
    except UserError as error:
        return str(error)


def test_what_rank_0_finds_wrong_every_rank_raises():
    """A rank that only exited would have torchrun end the others, rank 0 perhaps before it has said why."""
    assert run(2, what_is_raised) == ["rank 0 found the dataset empty"] * 2
