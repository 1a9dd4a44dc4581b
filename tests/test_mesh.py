"""Meshes: who is where, who is whose neighbour, and which are tried."""

from __future__ import annotations

import pytest

from nnscaler.mesh import Mesh, meshes


def test_ranks_count_the_last_axis_first_then_copies_then_pipeline_ranks():
    mesh = Mesh((2, 4), replicas=2, pipeline=3)
    assert (mesh.plan_ngpus, mesh.runtime_ngpus) == (24, 48)
    assert mesh.coordinates(13) == (1, (1, 1))
    assert [mesh.coordinates(rank) for rank in (1, 6, 8, 20)] == [(0, (0, 1)), (0, (1, 2)), (1, (0, 0)), (0, (1, 0))]
    assert mesh.coordinates(13 + 2 * 16) == (1, (1, 1))
    assert [mesh.pipeline_rank(rank) for rank in (0, 15, 16, 47)] == [0, 0, 1, 2]
    assert [mesh.stride(axis) for axis in mesh.axes] == [4, 1]
    assert (mesh.names, Mesh((8,)).names, Mesh((2, 2, 2)).names) == (
        ("outer", "inner"), ("devices",), ("axis0", "axis1", "axis2")
    )  # fmt: skip


@pytest.mark.parametrize(("per_node", "spans"), [(8, (False, False)), (7, (True, False)), (4, (True, False)),
                                                 (3, (True, True))])  # fmt: skip
def test_a_group_spans_nodes_where_its_ends_are_farther_apart_than_a_node(per_node, spans):
    assert tuple(Mesh((2, 4)).spans_nodes(per_node, axis) for axis in (0, 1)) == spans


def test_gradients_are_summed_over_micro_batches_and_devices_but_not_over_stages():
    assert not Mesh((1,)).sums_gradients(1)
    assert Mesh((1,)).sums_gradients(2)
    assert Mesh((2,)).sums_gradients(1)
    assert Mesh((1,), 2).sums_gradients(1)
    assert not Mesh((1,), 1, 4).sums_gradients(1)


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
    assert str(Mesh((2,), 1, 2)) == "1 copy x 2 pipeline ranks x 2 devices"
    assert str(Mesh((2, 4), 2, 3)) == "2 copies x 3 pipeline ranks x 2 outer x 4 inner"
    assert Mesh((2, 4), 2).to_json() == {"sizes": [2, 4], "names": ["outer", "inner"], "replicas": 2}
