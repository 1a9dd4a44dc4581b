"""What crosses between stages on unequal numbers of devices, which are threads; and what is sent, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nnscaler.mesh import PipelineMesh
from nnscaler.placement import parse_placements
from nnscaler.runtime import border as module
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.border import border
from nnscaler.shards import Box, Part, boxes_of_copy, parts
from tests import threads
from tests.threads import Ranks

HALVES = {0: Box((0, 0), (2, 6)), 1: Box((2, 0), (2, 6))}
WHOLE = Box((0, 0), (4, 6))


def test_each_device_is_sent_what_it_is_to_have():
    assert parts(HALVES, {2: WHOLE}) == [Part(0, 2, HALVES[0]), Part(1, 2, HALVES[1])]
    thirds = {rank: Box((0, 2 * column), (4, 2)) for column, rank in enumerate((2, 3, 4))}
    assert parts(HALVES, thirds) == [
        Part(sender, receiver, Box((2 * sender, 2 * (receiver - 2)), (2, 2)))
        for receiver in (2, 3, 4) for sender in (0, 1)
    ]  # fmt: skip
    assert parts({5: WHOLE}, HALVES) == [Part(5, 0, HALVES[0]), Part(5, 1, HALVES[1])]


def test_those_that_have_the_same_take_turns_to_send_it():
    assert parts({0: WHOLE, 1: WHOLE}, {2: WHOLE, 3: WHOLE, 4: WHOLE}) == [
        Part(0, 2, WHOLE), Part(1, 3, WHOLE), Part(0, 4, WHOLE)
    ]  # fmt: skip
    assert parts({0: Box((), ())}, {1: Box((), ())}) == [Part(0, 1, Box((), ()))], "a number"


CASES = [
    ([(2,), (1,)], 1, "S(0)", "R"),
    ([(1,), (2,)], 2, "R", "S(1)"),
    ([(2,), (1,)], 1, "R", "R"),
    ([(4,), (2,)], 1, "S(1)", "S(1)"),
    ([(4,), (2,)], 2, "S(0)", "S(1)"),
    ([(2, 2), (3,)], 1, "S(0),S(1)", "S(1)"),
    ([(2, 2), (2, 2)], 1, "S(1),R", "R,S(0)"),
]


@pytest.mark.parametrize(("sizes", "copies", "sent", "received"), CASES, ids=str)
def test_tensors_and_gradients_cross(sizes, copies, sent, received, monkeypatch):
    """Each device has its box of what the others had: two tensors, of which one needs no gradient, and gradients."""
    dist = SimpleNamespace(
        P2POp=lambda op, tensor, peer, group: threads.P2POp(op, tensor, group, peer), isend="isend", irecv="irecv"
    )
    monkeypatch.setattr(module, "dist", dist)
    mesh = PipelineMesh.of(sizes, copies)
    shape = (8, 12)
    crossing = [
        {"whole": list(shape), "sent": sent, "received": received, "gradient": True},
        {"whole": [3], "sent": ",".join("R" * len(sizes[0])), "received": ",".join("R" * len(sizes[1])),
         "gradient": False},
    ]  # fmt: skip

    def value(copy: int, back: bool) -> Tensor:
        return torch.arange(96.0).view(shape) + 1000 * copy + 500 * back

    def run(axis: Axis) -> int:
        side = mesh.rank_of(axis.rank)
        own = mesh.ranks[side]
        copy, _ = own.coordinates(axis.rank)
        axes = SimpleNamespace(rank=axis.rank, replica=copy, crossing=axis.group, device=torch.device("cpu"))
        made = border(crossing, *mesh.ranks, axes)
        layout = parse_placements((sent, received)[side])
        box = boxes_of_copy(shape, layout, own, copy)[axis.rank]
        number = torch.full((3,), float(copy))
        operations = {}
        for back, way in ((False, made.there), (True, made.back)):
            mine = value(copy, back)[box.slices]
            if side == back:
                sends = way.send([mine, None if back else number])
                operations[back] = sends
                for message in threads.batch_isend_irecv(sends):
                    message.wait()
            else:
                buffer, count = torch.full(box.sizes, -1.0).requires_grad_(not back), torch.full((3,), -1.0)
                coming = way.receive([buffer, None if back else count])
                operations[back] = coming.operations
                for message in threads.batch_isend_irecv(coming.operations):
                    message.wait()
                coming.put()
                assert torch.equal(buffer.detach(), mine)
                assert back or torch.equal(count, number)
        peers = [{one.group_peer for one in operations[back]} for back in (False, True)]
        assert peers[0] == peers[1], "who sends to another also gets something from it"
        return len(peers[0])

    found = Ranks(mesh.runtime_ngpus).run(run)
    assert all(found), "each device takes part"
