"""What a trainer judges before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nnscaler.checkpoint import resume
from nnscaler.cli import trainer
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError

ARGS = TrainerArgs(
    name="llama", model=ModelConfig(make=nn.Identity, weights=Path("own"), weight_prefix="model.", vocabulary=7),
    compute=ComputeConfig(), dataset=DatasetConfig(sequence_length=8), precision="fp32", micro_batch_size=3, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("resumed", [None, Path("another")])
def test_the_weights_that_will_be_loaded_are_judged(monkeypatch, resumed):
    judged = []
    monkeypatch.setattr(trainer.WeightFiles, "find", lambda folder: folder if folder.name != "empty" else None)
    monkeypatch.setattr(trainer, "check_weights", lambda *given: judged.append(given))
    args, model = replace(ARGS, checkpoint=CheckpointConfig(resume=resumed)), nn.Identity()
    Trainer(args)._check_weights([], model)
    assert judged == [(resumed or Path("own"), model, "model.")]
    Trainer(replace(args, checkpoint=CheckpointConfig(resume=Path("empty"))))._check_weights([], model)
    assert len(judged) == 1


def test_a_checkpoint_is_judged_in_place_of_weights(monkeypatch, tmp_path):
    judged = []
    monkeypatch.setattr(resume, "check_fits", lambda *given: judged.append(given))
    monkeypatch.setattr(trainer, "check_weights", lambda *given: pytest.fail("it is not loaded"))
    (tmp_path / "merged.ckpt").write_text("")
    model = nn.Identity()
    Trainer(ARGS)._check_weights([tmp_path / "merged.ckpt", Path("older")], model)
    Trainer(replace(ARGS, model=replace(ARGS.model, name="org/Llama")))._check_weights(
        [tmp_path / "merged.ckpt"], model
    )
    assert judged == [(tmp_path / "merged.ckpt", model, name, "model.") for name in ("Identity", "org/Llama")]

    def damaged(*given: object) -> None:
        raise trainer.CorruptCheckpoint("damaged")

    monkeypatch.setattr(resume, "check_fits", damaged)
    Trainer(ARGS)._check_weights([tmp_path / "merged.ckpt"], model)  # loading meets it again, and takes the next


def test_what_is_compiled(monkeypatch):
    dataset = DatasetConfig(sequence_length=8, document_mask=True, document_length=4)
    args = replace(ARGS, dataset=dataset, command="train.py --a 1", model=replace(ARGS.model, name="org/Llama"))
    source = Trainer(args)._source()
    assert (source.dtype, source.seed, source.tokens, source.length) == (torch.float32, 5, 24, 8)
    assert (source.name, source.command, source.document_length) == ("org/Llama", "train.py --a 1", 4)
    assert {tuple(one.shape)[:2] for one in source.inputs.values()} == {(3, 8)}
    assert all(one.is_meta for one in source.inputs.values())
    plain = Trainer(ARGS)._source()
    assert set(source.inputs) > set(plain.inputs) == {"input_ids", "labels"}
    executed = replace(ARGS, compute=ComputeConfig(trace_strategy="cpu"))
    ids = Trainer(executed)._source().inputs["input_ids"]
    assert torch.equal(ids, torch.randint(7, (3, 8), generator=torch.Generator().manual_seed(5)))
    with pytest.raises(UserError, match=r"ModelConfig\.vocabulary is not given; trace strategies that execute need it"):
        Trainer(replace(executed, model=replace(ARGS.model, vocabulary=None)))._source()
    assert Trainer(ARGS).gen_folder == Path(".nnscaler/llama")
    with pytest.raises(UserError, match="training needs a dataset_path"):
        Trainer(ARGS)._dataset()
