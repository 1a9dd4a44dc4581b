"""Nothing that is loaded can run code, whoever wrote it: checksums are right in all of these."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import WriteItemType

from nnscaler import UserError
from nnscaler.checkpoint.checksums import CHECKSUMS, Checksums, CorruptCheckpoint, Piece, file_crc, whole_file
from nnscaler.checkpoint.folder import TRAINER, TrainerState
from nnscaler.checkpoint.merge import MergedFile
from nnscaler.checkpoint.sharded import load_parts, whole
from nnscaler.checkpoint.storage import INDEX, _IndexUnpickler
from nnscaler.checkpoint.stored import Checkpoint, describe_all
from tests.checkpoint.test_merging import write_checkpoint


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def saved(tmp_path):
    return write_checkpoint(tmp_path / "run", 4, 4, 1)


def forge(saved: Path, name: str, content: bytes) -> None:
    """Puts other content into a file, and its right checksum into the list."""
    (saved / name).write_bytes(content)
    others = [piece for piece in Checksums.read(saved).pieces.values() if piece.file != name]
    Checksums(saved, [*others, whole_file(saved, saved / name)]).write()


def assert_not_loaded(saved: Path, pattern: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=pattern):
        Checkpoint.open(saved)
    # As torch wraps it, or goes on without what could not be read (2.11).
    with pytest.raises((CorruptCheckpoint, AssertionError), match=f"{pattern}|metadata is None"):
        load_parts(saved, [whole("model.layer0", torch.empty(4, 4))])


def test_an_index_of_python_3_11_0_is_loaded():
    """Debian's python3 writes a member of an enumeration as a call of getattr; no other attribute is given."""
    kinds = WriteItemType, _MEM_FORMAT_ENCODING

    def loaded(*arguments):
        return _IndexUnpickler(io.BytesIO(pickle.dumps(Call(getattr, *arguments)))).load()

    assert loaded(kinds[1], "TORCH_CHANNELS_LAST") is kinds[1].TORCH_CHANNELS_LAST
    for arguments in ((kinds[1], "__class__"), (kinds[1], "mro"), (torch.Size, "numel"), (kinds[0], "TENSOR")):
        with pytest.raises(pickle.UnpicklingError, match="which no index does"):
            loaded(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch ran",)), (builtins.exec, ("open('ran', 'w')",)), (getattr, (1, "real")),
     (torch.load, ("ran",)), (torch.hub.load, ("a", "b")), (pickle.loads, (b"",))],
)  # fmt: skip
def test_an_index_that_calls_is_not_loaded(saved, tmp_path, monkeypatch, function, arguments):
    monkeypatch.chdir(tmp_path)
    forge(saved, INDEX, pickle.dumps({"state_dict_metadata": Call(function, *arguments)}))
    assert_not_loaded(saved, r"file '\.metadata': it names .*, which no index does")
    assert list(describe_all(saved.parent))
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(None), pickle.dumps({"storage_data": {}})])
def test_an_index_of_something_else_is_named(saved, content):
    forge(saved, INDEX, content)
    assert_not_loaded(saved, r"file '\.metadata'")


def test_a_tensor_that_calls_is_not_loaded(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checksums = Checksums.read(saved)
    piece = next(piece for piece in checksums.pieces.values() if piece.tensor.startswith("model.layer0"))
    path = saved / piece.file
    content, start = bytearray(path.read_bytes()), path.stat().st_size
    torch.save(Call(os.system, "touch ran"), tmp_path / "forged")
    forged = (tmp_path / "forged").read_bytes()[: piece.length].ljust(piece.length, b"\0")
    content[piece.begin : piece.begin + piece.length] = forged
    path.write_bytes(content)
    crc = file_crc(path, piece.begin, piece.length)
    checksums.pieces[piece.file, piece.begin] = Piece(crc, piece.begin, piece.length, piece.file, piece.tensor)
    checksums.write()
    assert path.stat().st_size == start
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        Checkpoint.open(saved).read("model.layer0", (4, 4))
    assert not Path("ran").exists()


def test_a_merged_file_that_calls_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Call(os.system, "touch ran")}, tmp_path / "merged.ckpt")
    with pytest.raises(UserError, match="is not a merged checkpoint"):
        MergedFile.open(tmp_path / "merged.ckpt")
    assert not Path("ran").exists()


def test_no_file_outside_is_read(saved):
    for name in ("/etc/hostname", "../../secret"):
        Checksums(saved, [Piece(0, 0, 1, name)]).write()
        with pytest.raises(CorruptCheckpoint, match="outside of its folder"):
            Checksums.read(saved)


def test_a_state_of_something_else_is_named(saved):
    for content in (b"[]", b"{}", b'{"step": 1}', b"{"):
        forge(saved, TRAINER, content)
        with pytest.raises(CorruptCheckpoint, match=TRAINER):
            TrainerState.read(saved)
    assert (saved / CHECKSUMS).exists()
