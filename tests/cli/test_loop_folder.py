"""Where a run writes, how it may be ended, and who is told of its steps."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler.cli import loop
from nnscaler.cli.config import LogConfig
from nnscaler.cli.loop import TrainingRun
from nnscaler.errors import UserError
from tests.cli.test_loop import ARGS, Run, fakes  # noqa: F401  a fixture


@pytest.fixture
def claimed(monkeypatch) -> list[tuple]:
    """What folders were claimed with; `free` is asked for two names then."""
    asked: list[tuple] = []

    def claim(directory: Path, name: str, loaded: object, own: object, jobs: list[str], free) -> SimpleNamespace:
        asked.append((directory, name, loaded, own, jobs, [free("llama"), free("llama-2")]))
        return SimpleNamespace(folder=directory / "llama-2", claim=SimpleNamespace(run="the run's own name"))

    monkeypatch.setattr(loop, "claim", claim)
    return asked


def test_a_folder_is_claimed_whose_logs_are_free_too(claimed, tmp_path, monkeypatch):
    run = Run(replace(ARGS, checkpoint=replace(ARGS.checkpoint, directory=tmp_path), log=LogConfig(tmp_path / "logs")))
    (tmp_path / "logs" / "llama").mkdir(parents=True)
    (tmp_path / "logs" / "llama" / "run.json").write_text(json.dumps({"run": "another"}))
    (tmp_path / "llama-2").mkdir()
    monkeypatch.setattr(loop, "from_rank_0", lambda work, device: work() if device == run.device else None)
    found = run._claim_folder(Path("loaded"), Path("own"), ["a job"])
    assert claimed == [(tmp_path, "llama", Path("loaded"), Path("own"), ["a job"], [False, True])]
    assert found == (tmp_path / "llama-2", "the run's own name")
    assert run.holding.folder == tmp_path / "llama-2"


def test_a_folder_that_another_node_does_not_see_is_one_line(claimed, tmp_path, monkeypatch):
    run = Run()
    run.rank = 3
    monkeypatch.setattr(loop, "from_rank_0", lambda work, device: (tmp_path / "elsewhere", "own"))
    with pytest.raises(
        UserError, match=r"elsewhere' is not seen by rank 3: checkpoint_dir must be shared by all nodes"
    ):
        run._claim_folder(None, None, [])
    assert (claimed, run.holding) == ([], None), "rank 0 alone claims"


@pytest.mark.parametrize("store", [None, "a store"])
def test_all_ranks_are_ended_under_one_name(monkeypatch, store):
    run = Run()
    run.watch = None if store is None else SimpleNamespace(store=store)
    monkeypatch.setattr(loop, "Termination", lambda *given: given)
    monkeypatch.setattr(loop, "from_rank_0", lambda work, device: ("rank 0's", len(work())))
    found = TrainingRun._termination(run)
    assert found == (store, ("rank 0's", 32), run._step_to_save, run._save)


def test_a_state_can_be_saved_where_it_is_finite():
    run = Run()
    run.step = 4
    assert run._step_to_save() == 4
    run.finite_weights = False
    assert run._step_to_save() is None


def test_the_watch_is_told_of_each_step(fakes):  # noqa: F811
    run, told = Run(), []
    run.watch = SimpleNamespace(reached=told.append)
    run.train()
    assert told == [1, 2, 3, 4, 5]


def test_tokens_of_experts_are_counted_in_steps_that_are_reported(fakes, monkeypatch):  # noqa: F811
    run, counted = Run(), []

    @contextmanager
    def count():
        counted.append(run.step + 1)
        yield

    loads = SimpleNamespace(counted=count, report=lambda: dict)
    monkeypatch.setattr(loop, "ExpertLoads", lambda axes: loads)
    run.train()
    assert counted == [2, 4, 5], "every other one, and the last"


def test_a_run_at_its_end_does_nothing(fakes, caplog):  # noqa: F811
    run = Run()
    run.step = 5
    with caplog.at_level("INFO", "nnscaler"):
        run.train()
    assert (run.trained, run.saves, fakes) == ([], [], [])
    assert caplog.messages == ["nothing to do: the run ends at step 5, and step 5 is reached"]


def test_a_validation_goes_on_until_it_is_told_to_stop_and_the_watch_sees_that(monkeypatch):
    run, told = Run(), []
    run.step, run.watch = 4, SimpleNamespace(reached=told.append)
    run.args = SimpleNamespace(evaluation=SimpleNamespace(dataset="validation"), dataset=ARGS.dataset, model=ARGS.model)
    monkeypatch.setattr(loop, "Evaluation", lambda *given: given)
    termination = SimpleNamespace(told=False)
    config, dataset, module, share, ignored, device, apart, go_on, vocabulary = run._evaluation(termination)
    assert (dataset, module, share, ignored, apart) == ("validation", run.module, run.share, -100, False)
    assert (config, device, vocabulary) == (run.args.evaluation, torch.device("cpu"), None)
    assert go_on()
    termination.told = True
    assert not go_on()
    assert told == [4, 4]


@pytest.mark.parametrize(("rank", "profile", "writes"), [(0, Path("trace"), True), (1, None, False)])
def test_one_rank_writes_logs_and_profiles(fakes, rank, profile, writes):  # noqa: F811
    run = Run(replace(ARGS, log=LogConfig(interval=2, profile=Path("trace"))))
    run.rank = rank
    run.train()
    (profiles,) = [one for one in fakes if isinstance(one, tuple) and one[0] == "profiles"]
    assert profiles[1] == profile
    (log,) = [one for one in fakes if isinstance(one, tuple) and len(one) == 5]
    assert (log[0] is not None) == writes
