"""Trains a Hugging Face causal language model with a distributed plan that is found and compiled automatically.

Plan only, on any machine, for any cluster:

    python train.py --run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --sequence_length 131072 \\
        --plan_ngpus 8 --runtime_ngpus 8 --enable-chunk-loss --hardware h100

Train (compiles first where no matching plan is there):

    torchrun --nproc_per_node=2 train.py --plan_ngpus 1 --runtime_ngpus 2 --name llama3_debug \\
        --model_id ./llama3_mini --dataset_path ./bookcorpus_llama3_4K
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnscaler.cli.config import (
    AdapterConfig,
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    LogConfig,
    LRSchedulerConfig,
    ModelConfig,
    TrainerArgs,
)
from nnscaler.cli.flags import Flags, keys_of, parse
from nnscaler.command import run
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.data.files import is_url
from nnscaler.data.weighted import WeightedDataset, spelled
from nnscaler.directory import check_writable
from nnscaler.errors import UserError
from nnscaler.lazy import uncollected
from nnscaler.options import REQUIRED, assignments, check, switch, text, words

# torch and transformers take seconds to import: what is wrong with a flag is said before.

DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}
KERNELS = (
    "auto",
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "cudnn",
    "sdpa",
    "flex_attention",
    "rows",
    "eager",
)


@dataclass(frozen=True)
class Inputs:
    """What is trained, and on what."""

    model_id: str = text(REQUIRED, "model directory (with safetensors, or only config.json), or a name on the hub")
    set: Mapping[str, str] = assignments(
        "another field of the model's configuration and its new value, such as max_position_embeddings=131072 or "
        '\'rope_parameters={"rope_type": "yarn", ...}\'; may be given several times'
    )
    dataset_path: tuple[str, ...] | None = words(
        None, "dataset that bookcorpus.py wrote, or folder or URL of Parquet files with such rows, which are read a "
        "little at a time; or several, each as PATH=WEIGHT, from which samples are drawn by weight", shown="PATH",
    )  # fmt: skip
    eval_dataset_path: str | None = text(
        None, "one dataset like these that is evaluated between steps, and not trained on (default: no validation)",
        shown="PATH",
    )  # fmt: skip
    enable_chunk_loss: bool = switch(
        "compute the last projection and the loss in chunks of 2048 tokens, so that memory never holds all logits "
        "at once",
        flag="enable-chunk-loss",
    )
    attn_implementation: str = text(
        "auto", "attention kernel on a GPU; auto: the fastest of those that are installed; eager: as the model writes "
        "it, with all scores", choices=KERNELS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        paths = [*(("dataset_path", one.path) for one in self.sources), ("eval_dataset_path", self.validation)]
        for name, given in paths:
            if given is not None and not is_url(given) and not Path(given).exists():
                raise UserError(f"{name} is '{given}', which does not exist; make one with bookcorpus.py")

    @property
    def sources(self) -> list[WeightedDataset]:
        """What is trained on."""
        return WeightedDataset.read_all(self.dataset_path or (), "dataset_path")

    @property
    def validation(self) -> str | None:
        """What is evaluated between steps: a path or a URL."""
        return None if self.eval_dataset_path is None else spelled(self.eval_dataset_path)


GROUPS: dict[str, type] = {
    "what to train": Inputs,
    "adapters": AdapterConfig,
    "sequences": DatasetConfig,
    "the run": TrainerArgs,
    "cluster and plan": ComputeConfig,
    "optimizer": OptimizerConfig,
    "learning rate": LRSchedulerConfig,
    "validation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
    "reports": LogConfig,
}
# Where they are others than the engine's. Without a number of devices, torchrun knows it.
DEFAULTS = {
    "name": "llama", "learning_rate": 5e-5, "runtime_ngpus": None,
    # What these are depends on global_batch_size: see `divided`.
    "plan_ngpus": None, "micro_batch_size": None, "grad_accumulation_steps": None, "explore_pipeline": None,
}  # fmt: skip
FIELDS = {"grad_accumulation_steps": "micro_batches"}  # where they are called otherwise than their flags
WITHOUT_BATCH = {"plan_ngpus": 1, "micro_batch_size": 1, "grad_accumulation_steps": 4}


def read_flags() -> tuple[Flags, Inputs, TrainerArgs]:
    """What the command line says, judged as far as it goes without the model and the data, which `complete` adds.

    Raises UserError for what is not allowed, or does not go together.
    """
    flags = parse(__doc__ or "", GROUPS, DEFAULTS)
    inputs = flags.make(Inputs)
    flags.make(AdapterConfig)
    fixed, left_open = divided(flags)
    explores = flags["explore_pipeline"]
    explores = flags["global_batch_size"] is not None if explores is None else explores
    args = flags.make(
        TrainerArgs,
        micro_batch_size=fixed["micro_batch_size"],
        left_open=left_open,
        model=ModelConfig(make=_not_read_yet),
        dataset=flags.make(DatasetConfig) if not inputs.sources else DatasetConfig(sequence_length=2),
        compute=flags.make(
            ComputeConfig,
            plan_ngpus=fixed["plan_ngpus"],
            runtime_ngpus=devices(flags, fixed["plan_ngpus"], left_open),
            micro_batches=fixed["grad_accumulation_steps"],
            explore_pipeline=explores,
        ),
        optimizer=flags.make(OptimizerConfig),
        lr_scheduler=flags.make(LRSchedulerConfig),
        evaluation=flags.make(EvaluationConfig),
        checkpoint=flags.make(CheckpointConfig),
        log=flags.make(LogConfig),
    )
    if args.run_mode == "run" and not inputs.sources:
        raise UserError("training needs a dataset_path; without one only --run_mode compile works")
    if os.environ.get("RANK", "0") == "0":
        written = {"gen_savedir": args.gen_savedir}
        if args.run_mode == "run":
            written |= {"checkpoint_dir": args.checkpoint.directory, "log_dir": args.log.directory}
        if args.run_mode == "run" and args.log.profile is not None:
            written["profile"] = args.log.profile
        for flag, folder in written.items():
            check_writable(folder, flag)
    return flags, inputs, args


def divided(flags: Flags) -> tuple[dict[str, int], tuple[str, ...]]:
    """How a step is divided, as far as the flags fix it; and the fields of `TrainerArgs.left_open`."""
    given = {name: flags[name] for name in WITHOUT_BATCH if flags[name] not in (None, "auto")}
    if flags["global_batch_size"] is not None:
        # The fields have values of their own, which do not count.
        left_open = [name for name in WITHOUT_BATCH if name not in given]
        return {**dict.fromkeys(WITHOUT_BATCH, 1), **given}, tuple(FIELDS.get(name, name) for name in left_open)
    if flags["plan_ngpus"] == "auto":
        raise UserError("plan_ngpus is auto, which needs a global_batch_size: the sequences of a step")
    return WITHOUT_BATCH | given, ()


def devices(flags: Flags, plan_ngpus: int, left_open: tuple[str, ...]) -> int:
    """Devices in all: those that are given, or else that torchrun has started processes for, or else those of a
    copy."""
    known = flags["runtime_ngpus"] or os.environ.get("WORLD_SIZE")
    if known is None and "plan_ngpus" in left_open and flags["run_mode"] == "compile":
        raise UserError(
            "to divide a global_batch_size, --run_mode compile needs runtime_ngpus: how many devices there are"
        )
    return int(known or plan_ngpus)


def _not_read_yet() -> Any:
    raise AssertionError("the model is added later")


def complete(flags: Flags, inputs: Inputs, args: TrainerArgs) -> TrainerArgs:
    """`args` with the model and the data. Raises UserError for what does not go together."""
    from chunk_linear_cross_entropy import in_chunks
    from nnscaler.cli.precision import with_precision
    from nnscaler.models import load_config, marks_of
    from nnscaler.models.adapters import PREFIX
    from nnscaler.models.causal_lm import (
        WEIGHT_PREFIX,
        CausalLM,
        prepare_config,
    )
    from nnscaler.models.changes import changed_config
    from nnscaler.models.files import AssetWriter, find_weights

    args = with_precision(args)
    config = load_config(inputs.model_id)
    if inputs.set:
        config = changed_config(config, dict(inputs.set))
    opened = validation = None
    if inputs.sources or inputs.validation:
        from nnscaler.data.mixture import open_dataset, open_sources  # planning alone need not wait for Parquet

        opened = open_sources(inputs.sources)
        validation = open_dataset(inputs.validation, "eval_dataset_path") if inputs.validation else None
    dataset = flags.make(DatasetConfig, dataset=opened)
    positions = dataset.positions
    if validation is not None and dataset.document_mask:
        positions = max(positions, validation.document_lengths.positions)
    prepare_config(config, positions, inputs.attn_implementation, dataset.document_mask)
    loss = in_chunks if inputs.enable_chunk_loss else None
    adapters = flags.make(AdapterConfig).lora(inputs.model_id)
    prepared = Path(inputs.sources[0].path) if inputs.sources else None  # with the tokenizer, if the model has none
    reads_weights = args.run_mode == "run" and not args.checkpoint.resume
    model = ModelConfig(
        make=lambda: CausalLM(config, loss, dataset.mean_document, adapters),
        weights=find_weights(inputs.model_id) if reads_weights else None,
        weight_prefix=WEIGHT_PREFIX + (PREFIX if adapters is not None else ""),
        vocabulary=config.vocab_size,
        marks=marks_of(config),
        instead={}
        if loss
        else {"--enable-chunk-loss": lambda: CausalLM(config, in_chunks, dataset.mean_document, adapters)},
        save_assets=AssetWriter(config, DTYPES[args.precision], inputs.model_id, prepared, positions, adapters),
        name=Path(inputs.model_id).name if Path(inputs.model_id).exists() else inputs.model_id,
    )
    return replace(
        args, model=model, dataset=dataset, evaluation=replace(args.evaluation, dataset=validation),
        command=planning_command(flags, model.name, args, dataset),
    )  # fmt: skip


def planning_command(flags: Flags, model: str, args: TrainerArgs, dataset: DatasetConfig) -> str:
    """What plans the same: without the flags that the plan does not depend on, and without this computer's folders."""
    keys = [
        *keys_of(Inputs),
        *keys_of(AdapterConfig),
        *keys_of(DatasetConfig),
        *keys_of(ComputeConfig),
        "global_batch_size",
        "micro_batch_size",
        "precision",
        "fp8_keep_bf16",
    ]
    hardware = args.compute.hardware and Path(args.compute.hardware).name
    given = flags.spelled(
        [key for key in keys if not key.endswith("dataset_path")], model_id=model, sequence_length=dataset.length,
        document_length=dataset.mean_document,
        runtime_ngpus=args.compute.runtime_ngpus, hardware=hardware, precision=args.precision,
    )  # fmt: skip
    return f"train.py --run_mode compile {given}"


def main() -> None:
    flags, inputs, args = read_flags()
    with uncollected():
        from nnscaler.cli.trainer import Trainer

        trainer = Trainer(complete(flags, inputs, args))
    trainer.run()
    if trainer.args.explain and trainer.rank == 0:
        from nnscaler.report import explain, read_plan

        print(explain(read_plan(trainer.gen_folder)))
        print(f"more in    {trainer.gen_folder / 'plan.html'}")


if __name__ == "__main__":
    run(main)
