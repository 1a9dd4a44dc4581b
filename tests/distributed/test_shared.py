"""Parameters that stages on unequal numbers of devices use: the owners in each stage add up what all stages have."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nnscaler.mesh import PipelineMesh
from nnscaler.runtime.shared import SharedUnevenly
from tests.launch import run

ELEMENTS = 10
# Devices of each rank, copies, which ranks use the parameter, and where its buckets begin on all but the first rank.
CASES = [
    ((2, 1, 1), 1, (True, True, True), (0,)),
    ((1, 3), 1, (True, True), (0, 7)),
    ((1, 2, 1), 1, (True, False, True), (0, 4)),
    ((1, 1), 2, (True, True), (0, 3)),
]


def add_up(sizes: tuple[int, ...], copies: int, uses: tuple[bool, ...], begins: tuple[int, ...]) -> list:
    """[(first element, what it and those after it are then)] of those that this rank owns."""
    mesh, rank = PipelineMesh.of([(size,) for size in sizes], copies), dist.get_rank()
    stage = mesh.rank_of(rank)
    own, gradient = mesh.ranks[stage], gradients(len(sizes))[stage]
    axes, buckets = SimpleNamespace(pipeline=SimpleNamespace(rank=stage), rank=rank), []
    for begin, end in pairwise([*(begins if stage else (0,)), ELEMENTS]):
        each = -(-(end - begin) // own.runtime_ngpus)  # a bucket is larger than what is in it: all own as much
        owned = range((rank - own.first) * each, (rank - own.first + 1) * each)
        there = torch.nn.functional.pad(gradient[begin:end], (0, each * own.runtime_ngpus))[owned.start : owned.stop]
        slot = SimpleNamespace(name="w", start=-begin, stop=end - begin)
        buckets.append(SimpleNamespace(slots=[slot], owned_range=owned, gradient=there.clone()))
    made = SharedUnevenly("w", buckets if uses[stage] else [], axes)
    made.add_gradients()
    return [(piece.start, tensor) for piece, tensor in made._mine]


def gradients(stages: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.rand(ELEMENTS, generator=draws) for _ in range(stages)]


def add_up_each(cases: list) -> list[list]:
    dist.all_reduce(torch.zeros(1))
    return [add_up(*case) for case in cases]


def test_every_owner_has_the_sum_over_all_stages():
    found = run(4, add_up_each, CASES)
    for case, (sizes, copies, uses, _) in enumerate(CASES):
        mesh = PipelineMesh.of([(size,) for size in sizes], copies)
        first, *others = [one for one, used in zip(gradients(len(sizes)), uses) if used]
        total = first.clone()
        for other in others:
            total += other
        for stage, used in enumerate(uses):
            ranks = range(mesh.ranks[stage].first, mesh.ranks[stage].first + mesh.ranks[stage].runtime_ngpus)
            pieces = sorted(((piece for rank in ranks for piece in found[rank][case])), key=lambda piece: piece[0])
            if used:
                assert torch.equal(torch.cat([tensor for _, tensor in pieces]), total), "to the last bit"
            else:
                assert pieces == []
