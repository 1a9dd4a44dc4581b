"""The training loop: steps, logs and checkpoints."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler.checkpoint.claim import Holding, claim
from nnscaler.checkpoint.due import Due
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.randomness import random_states
from nnscaler.checkpoint.resume import resume
from nnscaler.checkpoint.saver import Saver
from nnscaler.checkpoint.termination import Termination
from nnscaler.cli.config import TrainerArgs
from nnscaler.cli.evaluation import Evaluation
from nnscaler.cli.finite import FiniteSteps
from nnscaler.cli.length import RunLength
from nnscaler.cli.log import RunLog, is_free, log_folder
from nnscaler.cli.progress import Progress, StepSize
from nnscaler.cli.reports import Read, Reports
from nnscaler.compiler import Source
from nnscaler.counting import counted
from nnscaler.data.mixture import Dataset, Mixture, samples_of
from nnscaler.data.training import Batches, Counts, First, Share
from nnscaler.errors import UserError
from nnscaler.loaded import LoadedModel
from nnscaler.models.adapters import is_adapter
from nnscaler.models.weights import load_weights
from nnscaler.processes import from_rank_0
from nnscaler.profiler.steps import StepProfiler
from nnscaler.report.values import read_plan
from nnscaler.runtime.loads import ExpertLoads
from nnscaler.runtime.reading import Reading
from nnscaler.watch import Watch

logger = logging.getLogger(__name__)


SCHEDULE = {
    "lr": "peak", "schedule": "kind", "warmup_steps": "steps of warm-up", "minimum": "fraction of the peak at the end",
    "steps": "steps in all",
}  # fmt: skip


def changes_of_schedule(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two schedules of the learning rate, in words; empty: nothing does."""
    names = [name for name in now if before.get(name) != now[name]]
    return "; ".join(f"{SCHEDULE[name]} {now[name]}, which was {before.get(name)}" for name in names)


class TrainingRun:
    """One training run of what was compiled into the folder `code`.

    resume_from  what to load, the best first; empty: begin anew
    own_folder   where this run's checkpoints are already, if torchrun restarted it; else None
    jobs         names of this run's job, on each node (see `nnscaler.checkpoint.owner.job`)
    watch        is told of every step; None: there is one process
    """

    def __init__(
        self,
        args: TrainerArgs,
        code: Path,
        device: torch.device,
        source: Source,
        dataset: Dataset,
        resume_from: list[Path],
        own_folder: Path | None,
        jobs: list[str],
        watch: Watch | None = None,
    ) -> None:
        self.args, self.device, self.dataset, self.watch = args, device, dataset, watch
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.loaded = LoadedModel(code, source, self.args.optimizer, device)
        self.module, self.optimizer, self.mesh = self.loaded.module, self.loaded.optimizer, self.loaded.mesh
        self.share = Share(
            self.module.axes.replica, self.mesh.replicas, self.args.micro_batch_size, self.args.compute.micro_batches
        )
        self.step, self.consumed, self.seed = 0, 0, self.args.seed
        self.eval_loss: float | None = None  # of the weights as they are
        self.peak = self.args.compute.find_hardware().peak(source.dtype)
        predicted = read_plan(code)["predicted"]
        micro_batch = predicted["micro_batch_flops"], predicted["micro_batch_flops_causal"]
        self.flops = tuple(flops / self.args.micro_batch_size for flops in micro_batch)  # of a sequence
        loaded, state = None, None
        if resume_from:
            loaded, state = resume(resume_from, self.module, self.optimizer, self.loaded.fixed, self._load_weights)
        elif self.args.model.weights is not None:
            self._load_weights(self.args.model.weights)
            self.optimizer.load_masters()
        else:
            self.loaded.initialise(self.seed)
        if state is not None:
            self.step, self.consumed, self.seed = state.step, state.consumed, state.seed
            logger.info("continuing from %s: step %d, %d samples", loaded, self.step, self.consumed)
        self.length = RunLength.of(self.args, len(dataset), self.share.step_samples, self.step, self.consumed)
        self.steps = self.length.steps
        self._warn_of_changes(state)
        self.holding: Holding | None = None  # on rank 0
        within = loaded if state is not None and loaded is not None and loaded.is_dir() else None
        self.folder, self.run = self._claim_folder(within, own_folder, jobs)
        self.saved = self.step  # the step last saved, or begun with
        self.random = random_states(self.device)  # as the last step left them
        skipped = state.step - state.updates if state is not None and state.updates is not None else 0
        self.finite = FiniteSteps(skipped)
        self.reports = Reports(state.loss if state is not None else None)
        config = self.args.checkpoint
        check = self.holding.check if self.holding is not None else lambda: None
        assets = self.args.model.save_assets
        self.saver = Saver(self.folder, self.optimizer, self.loaded.fixed, self.device, assets, check)
        if config.interval is not None:
            self.saver.predict_seconds()
        self.due = Due(config.interval or 0, config.minutes)

    def _warn_of_changes(self, state: TrainerState | None) -> None:
        if state is not None and state.samples != len(self.dataset):
            logger.warning(
                "the checkpoint was trained on a dataset of %d samples, this one has %d: samples may come twice or not",
                state.samples, len(self.dataset),
            )  # fmt: skip
        elif state is not None and state.mixture != self._mixture():
            logger.warning(
                "the checkpoint was trained on the mixture %s (name: rows, share), this one is %s: samples may come "
                "twice or not", state.mixture, self._mixture(),
            )  # fmt: skip
        if state is not None and state.seed != self.args.seed:
            logger.warning(
                "the seed stays %d, as in the checkpoint, and is not %d: the order of the data goes on",
                state.seed, self.args.seed,
            )  # fmt: skip
        before = state.step_samples if state is not None else 0
        if before and before != self.share.step_samples:
            logger.warning(
                "a step takes %s from here on, and took %d before: --global_batch_size %d keeps to that",
                counted(self.share.step_samples, "sample"), before, before,
            )  # fmt: skip
        changes = changes_of_schedule(state.schedule, self._schedule()) if state is not None else ""
        if changes:
            logger.warning("the learning rate no longer follows the checkpoint's schedule: %s", changes)

    def _claim_folder(self, loaded: Path | None, own: Path | None, jobs: list[str]) -> tuple[Path, str]:
        """Claims the folder for this run's checkpoints. Returns it, and the run's own name."""
        directory, logs = self.args.checkpoint.directory, self.args.log.directory

        def take() -> tuple[Path, str]:
            self.holding = claim(directory, self.args.name, loaded, own, jobs, lambda name: is_free(logs / name))
            return self.holding.folder, self.holding.claim.run

        folder, run = from_rank_0(take, self.device)
        if not folder.is_dir():
            raise UserError(f"'{folder}' is not seen by rank {self.rank}: checkpoint_dir must be shared by all nodes")
        return folder, run

    def _load_weights(self, directory: Path) -> None:
        logger.info("weights are read from %s", directory)
        load_weights(directory, self.module, self.loaded.model, self.args.model.weight_prefix)
        adapters = [name for name, _ in self.loaded.model.named_parameters() if is_adapter(name)]
        if adapters:
            self.loaded.initialise(self.seed, adapters)

    def train(self) -> None:
        """Steps until `self.steps`; saves every interval and at the end."""
        try:
            self._train()
        finally:
            if self.holding is not None:
                self.holding.release()

    def _train(self) -> None:
        args = self.args
        if self.step >= self.steps:
            logger.info("nothing to do: the run ends at step %d, and step %d is reached", self.steps, self.step)
            return
        samples = samples_of(self.dataset, self.seed, args.model.vocabulary)
        if self.length.samples is not None:
            samples = First(samples, self.length.samples)
        length, ignored = self.dataset.sequence_length, args.dataset.ignored_label
        apart = args.dataset.document_mask
        ahead = Batches(samples, length, self.share, ignored, self.device, apart).after(self.consumed)
        size = StepSize(self.share.step_samples, length, self.mesh, self.flops, self.peak)
        loads = ExpertLoads(self.module.axes)
        progress = Progress(size, self.step, self.module.gives_loss, self.device)
        profiler = StepProfiler(args.log.profile if self.rank == 0 else None, self.module.predicted_seconds)
        logs = log_folder(args.log.directory, self.folder.name, self.run) if self.rank == 0 else None
        about = {"name": args.name, "seed": self.seed, "devices": self.mesh.runtime_ngpus, **self._schedule()}
        log = RunLog(logs, self.run, self.steps, self.step, about if args.log.report_to == "wandb" else None)
        with log, self.saver, profiler, self._termination() as termination:
            evaluation = self._evaluation(termination)
            while self.step < self.steps:
                counts = Counts()
                reported = (self.step + 1) % args.log.interval == 0 or self.step + 1 == self.steps
                with loads.counted() if reported else nullcontext():
                    batches = counts.of(islice(ahead, self.share.micro_batches))
                    loss = self.module.accumulate(batches, self.seed, self.step)
                rate = args.optimizer.lr * args.lr_scheduler.factor(self.step, self.steps)
                with termination.updating:
                    save, stop = self.due.after(self.step + 1, termination.told)
                    if stop:  # what the last update left is saved, and this step given up
                        termination.leave()
                        break
                    self.saver.before_update()
                    norm = self.optimizer.step(counts.labels, rate, loss)
                    self.step += 1
                    self.eval_loss = None
                    self.consumed = self.length.after(self.consumed, self.share.step_samples)
                    self.random = random_states(self.device)
                    progress.add(loss, counts, norm)
                    if self.watch is not None:
                        self.watch.reached(self.step)
                    profiler.step()
                    log.advance()
                    last, read_norm = self.step == self.steps, Reading(norm)
                    if reported:
                        self.reports.add(self.step, self._report(progress.report(self.step), read_norm, rate, loads))
                    # What is read is about the steps before: nothing waits for the one that the device has just begun.
                    self.reports.write(log, before=self.step)
                    self.finite.after(self.step, read_norm)
                if evaluation is not None and evaluation.is_due(self.step, last):
                    with progress.paused():  # and a signal may save meanwhile
                        evaluated = evaluation.run()
                    self.eval_loss = evaluated.get("eval_loss")
                    if evaluated:
                        self.reports.add(self.step, partial(dict, evaluated))
                if save or last:
                    with termination.updating:
                        self.reports.write(log)
                        self._save_if_finite(last)
                        if last:
                            termination.leave()
            if self.step < self.steps:
                self.reports.write(log)
                self._save_if_finite(last=True)
            self.optimizer.finish()
            self.saver.finish()
        if self.rank == 0:
            reason = "stopped by a signal at" if self.step < self.steps else "trained to"
            saved = "no checkpoints" if args.checkpoint.interval is None else f"checkpoints in {self.folder}"
            logger.info("%s step %d; %s", reason, self.step, saved)
            logger.info(self.length.describe(self.consumed))
            for name, seen in self._seen().items():
                logger.info("%s: %s seen", name, counted(seen, "sample"))
        if termination.interrupted:
            raise KeyboardInterrupt

    def _report(self, progress: Read, norm: Reading, rate: float, loads: ExpertLoads) -> Read:
        """What reads all that is reported of the step that has just been launched. Collective."""
        experts, known = loads.report(), {"epoch": self.consumed / len(self.dataset)}
        known |= {f"samples/{name}": seen for name, seen in self._seen().items()}

        def read() -> dict[str, float | None]:
            found = dict(progress())
            (norm_found,) = norm.numbers()
            return {"loss": found.pop("loss"), "gradient_norm": norm_found, "lr": rate, **found, **experts(), **known}

        return read

    def _termination(self) -> Termination:
        store = self.watch.store if self.watch is not None else None
        name = from_rank_0(lambda: uuid.uuid4().hex, self.device)
        return Termination(store, name, self._step_to_save, self._save)

    def _mixture(self) -> dict[str, list[int]]:
        return self.dataset.described() if isinstance(self.dataset, Mixture) else {}

    def _seen(self) -> dict[str, int]:
        """Samples seen of each dataset of a mixture, by its name."""
        if not isinstance(self.dataset, Mixture):
            return {}
        return dict(zip(self.dataset.names, self.dataset.seen(self.seed, self.consumed)))

    def _evaluation(self, termination: Termination) -> Evaluation | None:
        config, data = self.args.evaluation, self.args.dataset

        def go_on() -> bool:
            if self.watch is not None:
                self.watch.reached(self.step)
            return not self.due.any(termination.told)

        if config.dataset is None:
            return None
        given = (data.ignored_label, self.device, data.document_mask)
        return Evaluation(config, config.dataset, self.module, self.share, *given, go_on, self.args.model.vocabulary)

    def _step_to_save(self) -> int | None:
        """After which step this rank is, if that state can be saved; else None. Not collective."""
        return self.step if self.saver.is_finite() else None

    def _save_if_finite(self, last: bool) -> None:
        """Saves, unless that could push out a better checkpoint. Collective.

        last  training ends here. Steps at the end that changed nothing are then saved too, since no later step will be.
        """
        self.finite.settle()
        if self.finite.in_a_row and not last:
            self.due.postpone()
        elif not self.due.all(self.saver.is_finite()):
            message = f"the weights after step {self.step} are not finite: they are not saved"
            if last:
                raise UserError(message)
            if self.rank == 0:
                logger.error(message)
        else:
            self._save()

    def _save(self) -> None:
        """Begins to save what the last update left, unless that has been done already. Collective."""
        if self.args.checkpoint.interval is not None and self.saved != self.step:
            self.saved = self.step
            self.saver.start(self._state(), self.random)

    def _schedule(self) -> dict[str, Any]:
        return {"lr": self.args.optimizer.lr, **asdict(self.args.lr_scheduler), "steps": self.steps}

    def _state(self) -> TrainerState:
        """What a checkpoint says of the last step. Waits for that."""
        self.reports.read()
        self.finite.look()
        return TrainerState(
            step=self.step,
            consumed=self.consumed,
            seed=self.seed,
            samples=len(self.dataset),
            schedule=self._schedule(),
            loss=self.reports.loss,
            run=self.folder.name,
            model=self.args.name,
            processes=self.mesh.runtime_ngpus,
            parameters={
                name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                for name, spec in self.module.specs.items()
                if name in self.loaded.names
            },
            tied=self.module.tied,
            prefix=self.args.model.weight_prefix,
            saved_at=time.time(),
            owner=self.run,
            updates=self.step - self.finite.skipped,
            eval_loss=self.eval_loss,
            mixture=self._mixture(),
            step_samples=self.share.step_samples,
            keep=0 if self.finite.in_a_row else self.args.checkpoint.keep,
        )
