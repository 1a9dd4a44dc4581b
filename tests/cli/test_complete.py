"""What train.py makes of its flags, a model's configuration and a dataset."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from chunk_linear_cross_entropy import in_chunks
from nnscaler.cli.config import TrainerArgs
from nnscaler.data.streamed import StreamedDataset
from nnscaler.errors import UserError
from nnscaler.models import causal_lm, files
from tests import tiny


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Called with flags: the arguments of a run, and what the model and its files were asked for."""
    monkeypatch.chdir(tmp_path)
    tiny.write_model(Path("model"), bos_token_id=1, eos_token_id=2)
    tiny.write_dataset(Path("data"), rows=4, starts=[[0, 8]] * 4)
    tiny.write_dataset(Path("validation"), rows=4, starts=[[0, 4]] * 4)
    asked = SimpleNamespace()
    monkeypatch.setattr(causal_lm, "CausalLM", lambda *given: given)
    monkeypatch.setattr(causal_lm, "prepare_config", lambda config, *given: setattr(asked, "prepared", given))
    monkeypatch.setattr(files, "find_weights", lambda model_id: f"weights of {model_id}")
    monkeypatch.setattr(files, "AssetWriter", lambda *given: given)

    def make(*flags: str) -> tuple[TrainerArgs, SimpleNamespace]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--model_id", "model", "--precision", "bf16", *flags])
        return train.complete(*train.read_flags()), asked

    return make


def test_a_model_as_it_is(made):
    args, asked = made("--dataset_path", "data", "--document_mask")
    model = args.model
    config, *given = model.make()
    assert given == [None, 20, None], "8 x 8 / 32 + 24 x 24 / 32 tokens of the document of a token"
    assert asked.prepared == (24, "auto", True)
    assert (model.weights, model.weight_prefix, model.vocabulary) == ("weights of model", "model.", tiny.VOCABULARY)
    assert (model.marks, model.name) == ({"bos": [1], "eos": [2]}, "model")
    assert model.save_assets == (config, "bfloat16", "model", Path("data"), 24, None)
    assert list(model.instead) == ["--enable-chunk-loss"]
    assert model.instead["--enable-chunk-loss"]() == (config, in_chunks, 20, None)
    assert args.dataset.dataset.sequence_length == tiny.LENGTH
    assert args.evaluation.dataset is None


def test_a_model_as_flags_have_it(made):
    args, asked = made(
        "--dataset_path", "data", "--eval_dataset_path", "validation", "--document_mask", "--enable-chunk-loss",
        "--attn_implementation", "sdpa", "--set", "hidden_act=gelu", "--lora_rank", "4", "--eval_interval", "7",
        "--precision", "fp32", "--resume_path", "data", "--name", "own", "--document_length", "20",
    )  # fmt: skip
    config, loss, document, adapters = args.model.make()
    assert (config.hidden_act, loss, document) == ("gelu", in_chunks, 20)
    assert (adapters.r, adapters.lora_alpha, adapters.base_model_name_or_path) == (4, 8, "model")
    assert asked.prepared == (28, "sdpa", True), "the validation's documents are longer"
    assert args.model.weights is None, "they are those of what is resumed"
    assert args.model.weight_prefix == "model.base_model.model."
    assert args.model.save_assets[1:] == ("float32", "model", Path("data"), 28, adapters)
    assert args.model.instead == {}, "it is done"
    assert (args.evaluation.interval, args.evaluation.dataset.path.name) == (7, "validation")


def test_a_validation_of_parquet_files_is_streamed(made):
    Path("rows").mkdir()
    rows = {"input_ids": [[1] * tiny.LENGTH] * 3}
    pq.write_table(pa.table(rows), "rows/a.parquet")
    for path in ("rows/", "rows/a.parquet", Path("rows").absolute().as_uri()):
        args, _ = made("--dataset_path", "data", "--eval_dataset_path", path)
        assert (type(args.evaluation.dataset), len(args.evaluation.dataset)) == (StreamedDataset, 3)
    rows["input_ids"] = [[1] * 5]
    pq.write_table(pa.table(rows), "rows/a.parquet")
    with pytest.raises(UserError, match="eval_dataset_path is 'rows', whose sequences have 5 tokens, but those of"):
        made("--dataset_path", "data", "--eval_dataset_path", "rows")


def test_a_plan_needs_no_weights_and_says_how_it_is_made(made):
    args, asked = made(
        "--run_mode", "compile", "--sequence_length", "16", "--plan_ngpus", "2", "--hardware", "h100", "--name", "own",
        "--seed", "7", "--micro_batch_size", "3", "--set", "hidden_act=gelu", "--enable-chunk-loss", "--document_mask",
        "--search_seconds", "5", "--checkpoint_interval", "9", "--lora_rank", "4", "--lora_target_modules", "q_proj",
    )  # fmt: skip
    assert args.model.weights is None
    assert args.model.save_assets[3:5] == (None, 16)
    assert asked.prepared == (16, "auto", True)
    assert args.command.split()[:4] == ["train.py", "--run_mode", "compile", "--model_id"]
    for flag in (
        "--model_id model", "--set hidden_act=gelu", "--enable-chunk-loss", "--sequence_length 16", "--document_mask",
        "--document_length 16", "--plan_ngpus 2", "--runtime_ngpus 2", "--hardware h100", "--micro_batch_size 3",
        "--precision bf16", "--search_seconds 5.0", "--lora_rank 4", "--lora_target_modules q_proj",
    ):  # fmt: skip
        assert f" {flag} " in f"{args.command} "
    for flag in ("--name", "--seed", "--checkpoint_interval", "--dataset_path"):
        assert flag not in args.command, "the plan does not depend on it"


def test_a_command_is_without_this_computer_s_folders(made, tmp_path):
    """Datasets and places of a model or of a hardware's figures are other ones elsewhere; a batch is not."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    tiny.write_hardware(tmp_path / "far")
    Path("model").rename("far/away/llama")
    args, _ = made(
        "--model_id", "far/away/llama", "--run_mode", "compile", "--dataset_path", "data", "--eval_dataset_path",
        "validation", "--hardware", "far/hardware.json", "--global_batch_size", "8", "--runtime_ngpus", "2",
    )  # fmt: skip
    assert args.command == (
        "train.py --run_mode compile --model_id llama --sequence_length 32 --runtime_ngpus 2 --hardware hardware.json "
        "--global_batch_size 8 --precision bf16"
    )


def test_the_longest_document_of_all_datasets_counts(made):
    _, asked = made("--dataset_path", "validation", "--eval_dataset_path", "data", "--document_mask")
    assert asked.prepared[0] == 28
    _, asked = made("--dataset_path", "validation", "--eval_dataset_path", "data")
    assert asked.prepared == (tiny.LENGTH, "auto", False), "where they are not kept apart, a row's"


@pytest.mark.parametrize(
    ("mode", "said"), [("run", "profile is '/dev/null/trace', which cannot be written"), ("compile", "")]
)
def test_what_a_run_alone_writes_is_judged_for_a_run_alone(made, mode, said):
    flags = ("--dataset_path", "data", "--run_mode", mode, "--hardware", "h100", "--profile", "/dev/null/trace")
    with pytest.raises(UserError, match=said) if said else nullcontext():
        made(*flags)


@pytest.mark.parametrize(("explain", "rank", "printed"), [(True, 0, True), (True, 1, False), (False, 0, False)])
def test_what_is_explained_is_printed_once(made, monkeypatch, capsys, explain, rank, printed):
    class Trainer:
        def __init__(self, args: object) -> None:
            self.args, self.rank, self.gen_folder = SimpleNamespace(explain=explain), rank, Path("code/llama")
            assert args == ("flags", "inputs", "args")

        def run(self) -> None:
            sys.stdout.write("ran\n")

    monkeypatch.setattr("nnscaler.cli.trainer.Trainer", Trainer)
    monkeypatch.setattr(train, "read_flags", lambda: ("flags", "inputs", "args"))
    monkeypatch.setattr(train, "complete", lambda *given: given)
    monkeypatch.setattr("nnscaler.report.read_plan", lambda folder: folder)
    monkeypatch.setattr("nnscaler.report.explain", lambda plan: f"the plan of {plan}")
    train.main()
    told = "the plan of code/llama\nmore in    code/llama/plan.html\n" if printed else ""
    assert capsys.readouterr().out == f"ran\n{told}"
