"""Trains a Hugging Face causal language model with a distributed plan that is found and compiled automatically.

Plan only, on any machine, for any cluster:

    python train.py --run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --sequence_length 131072 \\
        --plan_ngpus 8 --runtime_ngpus 8 --enable-chunk-loss --hardware h100

Train (compiles first where no matching plan is there):

    torchrun --nproc_per_node=2 train.py --plan_ngpus 1 --runtime_ngpus 2 --name llama3_debug \\
        --model_id ./llama3_mini --dataset_path ./bookcorpus_llama3_4K
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.cli.args import ArgumentParser, run
from nnscaler.cli.config import (
    SCHEDULES,
    CheckpointConfig,
    DatasetConfig,
    LogConfig,
    LRSchedulerConfig,
    ModelConfig,
    TrainerArgs,
)
from nnscaler.cli.trainer import Trainer
from nnscaler.compiler import ComputeConfig
from nnscaler.data.training import PackedDataset
from nnscaler.hardware import hardware_names
from nnscaler.models import load_config
from nnscaler.models.attention import IMPLEMENTATIONS
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, count_parameters, flops_per_sequence, prepare_config
from nnscaler.models.files import AssetWriter, find_weights
from nnscaler.pipeline.schedules import KINDS
from nnscaler.report import explain, read_plan
from nnscaler.runtime.optimizer import OptimizerConfig
from nnscaler.trace import STRATEGIES

logger = logging.getLogger(__name__)

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("what to train").add_argument
    add("--name", default="llama", help="name of the run: of its compiled code, checkpoints and logs")
    add("--run_mode", choices=("compile", "run"), default="run", help="compile: plan and write code; run: train")
    add("--explain", action="store_true", help="with --run_mode compile: print what the plan costs, what limits it, "
        "and what would help, for which it plans a few times more")  # fmt: skip
    add("--model_id", required=True, help="model directory (with safetensors, or only config.json), or hub name")
    add("--dataset_path", type=Path, help="dataset that bookcorpus.py wrote")
    add("--sequence_length", type=int, help="tokens a sequence, to plan without a dataset")
    add("--resume_path", type=Path, help="checkpoint, folder of checkpoints (the newest counts), merged file, or model "
        "directory with safetensors (weights only)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the data's order, and of weights where the model has none")

    add = parser.add_argument_group("cluster and plan").add_argument
    add("--plan_ngpus", type=int, default=1, help="devices that one copy of the model is split over")
    add("--runtime_ngpus", type=int, help="devices in all (default: processes that torchrun started, or plan_ngpus)")
    add("--gpu_mem_constraint", type=float, help="memory a device that the plan may use, in GB of 2^30 bytes "
        "(default: 90 %% of the device's)")  # fmt: skip
    add("--hardware", help=f"plan for this hardware: {', '.join(hardware_names())}, or a .json file like theirs "
        "(default: this machine's)")  # fmt: skip
    add("--trace_strategy", choices=STRATEGIES, default="reuse_cache", help="how the model is traced; "
        + "; ".join(f"{name}: {strategy.summary}" for name, strategy in STRATEGIES.items()))  # fmt: skip
    add("--enable_chunk_loss", action="store_true", help="last projection and loss in chunks of 1024 tokens, "
        "never holding all logits")  # fmt: skip
    add("--recompute_modules", default="", help="comma-separated class names: what modules of these "
        "classes compute, and nothing else, is computed again in backward (default: the planner chooses)")  # fmt: skip
    add("--explore_pipeline", action="store_true", help="search pipelines too, and take one where it is faster")
    add("--pipeline_pivots", default="", help="comma-separated class names of modules at which pipeline stages may "
        "begin (default: the repeated one)")  # fmt: skip
    add("--pipeline_schedule", choices=tuple(KINDS), help="pipeline with this schedule (default: the fastest)")
    add("--pipeline_nstages", type=int, help="pipeline with so many stages (default: as many as are fastest)")
    add("--attn_implementation", choices=IMPLEMENTATIONS, default="auto", help="attention kernel on a GPU; auto: the "
        "fastest of those that are installed; eager: as the model writes it, scores and all")  # fmt: skip

    add = parser.add_argument_group("optimisation").add_argument
    add("--max_train_steps", type=int, help="optimizer steps in all (default: one pass over the dataset)")
    add("--micro_batch_size", type=int, default=1, help="sequences a replica computes at a time")
    add("--grad_accumulation_steps", type=int, default=4, help="micro-batches a replica accumulates in a step")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: bf16 weights with fp32 masters")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate of AdamW")
    add("--lr_schedule", choices=SCHEDULES, default="cosine", help="fall of the learning rate after warm-up")
    add("--warmup_steps", type=int, default=0, help="steps in which the learning rate rises")
    add("--min_learning_rate", type=float, default=0.1, help="where the schedule ends, as a fraction of the peak")
    add("--weight_decay", type=float, default=0.1, help="decoupled weight decay of matrices")
    add("--clip_gnorm", type=float, default=1.0, help="largest norm of the gradient; 0: no clipping")

    add = parser.add_argument_group("files").add_argument
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder for checkpoints, one folder a run")
    add("--checkpoint_interval", type=int, default=100, help="steps between checkpoints; 0: not by steps. There is "
        "always one of the last step, and on SIGTERM one of the step then reached")  # fmt: skip
    add("--checkpoint_minutes", type=float, default=0.0, help="minutes between checkpoints; 0: not by time")
    add("--keep_checkpoints", type=int, default=3, help="newest checkpoints that are kept, beside those that the links "
        "last and best (lowest training loss) point to; 0: all")  # fmt: skip
    add("--log_dir", type=Path, default=Path("runs"), help="folder for TensorBoard and metrics.jsonl")
    add("--log_interval", type=int, default=1, help="steps between reports")
    add("--profile", type=Path, help="folder for a torch profiler trace of two steps, and where their time went")
    add("--gen_savedir", type=Path, default=Path(".nnscaler"), help="folder for compiled plans and code")
    return parser.parse_args()


def trainer_args(options: argparse.Namespace) -> TrainerArgs:
    """What the flags mean. Raises UserError for what does not go together."""
    config = load_config(options.model_id)
    packed = PackedDataset.open(options.dataset_path) if options.dataset_path else None
    dataset = DatasetConfig(packed, options.sequence_length)
    length = dataset.length
    prepare_config(config, length, options.attn_implementation)
    loss = chunk_linear_cross_entropy if options.enable_chunk_loss else None
    weights = find_weights(options.model_id) if options.run_mode == "run" and not options.resume_path else None
    model = ModelConfig(
        make=lambda: CausalLM(config, loss),
        weights=weights,
        weight_prefix=WEIGHT_PREFIX,
        vocabulary=config.vocab_size,
        flops_per_sequence=flops_per_sequence(config, count_parameters(config), length),
        save_assets=AssetWriter(config, DTYPES[options.precision], options.model_id, options.dataset_path),
    )
    runtime_ngpus = options.runtime_ngpus or int(os.environ.get("WORLD_SIZE", options.plan_ngpus))
    compute = ComputeConfig(
        plan_ngpus=options.plan_ngpus,
        runtime_ngpus=runtime_ngpus,
        trace_strategy=options.trace_strategy,
        gpu_mem_constraint=options.gpu_mem_constraint,
        recompute_modules=tuple(filter(None, options.recompute_modules.split(","))) or None,
        micro_batches=options.grad_accumulation_steps,
        hardware=options.hardware,
        explore_pipeline=options.explore_pipeline,
        pipeline_pivots=tuple(filter(None, options.pipeline_pivots.split(","))),
        pipeline_schedule=options.pipeline_schedule,
        pipeline_nstages=options.pipeline_nstages,
    )
    return TrainerArgs(
        name=options.name,
        model=model,
        compute=compute,
        dataset=dataset,
        optimizer=OptimizerConfig(
            lr=options.learning_rate, weight_decay=options.weight_decay, clip_gnorm=options.clip_gnorm
        ),
        lr_scheduler=LRSchedulerConfig(options.lr_schedule, options.warmup_steps, options.min_learning_rate),
        checkpoint=CheckpointConfig(
            options.checkpoint_dir,
            options.checkpoint_interval,
            options.checkpoint_minutes,
            options.keep_checkpoints,
            options.resume_path,
        ),
        log=LogConfig(options.log_dir, options.log_interval, options.profile),
        run_mode=options.run_mode,
        explain=options.explain,
        precision=options.precision,
        micro_batch_size=options.micro_batch_size,
        max_train_steps=options.max_train_steps,
        seed=options.seed,
        gen_savedir=options.gen_savedir,
    )


def main() -> None:
    trainer = Trainer(trainer_args(parse()))
    trainer.run()
    if trainer.args.explain and trainer.rank == 0:
        print(explain(read_plan(trainer.gen_folder)))


if __name__ == "__main__":
    run(main)
