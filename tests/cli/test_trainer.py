"""What a trainer judges before it begins."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler.batch import Batch, Division
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
    Trainer(args)._check_weights([Path("of another model's weights")], model)
    assert judged == [(resumed or Path("own"), model, "model.")] * 2
    Trainer(replace(args, checkpoint=CheckpointConfig(resume=Path("empty"))))._check_weights([], model)
    assert len(judged) == 2


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

    monkeypatch.setattr(trainer, "is_checkpoint", lambda path: path == tmp_path / "step")
    judged.clear()
    Trainer(ARGS)._check_weights([tmp_path / "step", tmp_path / "merged.ckpt"], model)
    assert [given[0] for given in judged] == [tmp_path / "step"], "the best"

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
    assert all(one.is_meta and one.dtype == torch.int64 for one in source.inputs.values())
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


@pytest.mark.parametrize(
    ("precision", "dtype", "fp8"),
    [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("fp8", torch.bfloat16, True)],
)
def test_how_weights_are_held_and_products_computed(precision, dtype, fp8):
    keep = ("last",) if fp8 else ()
    less = {"--less": nn.Identity}
    args = replace(ARGS, precision=precision, fp8_keep_bf16=keep, model=replace(ARGS.model, instead=less))
    source = Trainer(args)._source()
    assert (source.dtype, source.fp8, source.fp8_keep_bf16, source.instead) == (dtype, fp8, keep, less)


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        (12, {}, []),
        (11, {}, ["a step takes 12 samples (2 copies, 2 micro-batches of 3), and the dataset has 11: it is not full"]),
        (11, {"max_train_steps": 5}, [
            "a step takes 12 samples (2 copies, 2 micro-batches of 3), and the dataset has 11: it takes some of them "
            "several times"
        ]),
        (11, {"global_batch_size": 12, "left_open": ("plan_ngpus", "micro_batch_size", "micro_batches")},
         ["a step takes 12 samples, and the dataset has 11: it is not full"]),
    ],
)  # fmt: skip
def test_a_step_that_takes_more_samples_than_there_are_is_said(rows, fields, said, monkeypatch, caplog):
    """All parts of a mixture are judged."""
    judged = []
    monkeypatch.setattr(Trainer, "_judge_ids", lambda self, part: judged.append(part))

    class Mixture(list):
        parts = ("first", "second")

    args = replace(ARGS, compute=ComputeConfig(2, 4, micro_batches=2), micro_batch_size=3, **fields)
    Trainer(args)._judge(Mixture(range(rows)))  # type: ignore[arg-type]
    assert caplog.messages == said
    assert judged == ["first", "second"]


@pytest.mark.parametrize(
    ("smallest", "largest", "known"), [(0, 6, True), (0, 7, False), (-1, 3, False), (5, 900, False)]
)
def test_ids_that_the_model_does_not_know_are_refused(smallest, largest, known):
    rows = SimpleNamespace(
        token_ids=lambda: (smallest, largest), place_outside=lambda vocabulary: f"beyond {vocabulary}", path="rows",
        marks=dict,
    )  # fmt: skip
    Trainer(replace(ARGS, model=replace(ARGS.model, vocabulary=None)))._judge_ids(rows)  # type: ignore[arg-type]
    said = (
        f"dataset 'rows' holds token ids from {smallest} to {largest}, and the model knows those from 0 to 6 "
        "(beyond 7); prepare it with the model's own tokenizer"
    )
    with nullcontext() if known else pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Trainer(ARGS)._judge_ids(rows)  # type: ignore[arg-type]


@pytest.fixture
def running(monkeypatch) -> list:
    """What a trainer asks others for, in order; each only writes it down."""
    asked: list = []

    @contextmanager
    def compiled(*given):
        asked.append(("compiled", *given))
        yield
        asked.append("it may be compiled anew")

    class Run:
        def __init__(self, *given: object) -> None:
            asked.append(("run", *given))

        def train(self) -> None:
            asked.append("trained")

    def where_to_begin(*given: object) -> tuple[list[Path], Path]:
        asked.append(("begin", *given))
        return [Path("newest"), Path("older")], Path("own folder")

    monkeypatch.setattr("nnscaler.loaded.compiled", compiled)
    monkeypatch.setattr("nnscaler.cli.loop.TrainingRun", Run)
    monkeypatch.setattr("nnscaler.checkpoint.resume.where_to_begin", where_to_begin)
    monkeypatch.setattr("nnscaler.checkpoint.owner.job", lambda: "job")
    monkeypatch.setattr(trainer, "compile_model", lambda *given: asked.append(("compile", *given)))
    monkeypatch.setattr(Trainer, "_source", lambda self: "source")
    monkeypatch.setattr(Trainer, "_dataset", lambda self: "rows")
    monkeypatch.setattr(Trainer, "_judge", lambda self, dataset: asked.append(("judged", dataset)))
    monkeypatch.setattr(Trainer, "_judge_ids", lambda self, dataset: asked.append(("judged ids", dataset)))
    monkeypatch.setattr(Trainer, "_check_weights", lambda self, *given: asked.append(("weights", *given)))
    return asked


def test_a_run_is_judged_then_compiled_then_loaded_and_trained(running):
    args = replace(ARGS, checkpoint=CheckpointConfig(directory=Path("kept"), resume=Path("from")))
    object.__setattr__(args, "evaluation", SimpleNamespace(dataset="validation"))
    one = Trainer(args)
    one.run()
    compiled = running.pop(3)
    assert compiled[:5] == ("compiled", "source", args.compute, Path(".nnscaler/llama"), torch.device("cpu"))
    compiled[5]("model")
    assert running.pop() == ("weights", [Path("newest"), Path("older")], "model")
    assert compiled[6] is None
    begin = [Path("newest"), Path("older")], Path("own folder")
    assert running == [
        ("judged", "rows"), ("judged ids", "validation"), ("begin", Path("kept"), Path("from"), ["job"]),
        ("run", one.args, Path(".nnscaler/llama"), torch.device("cpu"), "source", "rows", *begin, ["job"], None),
        "it may be compiled anew", "trained",
    ]  # fmt: skip


def test_a_batch_that_the_planner_divides_is_trained_as_it_did(running, monkeypatch):
    compute = ComputeConfig(1, 1)
    open_ = ("plan_ngpus", "micro_batch_size", "micro_batches")
    args = replace(ARGS, compute=compute, global_batch_size=8, left_open=open_)
    monkeypatch.setattr("nnscaler.loaded.division_in", lambda folder: Division(1, 2, 4))
    one = Trainer(args)
    batch = one.batch
    assert batch == Batch(8, 1)
    one.run()
    assert running[2][0] == "compiled"
    assert running[2][6] == batch
    assert running[3][:2] == ("run", one.args)
    assert (one.args.micro_batch_size, one.args.compute.micro_batches, one.args.batch) == (2, 4, None)
    alone = Trainer(replace(args, global_batch_size=1))
    assert alone.batch is None, "there is nothing to choose"
    assert (alone.args.micro_batch_size, alone.args.compute.micro_batches) == (1, 1)


def test_a_plan_is_compiled_by_one_process(running, monkeypatch):
    args = replace(ARGS, run_mode="compile", explain=True)
    Trainer(args).run()
    assert running == [("compile", "source", args.compute, Path(".nnscaler/llama"), True, None)]
    running.clear()
    level = logging.getLogger("nnscaler").level
    monkeypatch.setenv("RANK", "1")
    try:
        Trainer(args).run()
        assert running == []
        assert logging.getLogger("nnscaler").level == logging.ERROR, "one rank reports"
    finally:
        logging.getLogger("nnscaler").setLevel(level)


@pytest.mark.parametrize("ends", [None, "my rows", "others", "hangs", "memory"])
def test_ranks_are_told_what_one_of_them_ends_with(ends, running, monkeypatch):
    """And what another has ended with is what this one ends with, in whatever it waited for it."""
    failed = [UserError("the rows of rank 1 are wrong")] if ends == "others" else []
    watch = SimpleNamespace(
        failed=lambda error: running.append(("failed", str(error))), failure=lambda: failed[0] if failed else None,
        explain=lambda: running.append("explained"), close=lambda: running.append("closed"),
    )  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(trainer, "join_processes", lambda device: running.append(("joined", device)) or watch)
    monkeypatch.setattr(trainer, "wait_for_steps_of", lambda *given: running.append(("waits", *given)))
    monkeypatch.setattr("nnscaler.loaded.predicted_step_seconds", lambda folder: 2.5)
    monkeypatch.setattr(trainer, "leave_processes", lambda failed: running.append("failed" if failed else "left"))
    monkeypatch.setattr(trainer, "from_rank_0", lambda work, device: work())
    monkeypatch.setattr(trainer, "from_all", lambda value: [value, None, "another", value])
    raised = {
        "my rows": UserError("no such row"), "others": RuntimeError("closed"), "hangs": RuntimeError("timeout"),
        "memory": torch.OutOfMemoryError("2 GiB"),
    }  # fmt: skip
    if ends == "memory":
        failed = [UserError("the plan takes 71 GiB")]
        monkeypatch.setattr("nnscaler.loaded.out_of_memory", lambda *given: running.append(given) or failed[0])

    def train(self: object) -> None:
        running.append("trained")
        if ends is not None:
            raise raised[ends]

    monkeypatch.setattr("nnscaler.cli.loop.TrainingRun.train", train)
    args = replace(ARGS, compute=ComputeConfig(1, 2))
    if ends is None:
        Trainer(args).run()
    else:
        with pytest.raises(type((failed or [raised[ends]])[0])) as told:
            Trainer(args).run()
        assert told.value is (failed or [raised[ends]])[0]
    assert running[0] == ("joined", torch.device("cpu"))
    (run,) = (one for one in running if one[0] == "run")
    assert run[-2:] == (["another", "job"], watch)
    assert ("waits", 2.5, watch) in running
    told_to_others = {
        "my rows": [("failed", "no such row")], "hangs": ["explained"], "memory": [("failed", "the plan takes 71 GiB")],
    }.get(ends, [])  # fmt: skip
    assert running[-2 - len(told_to_others) :] == [*told_to_others, "closed", "left" if ends is None else "failed"]
