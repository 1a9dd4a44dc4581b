"""What a training run is made of: a dataclass for each concern, which is checked when it is built.

The fields that are made by the functions of `nnscaler.options` are also flags of train.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING

from nnscaler.batch import Batch, Division
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.counting import counted
from nnscaler.directory import check_name
from nnscaler.errors import UserError
from nnscaler.options import REQUIRED, check, names, number, path, switch, text, whole, words

if TYPE_CHECKING:  # which a command that only answers need not wait for
    from peft import LoraConfig
    from torch import nn

    from nnscaler.data.mixture import Dataset, Part


MOST_STEPS = 2**40
PLACES = ("first", "last")  # of layers, see `nnscaler.trace.fp8`


def check_places(value: tuple[str, ...], name: str) -> None:
    """Raises UserError where a value is not some of PLACES."""
    for place in value:
        if place not in PLACES:
            raise UserError(f"{name} is '{place}'; allowed are {', '.join(PLACES)}")


@dataclass(frozen=True)
class ModelConfig:
    """The model: `make` builds it; its forward takes `input_ids` and `labels` [b, l] and returns the summed loss.

    weights             directory with safetensors; None: initialised from the seed
    weight_prefix       what stands before the names of `weights` in the model's own
    vocabulary          number of token ids that it takes
    marks               the ids that its configuration gives to "bos" and "eos", which stand around a document
    save_assets         writes into a folder what makes an exported model complete; None: nothing
    name                that people know it by; empty: that of its class
    instead             flag -> a model that needs less memory, to be told of where this one does not fit
    """

    make: Callable[[], nn.Module]
    weights: Path | None = None
    weight_prefix: str = ""
    vocabulary: int | None = None
    marks: Mapping[str, Collection[int]] = field(default_factory=dict)
    save_assets: Callable[[Path], None] | None = None
    name: str = ""
    instead: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterConfig:
    """Adapters. Without a rank there are none, and all weights are trained."""

    lora_rank: int | None = whole(
        None, "train LoRA adapters of this rank, and none of the model's own weights (default: train all weights)",
        least=1, most=2**14,
    )  # fmt: skip
    lora_alpha: float | None = number(
        None, "adapters' results are multiplied by lora_alpha / lora_rank (default: twice lora_rank)", above=0
    )
    lora_target_modules: tuple[str, ...] | None = words(
        None, "the linear layers that get an adapter, by the ends of their names, such as q_proj v_proj (default: all "
        "but the last projection)", shown="NAME",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        for name in ("lora_alpha", "lora_target_modules"):
            value = getattr(self, name)
            if self.lora_rank is None and value is not None:
                shown = value if isinstance(value, float) else " ".join(value)
                raise UserError(f"{name} is {shown}, and there is no lora_rank, without which there are no adapters")

    def lora(self, model_id: str) -> LoraConfig | None:
        """The same, as peft has it, for adapters of a model; None: there are none."""
        if self.lora_rank is None:
            return None
        from peft import LoraConfig, TaskType

        return LoraConfig(
            base_model_name_or_path=model_id,
            r=self.lora_rank,
            lora_alpha=self.lora_alpha or 2 * self.lora_rank,  # type: ignore[arg-type]  # a fraction is as good
            target_modules=list(self.lora_target_modules) if self.lora_target_modules else "all-linear",
            task_type=TaskType.CAUSAL_LM,
        )


def _check_documents(dataset: Part, apart: bool) -> None:
    """Raises UserError where a dataset does not go with keeping documents apart, or with not doing so."""
    if apart:
        _ = dataset.document_lengths
    elif dataset.asks_for_documents:
        raise UserError(
            f"dataset '{dataset.path}' has a column '{dataset.documents}' that keeps documents apart; give "
            "--document_mask, or remove the column (remove_columns)"
        )


@dataclass(frozen=True)
class DatasetConfig:
    """Packed sequences (`bookcorpus.py`); None: only plan, for sequences of `sequence_length` tokens, and with
    `document_mask` for documents of `document_length`."""

    dataset: Dataset | None = None
    sequence_length: int | None = whole(
        None, "tokens a sequence, to plan without a dataset (default: the dataset's)", least=2, most=2**30
    )
    document_mask: bool = switch(
        "keep the documents of a sequence apart: attention within each, positions that begin anew, and no label across"
    )
    document_length: int | None = whole(
        None, "with document_mask, tokens of the document in which a token stands, on average, to plan without a "
        "dataset (default: the dataset's, or else a whole sequence)", least=1, most=2**30,
    )  # fmt: skip
    ignored_label: int = -100

    def __post_init__(self) -> None:
        check(self)
        if self.dataset is None and self.sequence_length is None:
            raise UserError(
                "neither dataset_path nor sequence_length is given; one of them says how long sequences are"
            )
        if self.dataset is not None and self.sequence_length not in (None, self.dataset.sequence_length):
            raise UserError(
                f"sequence_length is {self.sequence_length}, but the dataset has {self.dataset.sequence_length}"
            )
        if self.length < 2:
            named = "sequence_length" if self.dataset is None else "the length of dataset_path's sequences"
            raise UserError(f"{named} is {self.length}; it must be at least 2")
        length, dataset = self.document_length, self.dataset
        if length is not None and not self.document_mask:
            raise UserError(f"document_length is {length}, which needs --document_mask")
        if length is not None and length > self.length:
            raise UserError(f"document_length is {length}; it must be at most sequence_length={self.length}")
        if dataset is not None and self.document_mask and length not in (None, self.mean_document):
            raise UserError(f"document_length is {length}, but the dataset's is {self.mean_document}")
        for part in dataset.parts if dataset is not None else ():
            _check_documents(part, self.document_mask)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        length = self.dataset.sequence_length if self.dataset else self.sequence_length
        assert length is not None
        return length

    @property
    def positions(self) -> int:
        """How many positions a model is to know."""
        return self.dataset.document_lengths.positions if self.dataset and self.document_mask else self.length

    @property
    def mean_document(self) -> int | None:
        """Tokens of the document in which a token stands, on average; None: documents are not kept apart."""
        if not self.document_mask:
            return None
        return round(self.dataset.document_lengths.of_token) if self.dataset else self.document_length or self.length


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation between steps on sequences that are not trained on; `dataset` None: there is none."""

    dataset: Part | None = None
    interval: int = whole(
        100, "steps between evaluations with eval_dataset_path; there is always one after the last step",
        flag="eval_interval", least=1, most=MOST_STEPS,
    )  # fmt: skip
    steps: int | None = whole(
        None, "how much of eval_dataset_path is evaluated: as many samples, from its first, as this many steps of "
        "training take (default: all)",
        flag="eval_steps", least=1, most=MOST_STEPS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LRSchedulerConfig:
    """The learning rate of each step.

    It rises linearly in the warm-up. Then it is constant, or falls to `minimum` times the peak at the last step.
    """

    schedule: str = text("cosine", "how the learning rate falls after warm-up", flag="lr_schedule", choices=SCHEDULES)
    warmup_steps: int = whole(0, "steps in which the learning rate rises", least=0, most=MOST_STEPS)
    minimum: float = number(
        0.1, "learning rate of the last step, as a fraction of the peak", flag="min_learning_rate", least=0, most=1
    )

    def __post_init__(self) -> None:
        check(self)

    def factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied by in step `step`, counted from 0, of `steps` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1 + cos(pi * progress)) / 2}[self.schedule]
        return self.minimum + (1 - self.minimum) * fall if self.schedule != "constant" else 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, and how often. `interval` None: there are none at all"""

    directory: Path = path(Path("checkpoints"), "folder for checkpoints, one folder a run", flag="checkpoint_dir")
    interval: int | None = whole(
        100, "steps between checkpoints; 0: not by steps. There is always one of the last step, and on SIGTERM or "
        "ctrl-C one of the step then reached", flag="checkpoint_interval", optional=True, least=0, most=MOST_STEPS,
    )  # fmt: skip
    minutes: float = number(
        0.0, "minutes between checkpoints; 0: not by time", flag="checkpoint_minutes", least=0, most=1e6
    )
    keep: int = whole(
        3, "newest checkpoints that are kept, beside those that the links last and best point to (best: lowest "
        "validation loss, or where none was validated lowest training loss); 0: all",
        flag="keep_checkpoints", least=0, most=MOST_STEPS,
    )  # fmt: skip
    resume: Path | None = path(
        None, "checkpoint to continue from, folder of checkpoints (of which the newest counts), merged file, or model "
        "directory with safetensors (whose weights alone are taken)", flag="resume_path",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LogConfig:
    """Logs: TensorBoard and metrics.jsonl below `directory`, every `interval` steps."""

    directory: Path = path(Path("runs"), "folder for TensorBoard and metrics.jsonl, one folder a run", flag="log_dir")
    interval: int = whole(1, "steps between reports", flag="log_interval", least=1, most=MOST_STEPS)
    profile: Path | None = path(
        None, "folder for a trace of two steps by torch's profiler, and where GPUs' time went in the second; a run has "
        "to take at least 5 steps (default: no profile)",
    )  # fmt: skip

    report_to: str | None = text(
        None, "where numbers go beside TensorBoard and metrics.jsonl; wandb: to Weights & Biases, which has to be "
        "installed", choices=("wandb",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.report_to is not None and find_spec(self.report_to) is None:
            raise UserError(f"report_to is {self.report_to}, which is not installed: pip install {self.report_to}")


@dataclass(frozen=True, kw_only=True)
class TrainerArgs:
    """A training run.

    command    one that compiles the same plan, for people; empty: none is known
    left_open  with global_batch_size: which of plan_ngpus, micro_batch_size and micro_batches the planner chooses,
               whatever is given here
    """

    name: str = text(REQUIRED, "name of the run: of its compiled code, its checkpoints and its logs", judge=check_name)
    model: ModelConfig
    compute: ComputeConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009  frozen
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run_mode: str = text("run", "compile: plan and write code; run: train", choices=("compile", "run"))
    explain: bool = switch(
        "with --run_mode compile: print what the plan costs, what limits it, and what would help, for which it plans "
        "a few times more"
    )
    precision: str = text(
        "auto",
        "bf16: weights in bf16, with fp32 masters in the optimizer; fp8: as bf16, and linear layers of the repeated "
        "layers multiply in fp8 (e4m3, a scale a tensor) where that is faster; fp32: all in fp32; auto: bf16 where "
        "this device is fast in it, and for plans for other --hardware; fp32 elsewhere",
        choices=("auto", "bf16", "fp8", "fp32"),
    )
    fp8_keep_bf16: tuple[str, ...] = names(
        (), "with --precision fp8: layers that stay in bf16: first, last or first,last (default: none)",
        shown="PLACE,...", judge=check_places,
    )  # fmt: skip
    global_batch_size: int | None = whole(
        None, "sequences of a step, in all. How they are divided among copies of the model and over micro-batches, and "
        "whether as a pipeline, is then what is predicted to be fastest, unless other flags say it (default: what the "
        "others say)", least=1, most=2**40,
    )  # fmt: skip
    micro_batch_size: int = whole(
        1, "sequences that a copy of the model computes at a time (default: 1, or with global_batch_size what is "
        "fastest)", least=1, most=2**20,
    )  # fmt: skip
    max_train_steps: int | None = whole(
        None, "optimizer steps in all, over as many epochs as they take (default: as num_train_epochs says)", least=1,
        most=MOST_STEPS,
    )  # fmt: skip
    num_train_epochs: float | None = number(
        None, "passes over the dataset in all; parts of one are allowed (default: 1)", above=0, most=1e9
    )
    incomplete_step: str = text(
        "train", "what becomes of samples that are left at the end of the last epoch, and do not fill a step; "
        "train: a last step trains with them alone; drop: they are left out", choices=("train", "drop"),
    )  # fmt: skip
    seed: int = whole(
        0, "seed of the order of the data, and of the weights where the model has none", least=0, most=2**63 - 1
    )
    gen_savedir: Path = path(Path(".nnscaler"), "folder for compiled plans and code, one folder a run")
    command: str = ""
    left_open: Collection[str] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.global_batch_size is not None:
            self._batch(self.global_batch_size).divisions()
        if self.fp8_keep_bf16 and self.precision != "fp8":
            raise UserError(f"fp8_keep_bf16 goes with precision fp8; precision is {self.precision}")
        if self.explain and self.run_mode != "compile":
            raise UserError(f"explain goes with run_mode compile; run_mode is {self.run_mode}")
        validation = self.evaluation.dataset
        if validation is not None and validation.sequence_length != self.dataset.length:
            raise UserError(
                f"eval_dataset_path is '{validation.path}', whose sequences have "
                f"{counted(validation.sequence_length, 'token')}, "
                f"but those of dataset_path have {self.dataset.length}"
            )
        if validation is not None:
            _check_documents(validation, self.dataset.document_mask)
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise UserError(
                f"max_train_steps is {self.max_train_steps} and num_train_epochs {self.num_train_epochs}; one of them "
                "says how long to train"
            )
        steps, warmup = self.max_train_steps, self.lr_scheduler.warmup_steps
        if steps is not None and warmup > steps:
            raise UserError(f"warmup_steps is {warmup}; it must be at most max_train_steps={steps}")
        if steps is not None and self.log.profile is not None:
            from nnscaler.profiler.steps import LEAST  # with torch's profiler

            if steps < LEAST:
                raise UserError(f"max_train_steps is {steps}; with profile it must be at least {LEAST}")

    @property
    def batch(self) -> Batch | None:
        """What the planner is to divide; None: it is said how."""
        return self._batch(self.global_batch_size) if self.global_batch_size and self.left_open else None

    @property
    def step_samples(self) -> int:
        """Sequences of a step, in all."""
        compute = self.compute
        copies = compute.runtime_ngpus // compute.plan_ngpus
        return self.global_batch_size or copies * self.micro_batch_size * compute.micro_batches

    def divided(self, division: Division) -> TrainerArgs:
        """The same, with nothing left open."""
        compute = replace(self.compute, plan_ngpus=division.plan_ngpus, micro_batches=division.micro_batches)
        return replace(self, compute=compute, micro_batch_size=division.micro_batch_size, left_open=())

    def _batch(self, sequences: int) -> Batch:
        fixed = {
            "plan_ngpus": self.compute.plan_ngpus, "micro_batch_size": self.micro_batch_size,
            "micro_batches": self.compute.micro_batches,
        }  # fmt: skip
        given = {name: value for name, value in fixed.items() if name not in self.left_open}
        return Batch(sequences, self.compute.runtime_ngpus, **given)
