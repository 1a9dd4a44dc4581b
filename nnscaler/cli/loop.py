"""The training loop: steps, logs and checkpoints."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nnscaler.checkpoint import folder as checkpoints
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.resume import load_safetensors, resume
from nnscaler.checkpoint.sharded import owned_state, save_parts
from nnscaler.cli.config import TrainerArgs
from nnscaler.cli.log import RunLog
from nnscaler.compiler import Source
from nnscaler.data.training import Batches, PackedDataset, Share
from nnscaler.profiler.steps import StepProfiler
from nnscaler.runtime.module import ParallelModule
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.weights import initial_parameters

logger = logging.getLogger(__name__)


class TrainingRun:
    """One training run of what was compiled into `code`."""

    def __init__(
        self,
        args: TrainerArgs,
        code: Path,
        device: torch.device,
        source: Source,
        dataset: PackedDataset,
        resume_from: Path | None,
    ) -> None:
        self.args, self.device, self.dataset = args, device, dataset
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.module = ParallelModule(code, device)
        self.mesh = self.module.axes.mesh
        self.optimizer = ShardedOptimizer(self.module.buckets, self.args.optimizer, self.mesh.plan_ngpus)
        self.step, self.consumed, self.seed = 0, 0, self.args.seed
        state = resume(resume_from, self.module, self.optimizer, self.args.model.weight_prefix) if resume_from else None
        if state is not None:
            self.step, self.consumed, self.seed = state.step, state.consumed, state.seed
            logger.info("continuing from %s: step %d, %d samples", resume_from, self.step, self.consumed)
        elif resume_from is None:
            self._first_weights(source)
        self.share = Share(
            self.module.axes.replica, self.mesh.replicas, self.args.micro_batch_size, self.args.compute.micro_batches
        )
        left = max(1, len(dataset) // self.share.step_samples)
        self.steps = self.args.max_train_steps or left
        self.folder = self._run_folder(resume_from)

    def _first_weights(self, source: Source) -> None:
        model = self.args.model
        if model.weights is not None:
            load_safetensors(model.weights, self.module, model.weight_prefix)
        else:
            wanted = self.module.parameters_to_load()
            for name, value in initial_parameters(source.build()[0], self.seed, self.device):
                if name in wanted:
                    self.module.load_one(name, value[self.module.box(name).slices])
        self.optimizer.load_masters()

    def _run_folder(self, resume_from: Path | None) -> Path:
        """Where this run's checkpoints go: where they were when it continues, else a folder with no other run's."""
        directory = self.args.checkpoint.directory
        chosen = [directory / self.args.name]
        if resume_from is not None and checkpoints.is_checkpoint(resume_from):
            chosen = [resume_from.resolve().parent]
        elif self.rank == 0:
            chosen = [checkpoints.new_run_folder(directory, self.args.name)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, src=0, device=self.device)
        return chosen[0]

    def train(self) -> None:
        """Steps until `self.steps`; saves every interval and at the end."""
        args = self.args
        if self.step >= self.steps:
            logger.info("nothing to do: step %d of %d is reached", self.step, self.steps)
            return
        batches = Batches(self.dataset, self.seed, self.share, args.dataset.ignored_label, self.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # losses, labels since the last report
        since, reported = time.perf_counter(), self.step
        profiler = StepProfiler(args.log.profile if self.rank == 0 else None)
        with RunLog(args.log.directory / self.folder.name, self.steps, self.step, self.rank == 0) as log:
            while self.step < self.steps:
                labels = 0
                for batch, count in batches.step(self.consumed):
                    loss = self.module(**batch)
                    loss.backward()
                    self.module.reducer.end_micro_batch()
                    total[0] += loss.detach()
                    labels += count
                self.module.reducer.finish()
                total[1] += labels
                rate = args.optimizer.lr * args.lr_scheduler.factor(self.step, self.steps)
                norm = self.optimizer.step(labels, rate)
                self.step += 1
                self.consumed += self.share.step_samples
                profiler.step()
                log.advance()
                if self.step % args.log.interval == 0 or self.step == self.steps:
                    if dist.is_initialized():
                        dist.all_reduce(total)
                    values = {
                        "loss": (total[0] / total[1].clamp(min=1)).item(),
                        "gradient_norm": norm.item(),
                        "lr": rate,
                    }
                    elapsed = time.perf_counter() - since
                    log.write(self.step, {**values, **self._speed(self.step - reported, elapsed)})
                    total.zero_()
                    since, reported = time.perf_counter(), self.step
                interval = args.checkpoint.interval
                if interval is not None and (self.step == self.steps or (interval and self.step % interval == 0)):
                    self.save()
        if self.rank == 0:
            logger.info("trained to step %d; checkpoints in %s", self.step, self.folder)

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        sequences = steps * self.share.step_samples / seconds / self.mesh.runtime_ngpus  # a second and GPU
        values = {
            "tokens_per_second_per_gpu": sequences * self.dataset.sequence_length,
            "seconds_per_step": seconds / steps,
        }
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        flops = self.args.model.flops_per_sequence
        hardware = self.args.compute.find_hardware()
        peak = hardware.flops.get("bfloat16" if self.args.precision == "bf16" else "float32")
        if flops is not None and peak and self.device.type == "cuda":
            values["mfu"], values["mfu_causal"] = flops[0] * sequences / peak, flops[1] * sequences / peak
        return values

    def save(self) -> None:
        """Writes a checkpoint: every rank its parts, then rank 0 the rest and the name. Collective."""
        final = checkpoints.step_folder(self.folder, self.step)
        work = checkpoints.working_folder(final)
        if self.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        if dist.is_initialized():
            dist.barrier()
        save_parts(work, owned_state(self.optimizer))
        if self.rank == 0:
            self._state().write(work)
            if self.args.model.save_assets is not None:
                self.args.model.save_assets(work / checkpoints.ASSETS)
            checkpoints.publish(work, final)
            checkpoints.remove_old(self.folder, self.args.checkpoint.keep)
        if dist.is_initialized():
            dist.barrier()

    def _state(self) -> TrainerState:
        parameters = {
            name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
            for name, spec in self.module.specs.items()
            if spec.trained
        }
        return TrainerState(
            step=self.step,
            consumed=self.consumed,
            seed=self.seed,
            run=self.folder.name,
            model=self.args.name,
            parameters=parameters,
            tied=self.module.tied,
            prefix=self.args.model.weight_prefix,
            saved_at=checkpoints.now(),
        )
