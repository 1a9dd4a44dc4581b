"""Saved and continued, training is as if it had never stopped; merged, it loads in transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nnscaler import UserError
from nnscaler.checkpoint import resume as resuming
from nnscaler.checkpoint.checksums import Checksums, whole_file
from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import TrainerState, latest_checkpoint
from nnscaler.checkpoint.merge import merge_to_file
from nnscaler.checkpoint.randomness import as_tensors, random_states, set_random_states
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.cli.loop import TrainingRun
from nnscaler.cli.trainer import Trainer
from nnscaler.data.training import PackedDataset
from nnscaler.models.causal_lm import CausalLM
from nnscaler.recompute import IN_GROUPS, RECOMPUTES_ALL, SAME_ON_HOST
from tests import tiny
from tests.checkpoint.jobs import assert_equal, final, job, losses, random_tensors, tensors, train
from tests.launch import run
from tests.parity import SEED, TOLERANCE, Case, plain_loop

ONE = Case(2, 2, accumulation=2)  # two sequences a step


@pytest.fixture(scope="module")
def saved(folder):
    """Twelve steps without a stop, and what was saved of the fifth while the next ones went on."""
    run(2, train, ONE, folder, 12, "straight", {"interval": 5, "keep": 0}, init=False)
    return folder / "checkpoints" / "straight" / "step_00000005"


def resume_copy(saved: Path, folder: Path, name: str) -> dict[str, Path]:
    """Goes on from a copy of a checkpoint in a run folder of its own, so that the original is left."""
    return {"resume": Path(shutil.copytree(saved, folder / "checkpoints" / name / saved.name))}


def test_every_field_of_the_state_is_read_as_it_was_written(tmp_path):
    """With values that are nobody's default."""
    values = {
        field.name: {"int": 7 + index, "float": 0.5 + index, "str": f"s{index}"}.get(str(field.type).split(" |")[0])
        for index, field in enumerate(dataclasses.fields(TrainerState))
    }
    for name in [name for name, value in values.items() if value is None]:
        values[name] = {name: {"a": 1}}
    state = TrainerState(**values)
    state.write(tmp_path)
    Checksums(tmp_path, [whole_file(tmp_path, tmp_path / "trainer.json")]).write()
    assert TrainerState.read(tmp_path) == state


def resume_and_report(folder, name, checkpoint):
    """What the run goes on with, after its generators had run on and been seeded otherwise."""
    generators = torch.manual_seed, random.seed, np.random.seed
    for seed in generators:
        seed(int(os.environ["RANK"]) + 99)
    seen = {}

    def stop(run):
        state = run.optimizer.state
        seen.update(
            step=run.step, consumed=run.consumed, seed=run.seed, loss=run.reports.loss, steps=run.optimizer.steps,
            random={name: tensor.numpy() for name, tensor in as_tensors(random_states(run.device)).items()},
            moments=[float(values.abs().sum()) for bucket in state for values in bucket.values()],
        )  # fmt: skip

    with patch.object(TrainingRun, "train", stop):
        train(ONE, folder, 12, name, {"resume": checkpoint})
    return seen


def test_what_is_saved_is_what_is_gone_on_with(folder, saved):
    """The position, the number of updates, the moments, and each rank's random states."""
    state, stored = TrainerState.read(saved), random_tensors(saved)
    for rank, seen in enumerate(run(2, resume_and_report, folder, "report", saved, init=False)):
        for name in ("step", "consumed", "seed", "loss"):
            assert seen[name] == getattr(state, name), name
        assert seen["steps"] == state.updates == 5
        assert all(moment > 0 for moment in seen["moments"])
        assert set(seen["random"]) == {"torch", "python", "numpy"}
        for name, array in seen["random"].items():
            assert torch.equal(torch.from_numpy(array), stored[f"random.{name}.{rank}"]), name


def test_on_the_same_plan_it_is_bit_exact(folder, saved):
    run(2, train, ONE, folder, 12, "same", resume_copy(saved, folder, "same"), init=False)
    assert losses(folder, "same") == losses(folder, "straight")[5:]
    assert_equal(final(folder, "same"), final(folder, "straight"))


def test_every_element_is_written_once_and_random_states_by_every_rank(folder, saved):
    checkpoint = Checkpoint.open(saved)
    elements = 3 * sum(np.prod(entry["shape"]) for entry in checkpoint.state.parameters.values())
    stored = [entry for name, entry in checkpoint.entries.items() if not name.startswith("random.")]
    assert sum(chunk.sizes.numel() for entry in stored for chunk in entry.chunks) == elements
    assert {name for name in checkpoint.entries if name.startswith("random.")} == {
        f"random.{generator}.{rank}" for generator in ("torch", "python", "numpy") for rank in (0, 1)
    }
    shards = [size for name, size in Checksums.read(saved).sizes().items() if name.endswith(".distcp")]
    assert len(shards) == 2
    pieces = sum(len(entry.chunks) for entry in checkpoint.entries.values())
    assert sum(shards) < 4 * elements + 3000 * pieces + 2**16  # a piece's own header, and the random states


def test_random_streams_continue(tmp_path):
    device = torch.device("cpu")
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    random.gauss()  # which keeps a second value for the next call
    states = as_tensors(random_states(device))

    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), random.gauss(), np.random.random(), np.random.standard_normal()]

    wanted = draw()
    assert draw() != wanted
    set_random_states(states, device)
    assert draw() == wanted


OTHERS = [(Case(1, 4), 4), (Case(1, 1, accumulation=2), 2), (Case(2, 4, chunk_loss=True, accumulation=2), 4)]


@pytest.mark.parametrize(("case", "sequences"), OTHERS, ids=lambda value: getattr(value, "name", ""))
def test_on_another_plan_it_goes_on_at_the_exact_sample(folder, saved, case, sequences):
    """Straight from the shards, with other numbers of processes and of sequences a step."""
    run(case.runtime, train, case, folder, 10, case.name, resume_copy(saved, folder, case.name), init=False)
    rows = PackedDataset.open(folder / "data").rows.with_format("numpy")["input_ids"]
    wanted, weights, _ = plain_loop(np.asarray(rows), [2] * 5 + [sequences] * 5)
    assert losses(folder, case.name) == pytest.approx(wanted[5:], rel=TOLERANCE)
    found = final(folder, case.name)
    for name, weight in weights.items():
        assert tiny.close(found[f"model.{name}"], weight) < TOLERANCE, name


def test_into_groups_of_layers_on_the_host_and_out(folder, saved):
    """Inputs of groups, state and gradients on the host, regions in pieces; then one process without any of it."""
    level = SAME_ON_HOST[next(level for level in IN_GROUPS if level.size == 2 and level.inner == RECOMPUTES_ALL)]
    grouped = Case(2, 2, accumulation=2, levels=(level.name,) * 2, pieces=4)
    plain = Case(1, 1, accumulation=2)
    run(2, train, grouped, folder, 8, "grouped", resume_copy(saved, folder, "grouped"), init=False)
    plan = json.loads((folder / "code" / "grouped" / "plan.json").read_text())
    assert "    def group(" in (folder / "code" / "grouped" / "gencode_stage0.py").read_text()
    assert plan["state_on_host"]
    middle = latest_checkpoint(folder / "checkpoints" / "grouped")
    run(1, train, plain, folder, 12, "ungrouped", resume_copy(middle, folder, "ungrouped"), init=False)
    assert losses(folder, "grouped") + losses(folder, "ungrouped") == pytest.approx(
        losses(folder, "straight")[5:], rel=TOLERANCE
    )
    wanted = final(folder, "straight")
    for name, found in final(folder, "ungrouped").items():
        assert tiny.close(found, wanted[name]) < TOLERANCE, name


def test_a_merged_file_resumes_on_any_number_of_processes(folder, saved, tmp_path):
    merge_to_file(Checkpoint.open(saved), tmp_path / "merged.ckpt", verify=True)
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert set(content) == {"model", "optimizer", "trainer", "checksums"}
    assert set(content["optimizer"]) == {"exp_avg", "exp_avg_sq"}
    whole = tensors(saved)
    for name, tensor in content["model"].items():
        assert torch.equal(tensor, whole[f"model.{name}"])
    for case in (Case(1, 1, accumulation=2), Case(1, 2)):
        name = f"merged-{case.name}"
        run(case.runtime, train, case, folder, 12, name, {"resume": tmp_path / "merged.ckpt"}, init=False)
        assert losses(folder, name) == pytest.approx(losses(folder, "straight")[5:], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("own", "stored", "said"),
    [
        ("a.lora_A.x", "a.x", r"was trained without adapters, which lora_rank asks for; merge it with ckpt_merger"),
        ("a.x", "a.lora_A.x", r"is one of adapters; give the lora_rank with which they were trained$"),
    ],
)
def test_adapters_are_told_where_only_the_model_or_the_checkpoint_has_them(own, stored, said, tmp_path, monkeypatch):
    state = SimpleNamespace(parameters={stored: {"shape": [1]}}, tied={})
    monkeypatch.setattr(resuming.TrainerState, "read", lambda path: state)
    model = nn.Module()
    model.named_parameters = lambda: iter([(own, torch.empty(1))])
    with pytest.raises(UserError, match=f"^checkpoint '{tmp_path}' {said}"):
        resuming.check_fits(tmp_path, model, "other", "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"vocab_size": 100},
            r"model\.embed_tokens\.weight has shape \[96, 32\], and the model's has shape \[100, 32\]",
        ),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing, and the model's has shape"),
        ({"num_hidden_layers": 1}, r"it holds model\.layers\.1\.\S+, which the model does not have"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_planning(folder, saved, tmp_path, changed, said):
    merge_to_file(Checkpoint.open(saved), tmp_path / "merged.ckpt")
    for resume in (saved, tmp_path / "merged.ckpt"):
        args = job(Case(1, 1, accumulation=2), folder, 12, "other", resume=resume)
        make = lambda: CausalLM(tiny.config(**changed))  # noqa: E731
        other = dataclasses.replace(args, model=dataclasses.replace(args.model, make=make, name="other"))
        with pytest.raises(UserError, match=rf"^checkpoint '{resume}' does not fit model 'other': {said}"):
            Trainer(other).run()
        assert not (folder / "code" / "other" / "plan.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_merged_model_is_the_training_model(folder, tmp_path, precision):
    """transformers loads it with nothing missing or unexpected, and its logits are those of the trained weights."""
    name = f"export-{precision}"
    run(2, train, ONE, folder, 2, name, {"precision": precision}, init=False)
    checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / name))
    export_model(checkpoint, tmp_path / "model", verify=True, shard_bytes=40_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    trained = AutoModelForCausalLM.from_config(tiny.config(), dtype=loaded.dtype).eval()
    with torch.no_grad():
        for parameter, tensor in trained.named_parameters():
            tensor.copy_(checkpoint.read(f"model.model.{parameter}", tuple(tensor.shape)))
        tokens = torch.arange(20).unsqueeze(0)
        assert torch.equal(loaded(tokens).logits, trained(tokens).logits)
    # The loss that training itself finds next is the merged model's loss on the same samples.
    run(2, train, ONE, folder, 3, name, {"precision": precision, "resume": checkpoint.folder}, init=False)
    rows = np.asarray(PackedDataset.open(folder / "data").rows["input_ids"])
    order = np.random.default_rng((SEED, 0)).permutation(len(rows))[4:6]
    batch = torch.from_numpy(rows[order].astype(np.int64))
    with torch.no_grad():
        logits = loaded(batch).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    tolerance = {"fp32": TOLERANCE, "bf16": 2e-3}[precision]
    assert losses(folder, name)[2] == pytest.approx(loss.item(), rel=tolerance)
    with pytest.raises(UserError, match="is not empty"):
        export_model(checkpoint, tmp_path / "model")


def test_a_hugging_face_directory_gives_weights_alone(folder, saved, tmp_path):
    """Training begins at step 0 and sample 0 from the exported weights."""
    export_model(Checkpoint.open(saved), tmp_path / "model")
    run(2, train, ONE, folder, 1, "weights", {"resume": tmp_path / "model"}, init=False)
    state = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / "weights")).state
    assert (state.step, state.consumed) == (1, 2)
    assert losses(folder, "weights")[0] < losses(folder, "straight")[0] - 0.01
