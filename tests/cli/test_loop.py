"""The training loop, with a model, an optimizer and a saver that only write down what they are told."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler.checkpoint.due import Due
from nnscaler.cli import loop
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, LogConfig, LRSchedulerConfig, ModelConfig, TrainerArgs
from nnscaler.cli.finite import FiniteSteps
from nnscaler.cli.length import RunLength
from nnscaler.cli.loop import TrainingRun
from nnscaler.cli.reports import Reports
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.data.training import Share
from nnscaler.errors import UserError
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.runtime.reading import Reading

ARGS = TrainerArgs(
    name="llama", model=ModelConfig(make=lambda: torch.nn.Identity(), weight_prefix="model."),
    compute=ComputeConfig(1, 2, micro_batches=2), dataset=DatasetConfig(sequence_length=8),
    optimizer=OptimizerConfig(lr=0.5), lr_scheduler=LRSchedulerConfig("linear", 1, 0.0), log=LogConfig(interval=2),
    checkpoint=CheckpointConfig(interval=3, keep=7),
)  # fmt: skip


class Rows(list):
    sequence_length = 8


class Run(TrainingRun):
    """Five steps of two micro-batches of one sample, on two copies: 4 samples each, of 18 in all."""

    def __init__(self, args: TrainerArgs = ARGS, told_at: int = 99, interrupted: bool = False) -> None:
        self.interrupted = interrupted
        self.args, self.rank, self.device, self.watch = args, 0, torch.device("cpu"), None
        self.dataset, self.mesh, self.share = Rows(range(40)), Mesh((1,), 2), Share(0, 2, 1, 2)
        self.step, self.consumed, self.seed, self.steps, self.saved = 0, 0, 9, 5, 0
        self.eval_loss = self.random = self.holding = None
        self.length, self.due, self.finite = RunLength(5, 18, 40), Due(3, 0.0), FiniteSteps(2)
        self.reports = Reports(None)
        self.flops, self.peak, self.folder, self.run = (1.0, 1.0), None, Path("checkpoints/llama-2"), "own"
        self.trained, self.updates, self.written, self.saves, self.told = [], [], [], [], []
        self.told_at, self.finite_weights, self.norms = told_at, True, {}
        spec = SimpleNamespace(shape=(2, 3), dtype=torch.bfloat16)
        self.module = SimpleNamespace(
            accumulate=self._accumulate, axes=None, gives_loss=True, predicted_seconds={}, tied={"a": "w"},
            specs={"w": spec, "unused": spec},
        )  # fmt: skip
        self.loaded = SimpleNamespace(names=["w"])
        self.optimizer = SimpleNamespace(step=self._update, finish=lambda: self.told.append("finish"))
        self.saver = Saver(self)

    def _accumulate(self, batches, seed: int, step: int) -> torch.Tensor:
        self.trained.append((list(batches), seed, step))
        return torch.tensor(float(step))

    def _update(self, labels: float, rate: float, loss: torch.Tensor) -> torch.Tensor:
        self.updates.append((labels, rate, loss.item()))
        return torch.tensor(self.norms.get(len(self.updates), 1.0))

    def _termination(self):
        own = self

        class Termination:
            updating = nullcontext()
            interrupted = own.interrupted

            @property
            def told(self) -> bool:
                return own.step + 1 >= own.told_at

            def leave(self) -> None:
                own.told.append("leave")

        return nullcontext(Termination())


class Saver:
    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def is_finite(self) -> bool:
        return self.run.finite_weights

    def before_update(self) -> None:
        self.run.told.append("before update")

    def start(self, state, random) -> None:
        self.run.saves.append((state, random))

    def finish(self) -> None:
        self.run.told.append("saved")


@pytest.fixture
def fakes(monkeypatch) -> list:
    """In the place of what logs and reads data: counts up samples, and reports how many steps it was told of."""
    asked: list = []

    class Batches:
        def __init__(self, samples, *given) -> None:
            asked.append((samples, given))

        def after(self, consumed: int):
            return iter(range(consumed, 100))

    class Progress:
        def __init__(self, size, step, gives_loss, device) -> None:
            self.size, self.steps = size, 0
            asked.append(size)

        def add(self, loss, counts, norm) -> None:
            self.steps += 1

        def report(self, step: int):
            found, self.steps = {"loss": 10.0 * step, "steps": self.steps}, 0
            return lambda: found

        @contextmanager
        def paused(self):
            asked.append("paused")
            yield

    class Log:
        def __init__(self, folder, run, steps, start, about) -> None:
            asked.append((folder, run, steps, start, about))
            self.advanced = 0

        def __enter__(self):
            return self

        def __exit__(self, *error: object) -> None:
            asked.append(f"advanced {self.advanced}")

        def advance(self) -> None:
            self.advanced += 1

        def write(self, step: int, report: dict) -> None:
            asked.append(("wrote", step, report))

    counts = SimpleNamespace(labels=12, of=lambda batches: batches)
    monkeypatch.setattr(loop, "Counts", lambda: counts)
    monkeypatch.setattr(loop, "Batches", Batches)
    monkeypatch.setattr(loop, "Progress", Progress)
    monkeypatch.setattr(loop, "RunLog", Log)
    monkeypatch.setattr(loop, "log_folder", lambda *given: given)
    monkeypatch.setattr(loop, "samples_of", lambda dataset, seed, vocabulary: ("samples", dataset, seed))
    monkeypatch.setattr(loop, "First", lambda samples, count: ("first", samples[-1], count))
    monkeypatch.setattr(loop, "random_states", lambda device: "random")
    loads = SimpleNamespace(counted=nullcontext, report=lambda: lambda: {"experts/idle": 0.5})
    monkeypatch.setattr(loop, "ExpertLoads", lambda axes: loads)
    profiler = nullcontext()
    profiler.step = lambda: asked.append("profiled")
    monkeypatch.setattr(loop, "StepProfiler", lambda *given: asked.append(("profiles", *given)) or profiler)
    return asked


def wrote(asked: list) -> list[tuple[int, dict]]:
    return [one[1:] for one in asked if isinstance(one, tuple) and one[0] == "wrote"]


def test_steps_rates_reports_and_saves(fakes, caplog):
    run = Run()
    with caplog.at_level(logging.INFO, "nnscaler"):
        run.train()
    assert run.trained == [([2 * step, 2 * step + 1], 9, step) for step in range(5)]
    assert run.updates == [
        (12, pytest.approx(0.5 * factor), float(step)) for step, factor in enumerate((0.5, 1.0, 0.75, 0.5, 0.25))
    ]
    rows = wrote(fakes)
    assert [step for step, _ in rows] == [2, 4, 5]
    assert [row["steps"] for _, row in rows] == [2, 2, 1], "since the report before"
    assert [row["epoch"] for _, row in rows] == pytest.approx([8 / 40, 16 / 40, 18 / 40])
    assert [row["lr"] for _, row in rows] == pytest.approx([0.5, 0.25, 0.125])
    assert [row["loss"] for _, row in rows] == [20.0, 40.0, 50.0]
    assert all((row["gradient_norm"], row["experts/idle"]) == (1.0, 0.5) for _, row in rows)
    assert [(state.step, state.consumed, state.loss, random) for state, random in run.saves] == [
        (3, 12, 20.0, "random"), (5, 18, 50.0, "random")
    ]  # fmt: skip
    assert run.told == ["before update"] * 5 + ["leave", "finish", "saved"]
    assert fakes.count("profiled") == 5
    assert fakes[-1] == "advanced 5"
    assert caplog.messages[0].startswith("trained to step 5; checkpoints in checkpoints/llama-2")
    assert "18 samples seen" in caplog.messages[1]


def test_what_is_logged_and_how_large_a_step_is(fakes):
    run = Run()
    run.train()
    (samples, given), size, profiles, log = fakes[:4]
    assert profiles == ("profiles", None, {})
    assert samples == ("first", 9, 18)
    assert given == (8, run.share, -100, run.device, False)
    assert (size.samples, size.tokens, size.mesh, size.flops, size.peak) == (4, 8, Mesh((1,), 2), (1.0, 1.0), None)
    assert log == ((Path("runs"), "llama-2", "own"), "own", 5, 0, None)
    again = Run()
    again.length = RunLength(5, None, 40)
    fakes.clear()
    again.train()
    assert fakes[0][0][0] == "samples", "without an end"


def test_evaluations_are_reported_and_saved_with_their_weights(fakes, monkeypatch):
    run = Run()
    found = SimpleNamespace(is_due=lambda step, last: step == 3 or last, run=lambda: {"eval_loss": 1.5})
    monkeypatch.setattr(Run, "_evaluation", lambda self, termination: found)
    run.train()
    rows = dict(wrote(fakes))
    assert rows[3] == {"eval_loss": 1.5}
    assert rows[5]["eval_loss"] == 1.5
    assert "eval_loss" not in rows[4]
    assert [state.eval_loss for state, _ in run.saves] == [1.5, 1.5]
    assert fakes.count("paused") == 2
    run = Run(replace(ARGS, checkpoint=CheckpointConfig(interval=4)))
    run.due = Due(4, 0.0)
    run.train()
    assert [(state.step, state.eval_loss) for state, _ in run.saves] == [(4, None), (5, 1.5)], "of other weights"


def test_a_run_that_is_told_to_stop_saves_what_the_last_update_left(fakes, caplog):
    run = Run(told_at=3)
    with caplog.at_level(logging.INFO, "nnscaler"):
        run.train()
    assert len(run.updates) == 2
    assert len(run.trained) == 3, "the step that is under way is given up"
    assert [state.step for state, _ in run.saves] == [2]
    assert "stopped by a signal at step 2; checkpoints in " in caplog.text
    run = Run(told_at=3, interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [state.step for state, _ in run.saves] == [2], "after ctrl-C too, and then the command ends as one does"


def test_what_is_not_finite_is_saved_only_at_the_end(fakes, caplog):
    run = Run()
    run.norms = {3: float("nan")}
    run.train()
    assert [(state.step, state.updates, state.keep) for state, _ in run.saves] == [(4, 4 - 3, 7), (5, 5 - 3, 7)]
    run = Run()
    run.norms = {5: float("nan")}
    run.train()
    assert [(state.step, state.keep) for state, _ in run.saves] == [(3, 7), (5, 0)], "nothing is pushed out by it"
    run = Run()
    run.finite_weights = False
    with pytest.raises(UserError, match="the weights after step 5 are not finite: they are not saved"):
        run.train()
    assert "the weights after step 3 are not finite: they are not saved" in caplog.text
    assert run.saves == []
    assert run._step_to_save() is None
    run.finite_weights = True
    assert run._step_to_save() == 5


def test_a_run_without_checkpoints_saves_nothing_and_no_state_twice(fakes, caplog):
    run = Run(replace(ARGS, checkpoint=CheckpointConfig(interval=None)))
    with caplog.at_level(logging.INFO, "nnscaler"):
        run.train()
    assert run.saves == []
    assert "trained to step 5; no checkpoints" in caplog.text
    run = Run()
    run.step = 5
    for _ in range(2):
        run._save()
    assert len(run.saves) == 1
    with caplog.at_level(logging.INFO, "nnscaler"):
        run.train()
    assert "nothing to do: the run ends at step 5, and step 5 is reached" in caplog.text
    assert (run.trained, len(run.saves)) == ([], 1)


def test_the_state_of_a_run():
    run = Run()
    run.step, run.consumed, run.reports.loss, run.eval_loss = 4, 16, 1.25, 1.5
    state = run._state()
    assert (state.step, state.consumed, state.seed, state.samples) == (4, 16, 9, 40)
    assert (state.loss, state.eval_loss, state.updates, state.keep, state.step_samples) == (1.25, 1.5, 4 - 2, 7, 4)
    assert (state.run, state.model, state.processes, state.owner) == ("llama-2", "llama", 2, "own")
    assert state.schedule == {"lr": 0.5, "schedule": "linear", "warmup_steps": 1, "minimum": 0.0, "steps": 5}
    assert state.parameters == {"w": {"shape": [2, 3], "dtype": "bfloat16"}}, "and nothing that the model has not"
    assert (state.tied, state.prefix, state.mixture) == ({"a": "w"}, "model.", {})
    run.reports.add(4, lambda: {"loss": 0.75})
    run.finite.after(4, Reading(torch.tensor(float("nan"))))
    state = run._state()
    assert (state.loss, state.updates, state.keep) == (0.75, 4 - 3, 0), "of the last step, which nobody has read yet"


def test_what_differs_from_the_checkpoint_is_said(caplog):
    run = Run()
    run.args = replace(run.args, seed=9)
    state = run._state()
    for same in (None, state, replace(state, step_samples=0)):  # it is not known of older checkpoints
        run._warn_of_changes(same)
    assert caplog.messages == []
    run._warn_of_changes(replace(state, samples=7))
    assert caplog.messages.pop().startswith("the checkpoint was trained on a dataset of 7 samples, this one has 40")
    run._warn_of_changes(replace(state, mixture={"a": [1, 2]}))
    assert "the checkpoint was trained on the mixture {'a': [1, 2]}" in caplog.messages[-1]
    run._warn_of_changes(replace(state, step_samples=8))
    assert "a step takes 4 samples from here on, and took 8 before: --global_batch_size 8" in caplog.messages[-1]
    run._warn_of_changes(replace(state, schedule={**state.schedule, "lr": 0.25}))
    assert caplog.messages[-1].endswith("the checkpoint's schedule: peak 0.5, which was 0.25")


def test_training_releases_the_folder_that_it_holds(fakes):
    run, released = Run(), []
    run.holding = SimpleNamespace(release=lambda: released.append(run.step))
    run.train()
    run.optimizer.step = None
    run.step, run.steps = 0, 5
    with pytest.raises(TypeError):
        run.train()
    assert released == [5, 0]


def test_a_run_goes_on_at_its_step(fakes):
    """After three steps of five: rates, what is dropped at random, samples and the bar are those of the rest."""
    run = Run(replace(ARGS, log=LogConfig(interval=1, profile=Path("prof"))))
    run.step = run.saved = 3
    run.consumed, run.module.predicted_seconds = 12, {"matmul": 1.0}
    run.train()
    assert run.trained == [([12, 13], 9, 3), ([14, 15], 9, 4)]
    assert [rate for _, rate, _ in run.updates] == pytest.approx([0.5 * 0.5, 0.5 * 0.25])
    assert ("profiles", Path("prof"), {"matmul": 1.0}) in fakes
    assert ((Path("runs"), "llama-2", "own"), "own", 5, 3, None) in fakes
    assert [(state.step, state.consumed, state.loss) for state, _ in run.saves] == [(5, 18, 50.0)]


def test_what_a_run_is_for_goes_to_weights_and_biases(fakes):
    run = Run(replace(ARGS, log=LogConfig(interval=3)))
    object.__setattr__(run.args.log, "report_to", "wandb")
    run.train()
    (about,) = [one[-1] for one in fakes if isinstance(one, tuple) and one[1:2] == ("own",)]
    assert about == {
        "name": "llama", "seed": 9, "devices": 2, "lr": 0.5, "schedule": "linear", "warmup_steps": 1, "minimum": 0.0,
        "steps": 5,
    }  # fmt: skip
    assert [step for step, _ in wrote(fakes)] == [3, 5], "every third, and the last"


def test_a_validation_is_told_how_rows_are_read(monkeypatch):
    """With the label that counts for nothing, and documents apart; it goes on while nobody is told to stop."""
    monkeypatch.setattr(loop, "Evaluation", lambda *given: given)
    run, steps = Run(), []
    assert run._evaluation(None) is None
    data = SimpleNamespace(ignored_label=-7, document_mask=True)
    validation = SimpleNamespace(dataset="rows")
    run.args = SimpleNamespace(evaluation=validation, dataset=data, model=SimpleNamespace(vocabulary=96))
    run.watch, run.step = SimpleNamespace(reached=steps.append), 4
    termination = SimpleNamespace(told=False)
    *given, go_on, vocabulary = run._evaluation(termination)
    assert given == [validation, "rows", run.module, run.share, -7, run.device, True]
    assert vocabulary == 96
    assert go_on()
    termination.told = True
    assert not go_on()
    assert steps == [4, 4]


class Parts(list):
    """A mixture's, as far as it is asked."""

    sequence_length, names = 8, ("a", "b")

    def described(self) -> dict[str, list[int]]:
        return {"a": [30, 3], "b": [10, 1]}

    def seen(self, seed: int, consumed: int) -> list[int]:
        assert seed == 9
        return [consumed - 2, 2]


def test_what_is_seen_of_each_part_of_a_mixture_is_reported(fakes, monkeypatch, caplog):
    monkeypatch.setattr(loop, "Mixture", Parts)
    run = Run()
    run.dataset = Parts(range(40))
    with caplog.at_level(logging.INFO, "nnscaler"):
        run.train()
    assert [(row["samples/a"], row["samples/b"]) for _, row in wrote(fakes)] == [(6, 2), (14, 2), (16, 2)]
    assert caplog.messages[-2:] == ["a: 16 samples seen", "b: 2 samples seen"]
    assert run._state().mixture == {"a": [30, 3], "b": [10, 1]}


@pytest.fixture
def begun(monkeypatch) -> SimpleNamespace:
    """What a run is begun with: all that it is made of only writes down what it is given."""
    said = SimpleNamespace(loaded=[], made={}, state=None)

    def initialise(*given: object) -> None:
        said.loaded.append(("initialised", *given))

    class Loaded:
        def __init__(self, *given: object) -> None:
            said.made["model"] = given
            self.module = SimpleNamespace(axes=SimpleNamespace(replica=1), named_parameters=lambda: [])
            self.optimizer = SimpleNamespace(load_masters=lambda: said.loaded.append("masters"))
            self.mesh, self.fixed, self.initialise = Mesh((1,), 2), ["fixed"], initialise
            self.model = SimpleNamespace(named_parameters=lambda: [("a.lora_A.x", None), ("b.weight", None)])

    def record(name: str, result: object = None):
        return lambda *given: said.made.update({name: given}) or result

    def resume(paths, *given):
        said.loaded.append(("resumed", paths))
        said.made["resumed"] = given
        return paths[0], said.state

    monkeypatch.setattr(loop, "LoadedModel", Loaded)
    monkeypatch.setattr(loop, "resume", resume)
    monkeypatch.setattr(
        loop, "load_weights", lambda folder, *given: said.loaded.append((folder, given[2])) or record("weights")(*given)
    )
    figures = {"micro_batch_flops": 30.0, "micro_batch_flops_causal": 12.0}
    monkeypatch.setattr(loop, "read_plan", record("plan", {"predicted": figures}))
    saver = SimpleNamespace(predict_seconds=lambda: said.loaded.append("predicted"))
    monkeypatch.setattr(loop, "Saver", record("saver", saver))
    monkeypatch.setattr(loop, "Due", record("due"))
    monkeypatch.setattr(loop, "random_states", record("random", "states"))
    monkeypatch.setattr(TrainingRun, "_claim_folder", record("claim", (Path("runs/llama"), "own")))
    return said


BEGUN = replace(
    ARGS, micro_batch_size=3, seed=4, max_train_steps=9, model=replace(ARGS.model, save_assets=print),
    compute=replace(ARGS.compute, hardware="h100"), checkpoint=CheckpointConfig(interval=6, minutes=2.5),
)  # fmt: skip


def begin(args: TrainerArgs = BEGUN, resume_from: list[Path] | None = None) -> TrainingRun:
    source = SimpleNamespace(dtype=torch.bfloat16)
    return TrainingRun(
        args, Path("code"), torch.device("cpu"), source, Rows(range(40)), resume_from or [], None, ["job"]
    )


def test_a_run_is_begun_anew(begun):
    run = begin()
    assert begun.loaded == [("initialised", 4), "predicted"]
    assert (run.step, run.consumed, run.seed, run.reports.loss, run.saved, run.steps) == (0, 0, 4, None, 0, 9)
    assert (run.share, run.flops) == (Share(1, 2, 3, 2), (10.0, 4.0)), "of a sequence"
    assert run.peak == load_hardware("h100").flops["bfloat16"]
    assert (run.folder, run.run, run.random, run.finite.skipped) == (Path("runs/llama"), "own", "states", 0)
    assert begun.made["due"] == (6, 2.5)
    assert begun.made["claim"][1:] == (None, None, ["job"])
    assert begun.made["model"] == (Path("code"), begun.made["model"][1], BEGUN.optimizer, run.device)
    folder, optimizer, fixed, device, assets, check = begun.made["saver"]
    assert (folder, optimizer, fixed, device, assets) == (run.folder, run.optimizer, ["fixed"], run.device, print)
    check()
    weights = replace(
        BEGUN, model=replace(BEGUN.model, weights=Path("own")), checkpoint=CheckpointConfig(interval=None)
    )
    begun.loaded.clear()
    begin(weights)
    assert begun.loaded == [(Path("own"), "model."), ("initialised", 4, ["a.lora_A.x"]), "masters"]
    module, model, prefix = begun.made["weights"]
    assert (hasattr(module, "axes"), hasattr(model, "axes"), prefix) == (True, False, "model.")
    assert begun.made["due"] == (0, 0.0)


def test_its_rank_is_that_among_all_nodes(begun, monkeypatch):
    assert begin().rank == 0
    for name, value in {"is_initialized": True, "get_rank": 5}.items():
        monkeypatch.setattr(loop.dist, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert begin().rank == 5


def test_a_run_is_begun_where_another_was(begun, tmp_path, caplog):
    state = Run()._state()
    begun.state = replace(state, step=7, consumed=21, seed=11, loss=1.5, updates=5, samples=40)
    run = begin(resume_from=[tmp_path, Path("older")])
    assert begun.loaded == [("resumed", [tmp_path, Path("older")]), "predicted"]
    assert begun.made["resumed"] == (run.module, run.optimizer, ["fixed"], run._load_weights)
    assert (run.step, run.consumed, run.seed, run.reports.loss, run.saved) == (7, 21, 11, 1.5, 7)
    assert run.finite.skipped == 2
    assert begun.made["claim"][1] == tmp_path
    assert "the seed stays 11, as in the checkpoint, and is not 4: the order of the data goes on" in caplog.messages
    assert caplog.messages[-1].startswith("the learning rate no longer follows the checkpoint's schedule: ")
    begun.state = replace(begun.state, updates=None)
    assert begin(resume_from=[tmp_path / "merged.ckpt"]).finite.skipped == 0, "older ones do not say"
    assert begun.made["claim"][1] is None, "a file is no run's"
    begun.state = None
    run = begin(resume_from=[tmp_path])
    assert (run.step, run.consumed, run.seed) == (0, 0, 4), "weights alone"
    assert begun.made["claim"][1] is None
