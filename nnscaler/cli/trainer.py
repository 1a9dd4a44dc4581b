"""The trainer: compiles where that is needed, then trains."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from nnscaler.checkpoint.checksums import CorruptCheckpoint
from nnscaler.checkpoint.folder import is_checkpoint
from nnscaler.cli.config import TrainerArgs
from nnscaler.cli.precision import with_precision
from nnscaler.compiler import Source, compile_model
from nnscaler.data.documents import document_inputs
from nnscaler.data.training import with_labels
from nnscaler.errors import UserError
from nnscaler.models.weights import WeightFiles, check_weights
from nnscaler.processes import (
    check_world,
    from_all,
    from_rank_0,
    join_processes,
    leave_processes,
    own_device,
    wait_for_steps_of,
)
from nnscaler.trace import STRATEGIES
from nnscaler.watch import Watch

if TYPE_CHECKING:
    from nnscaler.data.mixture import Dataset, Part

logger = logging.getLogger(__name__)

_PRECISION = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}  # of weights


class Trainer:
    """Trains a model, as its arguments say: `Trainer(args).run()`, in one process or under torchrun."""

    def __init__(self, args: TrainerArgs) -> None:
        self.args = with_precision(args)
        self.batch = self.args.batch
        divisions = self.batch.divisions() if self.batch is not None else []
        if len(divisions) == 1:  # there is nothing to choose
            self.args, self.batch = self.args.divided(divisions[0]), None
        self.rank = int(os.environ.get("RANK", 0))
        if self.rank > 0:
            logging.getLogger("nnscaler").setLevel(logging.ERROR)  # one rank reports
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.watch: Watch | None = None

    def run(self) -> None:
        """Compiles, or trains to the last step."""
        if self.args.run_mode == "compile":
            if self.rank == 0:
                compile_model(self._source(), self.args.compute, self.gen_folder, self.args.explain, self.batch)
            return
        # What only training needs takes a second to import, which planning need not wait for.
        from nnscaler.checkpoint.owner import job
        from nnscaler.checkpoint.resume import where_to_begin
        from nnscaler.cli.loop import TrainingRun
        from nnscaler.loaded import compiled, division_in, out_of_memory, predicted_step_seconds

        check_world(self.args.compute.runtime_ngpus)
        device = own_device()
        dataset = self._dataset()
        source = self._source()
        if self.world > 1:
            self.watch = join_processes(device)
        ended = False
        try:
            from_rank_0(lambda: self._judge(dataset), device)
            validation = self.args.evaluation.dataset
            if validation is not None:
                from_rank_0(lambda: self._judge_ids(validation), device)
            checkpoint = self.args.checkpoint
            jobs = sorted({name for name in from_all(job()) if name is not None})
            begin = from_rank_0(lambda: where_to_begin(checkpoint.directory, checkpoint.resume, jobs), device)
            judge = partial(self._check_weights, begin[0])
            with compiled(source, self.args.compute, self.gen_folder, device, judge, self.batch):
                if self.batch is not None:
                    division = division_in(self.gen_folder)
                    assert division is not None, "what was compiled says it"
                    self.args = self.args.divided(division)
                run = TrainingRun(self.args, self.gen_folder, device, source, dataset, *begin, jobs, self.watch)
            if self.watch is not None:
                wait_for_steps_of(predicted_step_seconds(self.gen_folder), self.watch)
            try:
                run.train()
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error, self.gen_folder, device) from error
            ended = True
        except UserError as error:  # of this rank alone, perhaps: of the rows that it reads
            if self.watch is not None:
                self.watch.failed(error)
            raise
        except RuntimeError:
            if self.watch is not None:
                if failure := self.watch.failure():
                    raise failure from None
                self.watch.explain()
            raise
        finally:
            if self.watch is not None:
                self.watch.close()
            leave_processes(failed=not ended)

    @property
    def gen_folder(self) -> Path:
        return self.args.gen_savedir / self.args.name

    def _dataset(self) -> Dataset:
        dataset = self.args.dataset.dataset
        if dataset is None:
            raise UserError("training needs a dataset_path; without one only --run_mode compile works")
        return dataset

    def _judge(self, dataset: Dataset) -> None:
        """Raises UserError as `_judge_ids` does; says where a step takes more samples than there are."""
        for part in dataset.parts:
            self._judge_ids(part)
        if self.args.dataset.document_mask:
            lengths = dataset.document_lengths
            logger.info("documents are kept apart: %s", lengths)
            if lengths.cut:
                logger.warning(
                    "documents longer than the %d tokens of a sequence: %d; each goes on in the next one as a document "
                    "of its own, from position 0", dataset.sequence_length, lengths.cut,
                )  # fmt: skip
        step = self.args.step_samples
        if step > len(dataset):
            comes = "takes some of them several times" if self.args.max_train_steps else "is not full"
            logger.warning(
                "a step takes %d samples%s, and the dataset has %d: it %s", step, self._copies(), len(dataset), comes
            )

    def _copies(self) -> str:
        """Where the samples of a step come from, in brackets; nothing where the planner chooses that."""
        if self.batch is not None:
            return ""
        compute, size = self.args.compute, self.args.micro_batch_size
        copies = compute.runtime_ngpus // compute.plan_ngpus
        return f" ({copies} copies, {compute.micro_batches} micro-batches of {size})"

    def _judge_ids(self, dataset: Part) -> None:
        """Raises UserError where a dataset holds ids that the model does not know; warns where others than the model's
        stand around its documents."""
        vocabulary = self.args.model.vocabulary
        if vocabulary is not None:
            smallest, largest = dataset.token_ids()
            if smallest < 0 or largest >= vocabulary:
                place = dataset.place_outside(vocabulary)
                raise UserError(
                    f"dataset '{dataset.path}' holds token ids from {smallest} to {largest}, and the model knows those "
                    f"from 0 to {vocabulary - 1} ({place}); prepare it with the model's own tokenizer"
                )
        for name, id_ in dataset.marks().items():
            known = self.args.model.marks.get(name, ())
            if known and id_ not in known:
                logger.warning(
                    "dataset '%s' was made with a tokenizer whose %s token is id %d, and the model's configuration "
                    "says %s: the tokenizer may not be the model's",
                    dataset.path, name, id_, " or ".join(map(str, known)),
                )  # fmt: skip

    def _source(self) -> Source:
        shape = (self.args.micro_batch_size, self.args.dataset.length)
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        if STRATEGIES[self.args.compute.trace_strategy].executes:
            vocabulary = self.args.model.vocabulary
            if vocabulary is None:
                raise UserError("ModelConfig.vocabulary is not given; trace strategies that execute need it")
            tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(self.args.seed))
        inputs = with_labels(tokens, self.args.dataset.ignored_label)
        if self.args.dataset.document_mask:
            one_a_row = document_inputs([np.zeros(1, np.int64)] * shape[0], shape[1])
            inputs |= {name: tensor.to(tokens.device) for name, tensor in one_a_row.items()}
        model, sequences = self.args.model, self.args.micro_batch_size
        return Source(
            model.make,
            inputs,
            _PRECISION[self.args.precision],
            self.args.seed,
            tokens=sequences * self.args.dataset.length,
            name=model.name,
            length=self.args.dataset.length,
            command=self.args.command,
            instead=model.instead,
            document_length=self.args.dataset.mean_document,
            fp8=self.args.precision == "fp8",
            fp8_keep_bf16=self.args.fp8_keep_bf16,
        )

    def _check_weights(self, resume_from: list[Path], model: nn.Module) -> None:
        """Raises UserError where the checkpoint or the weights' files do not fit the model."""
        from nnscaler.checkpoint.resume import check_fits  # see `run`

        named, prefix = self.args.model.name or type(model).__name__, self.args.model.weight_prefix
        if resume_from and (resume_from[0].is_file() or is_checkpoint(resume_from[0])):
            with suppress(CorruptCheckpoint):  # loading meets it again, and takes the next
                check_fits(resume_from[0], model, named, prefix)
            return
        weights = self.args.checkpoint.resume or self.args.model.weights
        if weights is not None and WeightFiles.find(weights) is not None:
            check_weights(weights, model, prefix)
