"""How even the loads of experts are is told of the samples of all devices together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nnscaler.kernels import counting, note_choice
from nnscaler.mesh import Mesh
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.loads import ExpertLoads
from tests.launch import run

CHOSEN = [torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]]), torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])]
EXPERTS = 4
# Eight choices of four experts: the first has four where two are its share, and one has none; then all have two.
WANTED = {"experts/busiest": pytest.approx((2 + 1) / 2), "experts/idle": pytest.approx((1 / 4 + 0) / 2)}


def loads(mesh: Mesh) -> list[dict[str, float]]:
    """Three reports: of two calls, of none, and of the same two again."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loads = ExpertLoads(Axes(mesh, torch.device("cpu")))
    note_choice(CHOSEN[0], EXPERTS)  # outside, which does not count
    reports = []
    for calls in (CHOSEN, [], CHOSEN):
        with loads.counted():
            for chosen in calls:
                note_choice(chosen.chunk(world)[rank], EXPERTS)
        reports.append(loads.report()())
    assert counting.get() is None
    return reports


def test_one_process():
    assert loads(Mesh((1,), 1)) == [WANTED, {}, WANTED]


@pytest.mark.parametrize("mesh", [Mesh((2,), 1), Mesh((1,), 2), Mesh((2,), 2)], ids=["split", "copies", "both"])
def test_devices_and_copies(mesh):
    for reports in run(mesh.runtime_ngpus, loads, mesh):
        assert reports == [WANTED, {}, WANTED]
