"""What is saved in some boxes is loaded into others, in one process; and seen from outside it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnscaler import UserError
from nnscaler.checkpoint import sharded
from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint, Piece, whole_file
from nnscaler.checkpoint.folder import TrainerState, publish
from nnscaler.checkpoint.sharded import Part, load_parts, save_parts, whole
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.shards import Box

FULL = torch.arange(60.0).view(6, 10)


def part(box: Box, name: str = "model.x") -> Part:
    return Part(name, (6, 10), box, torch.zeros(box.sizes))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A matrix in three boxes, each of which is written in pieces of four elements at most; numbers, and a flag."""
    monkeypatch.setattr(sharded, "PIECE_ELEMENTS", 4)
    work = tmp_path / ".step_00000001.writing"
    boxes = [Box((0, 0), (6, 3)), Box((0, 3), (2, 7)), Box((2, 3), (4, 7))]
    parts = [Part("model.x", (6, 10), box, FULL[box.slices].clone()) for box in boxes]
    parts += [whole("model.count", torch.tensor([7, 8, 2**30 + 1])), whole("model.open", torch.tensor(True))]

    def complete(pieces: list[Piece]) -> None:
        others = [work / "trainer.json", work / ".metadata"]
        state.write(work)
        Checksums(work, [*pieces, *(whole_file(work, path) for path in others)]).write()

    state = TrainerState(1, 1, 0, 1, {}, None, "run", "model", 1, {}, {}, "", 0.0)
    save_parts(work, parts, complete)
    return publish(work, state)


def test_other_boxes_are_filled_from_all_that_they_overlap(saved: Path) -> None:
    """Also such as lie across several, have one element, or are there twice; numbers keep their types."""
    boxes = [Box((0, 0), (3, 10)), Box((1, 2), (4, 5)), Box((5, 9), (1, 1)), Box((1, 2), (4, 5))]
    parts = [part(box) for box in boxes]
    others = [whole("model.count", torch.zeros(3, dtype=torch.int64)), whole("model.open", torch.tensor(False))]
    load_parts(saved, [*parts, *others])
    for one in parts:
        assert torch.equal(one.tensor, FULL[one.box.slices]), one.box
    assert others[0].tensor.tolist() == [7, 8, 2**30 + 1]
    assert others[1].tensor.item() is True


def test_what_does_not_fit_is_named_and_nothing_else_is_read(saved: Path) -> None:
    good = part(Box((0, 0), (6, 10)))
    for bad, said in (
        (part(Box((0, 0), (6, 10)), "model.y"), "the checkpoint has no tensor 'model.y'"),
        (whole("model.count", torch.zeros(4)), r"the checkpoint's 'model.count' has shape \[3\], the model's \[4\]"),
    ):
        with pytest.raises(UserError, match=said):
            load_parts(saved, [good, bad])
    assert not good.tensor.any()


def test_from_outside_tensors_are_whole(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    assert checkpoint.shapes() == {"model.count": (3,), "model.open": (), "model.x": (6, 10)}
    assert len(checkpoint.entries["model.x"].chunks) > 15, "in pieces"
    assert torch.equal(checkpoint.read("model.x", (6, 10)), FULL)
    assert checkpoint.read("model.count", (3,)).dtype == torch.int64
    assert checkpoint.read("model.count", (3,)).tolist() == [7, 8, 2**30 + 1]
    assert checkpoint.stored_dtype("model.open") == torch.bool


def test_a_piece_that_has_changed_is_found_by_who_reads_it(saved: Path) -> None:
    checksums = Checksums.read(saved)
    (piece,) = (one for one in checksums.pieces.values() if one.tensor == "model.x[5, 0]")
    content = bytearray((saved / piece.file).read_bytes())
    content[piece.begin + piece.length // 2] ^= 1
    (saved / piece.file).write_bytes(content)
    load_parts(saved, [above := part(Box((0, 3), (6, 7)))])
    assert torch.equal(above.tensor, FULL[:, 3:]), "what is whole is read"
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'model\.x\[5, 0\]' has changed"):
        load_parts(saved, [part(Box((5, 0), (1, 2)))])
