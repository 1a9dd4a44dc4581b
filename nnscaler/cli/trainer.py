"""The trainer: compiles where needed, then trains, logs and saves."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nnscaler.checkpoint import folder as checkpoints
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.resume import find_resumable, load_safetensors, resume
from nnscaler.checkpoint.sharded import owned_state, save_parts
from nnscaler.cli.config import TrainerArgs
from nnscaler.cli.log import RunLog
from nnscaler.compiler import Source, compile_model, differences, identity
from nnscaler.data.training import Batches, PackedDataset, Share
from nnscaler.errors import UserError
from nnscaler.profiler.steps import StepProfiler
from nnscaler.runtime.module import ParallelModule
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.weights import initial_parameters

logger = logging.getLogger(__name__)

_PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Trainer:
    """Trains a model as `TrainerArgs` say: `Trainer(args).run()`, on one process or under torchrun."""

    def __init__(self, args: TrainerArgs) -> None:
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        if self.rank > 0:
            logging.getLogger("nnscaler").setLevel(logging.ERROR)  # one rank reports
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def run(self) -> None:
        """Compiles, or trains to the last step."""
        if self.args.run_mode == "compile":
            if self.rank == 0:
                compile_model(self._source(), self.args.compute, self.gen_folder, self.args.explain)
            return
        self._check_world()
        dataset = self._dataset()
        source = self._source()
        resume_from = find_resumable(self.args.checkpoint.resume) if self.args.checkpoint.resume else None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", device_id=self._device_id)
        try:
            self._compile_if_needed(source)
            _Run(self, source, dataset, resume_from).train()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def _device_id(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None

    @property
    def gen_folder(self) -> Path:
        return self.args.gen_savedir / self.args.name

    def _check_world(self) -> None:
        wanted = self.args.compute.runtime_ngpus
        if self.world != wanted:
            raise UserError(
                f"runtime_ngpus is {wanted}, but {self.world} processes run; "
                f"start with torchrun --nproc_per_node={wanted} (or --nnodes and --nproc_per_node that multiply to it)"
            )
        if self.device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, "
                f"this node has {torch.cuda.device_count()} GPUs"
            )

    def _dataset(self) -> PackedDataset:
        dataset, vocabulary = self.args.dataset.dataset, self.args.model.vocabulary
        if dataset is None:
            raise UserError("training needs a dataset_path; without one only --run_mode compile works")
        if vocabulary is not None and dataset.vocabulary > vocabulary:
            raise UserError(
                f"dataset '{dataset.path}' was made with a vocabulary of {dataset.vocabulary} tokens, the model knows "
                f"{vocabulary}; prepare it with the model's own tokenizer"
            )
        return dataset

    def _source(self) -> Source:
        shape = (self.args.micro_batch_size, self.args.dataset.length)
        inputs = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
        model, sequences = self.args.model, self.args.micro_batch_size
        flops = model.flops_per_sequence
        return Source(
            model.make,
            inputs,
            _PRECISION[self.args.precision],
            tokens=sequences * self.args.dataset.length,
            flops=(sequences * flops[0], sequences * flops[1]) if flops else None,
        )

    def _compile_if_needed(self, source: Source) -> None:
        """Rank 0 compiles unless the folder holds just what is wanted; the others wait."""
        error: list[UserError | None] = [None]
        if self.rank == 0:
            model, _ = source.build()
            changed = differences(self.gen_folder, identity(source, model, self.args.compute))
            try:
                if changed is None:
                    compile_model(source, self.args.compute, self.gen_folder)
                elif changed:
                    logger.warning(
                        "%s was compiled for something else (%s): compiling", self.gen_folder, "; ".join(changed)
                    )
                    compile_model(source, self.args.compute, self.gen_folder)
                else:
                    logger.info("using the compiled plan in %s", self.gen_folder)
            except UserError as failure:
                error[0] = failure
        if self.world > 1:
            dist.broadcast_object_list(error, src=0, device=self.device)
        if error[0] is not None:
            raise error[0]


class _Run:
    """One training run after compilation."""

    def __init__(self, trainer: Trainer, source: Source, dataset: PackedDataset, resume_from: Path | None) -> None:
        self.args, self.rank, self.device, self.dataset = trainer.args, trainer.rank, trainer.device, dataset
        self.module = ParallelModule(trainer.gen_folder, trainer.device)
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
