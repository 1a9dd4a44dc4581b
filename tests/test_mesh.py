"""Meshes: who is where, who is whose neighbour, and which are tried."""

from __future__ import annotations

import pytest

from nnscaler.mesh import Mesh, PipelineMesh, meshes


def test_ranks_count_the_last_axis_first_then_copies_then_pipeline_ranks():
    mesh = Mesh((2, 4), replicas=2)
    assert (mesh.plan_ngpus, mesh.runtime_ngpus, mesh.ngpus_with_loss) == (8, 16, 8)
    assert mesh.coordinates(13) == (1, (1, 1))
    assert [mesh.coordinates(rank) for rank in (1, 6, 8)] == [(0, (0, 1)), (0, (1, 2)), (1, (0, 0))]
    assert mesh.of_copy(1) == list(range(8, 16))
    whole = PipelineMesh.of([(2, 4)] * 3, 2)
    assert (whole.plan_ngpus, whole.runtime_ngpus, whole.replicas, whole.ngpus_with_loss) == (24, 48, 2, 8)
    assert [one.first for one in whole.ranks] == [0, 16, 32]
    assert whole.ranks[2].coordinates(13 + 2 * 16) == (1, (1, 1))
    assert [whole.rank_of(rank) for rank in (0, 15, 16, 47)] == [0, 0, 1, 2]


def test_ranks_of_a_pipeline_may_have_devices_in_unequal_numbers():
    whole = PipelineMesh.of([(4,), (1,), (2,)], 2)
    assert [one.first for one in whole.ranks] == [0, 8, 10]
    assert (whole.plan_ngpus, whole.runtime_ngpus, whole.ngpus_with_loss) == (7, 14, 2)
    assert [whole.rank_of(rank) for rank in range(14)] == [0] * 8 + [1] * 2 + [2] * 4
    assert whole.ranks[2].of_copy(1) == [12, 13]
    assert not whole.is_even
    assert PipelineMesh.of([(4,)] * 2, 2).is_even
    assert not PipelineMesh.of([(4,), (2, 2)], 2).is_even
    assert (Mesh((2, 4)).names, Mesh((8,)).names, Mesh((2, 2, 2)).names) == (
        ("outer", "inner"), ("devices",), ("axis0", "axis1", "axis2")
    )  # fmt: skip


def test_groups_along_axes_and_over_copies():
    mesh = Mesh((2, 3), replicas=2, first=100)
    assert list(mesh.groups((0,))) == [[100, 103], [101, 104], [102, 105], [106, 109], [107, 110], [108, 111]]
    assert list(mesh.groups((1,))) == [[100, 101, 102], [103, 104, 105], [106, 107, 108], [109, 110, 111]]
    assert list(mesh.groups((0, 1)))[1] == [106, 107, 108, 109, 110, 111]
    assert list(mesh.groups((), copies=True))[5] == [105, 111]
    assert list(mesh.groups((1,), copies=True)) == [[100, 101, 102, 106, 107, 108], [103, 104, 105, 109, 110, 111]]


@pytest.mark.parametrize(
    ("per_node", "mesh", "axes", "copies", "fewest"),
    [
        (8, Mesh((2, 4)), (0,), False, 2),
        (8, Mesh((2, 4)), (1,), False, 4),
        (4, Mesh((2, 4)), (0,), False, 1),
        (4, Mesh((2, 4)), (1,), False, 4),
        (2, Mesh((2, 4)), (1,), False, 2),
        (7, Mesh((2, 4)), (1,), False, 1),  # three of 4..7 on the first node
        (4, Mesh((2, 4)), (0, 1), False, 4),
        (8, Mesh((8,), 4), (), True, 1),  # where each device has a shard of its own, copies are a node apart
        (8, Mesh((8,), 4), (0,), True, 8),
        (4, Mesh((2, 4), 2), (0,), True, 1),
        (8, Mesh((12,)), (0,), False, 4),
        (3, Mesh((2,), first=0), (0,), False, 2),
        (3, Mesh((2,), first=2), (0,), False, 1),
        (3, Mesh((2,), first=4), (0,), False, 2),
    ],
)
def test_the_fewest_devices_of_a_group_on_a_node(per_node, mesh, axes, copies, fewest):
    assert mesh.on_a_node(per_node, axes, copies) == fewest


def test_gradients_are_summed_over_micro_batches_and_devices():
    assert not Mesh((1,)).sums_gradients(1)
    assert Mesh((1,)).sums_gradients(2)
    assert Mesh((2,)).sums_gradients(1)
    assert Mesh((1,), 2).sums_gradients(1)


@pytest.mark.parametrize(
    ("devices", "per_node", "sizes"),
    [
        (1, 8, [(1,)]),
        (2, 8, [(2,)]),
        (8, 8, [(8,), (4, 2), (2, 4)]),
        (6, 8, [(6,), (3, 2), (2, 3)]),
        (6, 4, [(6,), (3, 2)]),  # threes would lie across the border of a node
        (16, 4, [(16,), (8, 2), (4, 4)]),
        (16, 1, [(16,)]),
    ],
)
def test_of_two_axes_the_second_stays_inside_a_node(devices, per_node, sizes):
    assert meshes(devices, 3, per_node) == [Mesh(each, 3) for each in sizes]


def test_a_mesh_in_words():
    assert str(Mesh((1,))) == "1 copy x 1 device"
    assert str(PipelineMesh.of([(2,)] * 2, 1)) == "1 copy x 2 pipeline ranks x 2 devices"
    assert str(PipelineMesh.of([(2, 4)] * 3, 2)) == "2 copies x 3 pipeline ranks x 2 outer x 4 inner"
    assert str(PipelineMesh.of([(2,), (1,)], 2)) == "2 copies x 2 pipeline ranks x 2 + 1 devices"
    assert Mesh((2, 4), 2).to_json() == {"sizes": [2, 4], "names": ["outer", "inner"], "replicas": 2}
