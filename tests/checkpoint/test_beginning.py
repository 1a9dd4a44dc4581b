"""What a resume path means, what is fallen back to, and which models a checkpoint fits."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nnscaler import UserError
from nnscaler.checkpoint import resume
from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint, whole_file
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.resume import check_fits, find_resumable
from tests.checkpoint.jobs import publish_one


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Checkpoints of one run, of which the second is the best."""
    return [publish_one(tmp_path / "run", step, loss) for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0))]


def test_a_folder_stands_for_what_was_saved_there_the_newest_first(three: list[Path]) -> None:
    first, second, third = three
    run = first.parent
    other = publish_one(run.parent / "other" / "deeper", 4, 1.0)
    for path, wanted in (
        (run, [third, second, first]), (run.parent, [other, third, second, first]), (second, [second, first]),
        (first, [first]), (run / "last", [third, second, first]), (run / "best", [second, first]),
    ):  # fmt: skip
        assert find_resumable(path) == wanted, path
    alone = run.parent / "copied"
    shutil.copytree(second, alone / "a checkpoint")
    assert find_resumable(alone / "a checkpoint") == [alone / "a checkpoint"], "whatever its name is"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^resume_path is '.*nowhere', which does not exist$"):
        find_resumable(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is not a merged checkpoint"):
        find_resumable(tmp_path / "file")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(UserError, match=rf"^'{model}' holds no complete checkpoint$"):
            find_resumable(model)
        save_file({"w": torch.ones(2)}, model / name) if name != "config.json" else (model / name).write_text("{}")
    assert find_resumable(model) == [model], "a model's own weights"
    (model / "config.json").unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_resumable(model)
    (model / "config.json").write_text("{}")
    saved = publish_one(model / "run", 1, 1.0)
    assert find_resumable(model) == [saved], "what was trained comes before what it began from"


def test_what_is_damaged_is_left_out_and_named_where_it_would_have_come_first(three: list[Path], caplog: Any) -> None:
    first, second, third = three
    with caplog.at_level(logging.WARNING):
        for damaged, left in ((first, [third, second]), (third, [second]), (second, None)):
            (damaged / "checksums").unlink()
            caplog.clear()
            if left is not None:
                assert find_resumable(first.parent) == left
            else:
                with pytest.raises(CorruptCheckpoint, match=f"{third}' is incomplete"):
                    find_resumable(first.parent)
            said = [record.getMessage() for record in caplog.records]
            assert len(said) == {first: 0, third: 1, second: 3}[damaged]
            if damaged is third:
                assert said[0].startswith(f"checkpoint '{third}' is incomplete: ")
                assert said[0].endswith("; falling back to the newest complete checkpoint before it")


def test_where_the_first_is_damaged_inside_the_next_is_loaded(monkeypatch: Any, caplog: Any) -> None:
    """Shards are checked when they are read."""
    tried = []

    def load(path: Path, *given: object) -> Any:
        tried.append((path, given))
        if path.name in broken:
            raise CorruptCheckpoint(f"{path} is broken")
        return f"state of {path}"

    monkeypatch.setattr(resume, "_load", load)
    paths, given = [Path(name) for name in "abc"], ("module", "optimizer", ["fixed"], "weights")
    for broken, found in (("", "a"), ("a", "b"), ("ab", "c")):
        tried.clear()
        caplog.clear()
        assert resume.resume(paths, *given) == (Path(found), f"state of {found}")
        assert tried == [(path, given) for path in paths[: len(broken) + 1]]
        assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
            f"{x} is broken" for x in broken
        ]
    broken = "abc"
    caplog.clear()
    with pytest.raises(CorruptCheckpoint, match=r"^a is broken$"):
        resume.resume(paths, *given)
    assert len(caplog.records) == 2, "behind the last one there is none to fall back to"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.zeros(4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""), ({"model.table": None}, ""),  # buffers may be missing
        ({"model.first.weight": None}, r"model 'Net': first\.weight is missing, and the model's has shape \[2, 3\]"),
        ({"model.first.weight": [3, 2]}, r"model 'Net': first\.weight has shape \[3, 2\], and the model's has"),
        ({"model.third.weight": [1]}, r"model 'Net': it holds third\.weight, which the model does not have"),
    ],
)  # fmt: skip
def test_a_model_has_what_is_loaded_into_it(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved = publish_one(tmp_path, 1, 1.0)
    shapes = {"model.first.weight": [2, 3], "model.table": [4], **changes}
    parameters = {name: {"shape": shape, "dtype": "float32"} for name, shape in shapes.items() if shape is not None}
    tied = {"model.second.weight": "model.first.weight"}
    dataclasses.replace(TrainerState.read(saved), parameters=parameters, tied=tied, prefix="model.").write(saved)
    Checksums(saved, [whole_file(saved, saved / "trainer.json")]).write()
    model = nn.Module()
    with torch.device("meta"):
        model.model = Net()
    model.model.second.weight = nn.Parameter(torch.empty(2, 3, device="meta"))  # which another name stands for there
    if not said:
        check_fits(saved, model, "Net", "model.")
        return
    with pytest.raises(UserError, match=f"^checkpoint '{saved}' does not fit {said}"):
        check_fits(saved, model, "Net", "model.")
