"""What a training run is made of: one dataclass a concern, checked where it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path

from torch import nn

from nnscaler.compiler import ComputeConfig
from nnscaler.data.training import PackedDataset
from nnscaler.errors import UserError
from nnscaler.runtime.optimizer import OptimizerConfig


@dataclass(frozen=True)
class ModelConfig:
    """The model: `make` builds it; its forward takes `input_ids` and `labels` [b, l] and returns the summed loss.

    weights             directory with safetensors; None: initialised from the seed
    weight_prefix       what stands before the names of `weights` in the model's own
    vocabulary          number of token ids that it takes
    flops_per_sequence  forward and backward operations of a sequence: attention in full, and causal; None: no MFU
    save_assets         writes into a folder what makes an exported model complete; None: nothing
    """

    make: Callable[[], nn.Module]
    weights: Path | None = None
    weight_prefix: str = ""
    vocabulary: int | None = None
    flops_per_sequence: tuple[float, float] | None = None
    save_assets: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """Packed sequences (`bookcorpus.py`); None: only plan, for sequences of `sequence_length` tokens."""

    dataset: PackedDataset | None = None
    sequence_length: int | None = None
    ignored_label: int = -100

    def __post_init__(self) -> None:
        if self.dataset is None and self.sequence_length is None:
            raise UserError(
                "neither dataset_path nor sequence_length is given; one of them says how long sequences are"
            )
        if self.dataset is not None and self.sequence_length not in (None, self.dataset.sequence_length):
            raise UserError(
                f"sequence_length is {self.sequence_length}, but the dataset has {self.dataset.sequence_length}"
            )
        if self.length < 2:
            raise UserError(f"sequence_length is {self.length}; it must be at least 2")

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        length = self.dataset.sequence_length if self.dataset else self.sequence_length
        assert length is not None
        return length


SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Learning rate by step: linear warm-up, then constant, or falling to `minimum` times the peak at the last step."""

    schedule: str = "cosine"
    warmup_steps: int = 0
    minimum: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"lr_schedule is '{self.schedule}'; allowed are {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")

    def factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied with in step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1 + cos(pi * progress)) / 2}[self.schedule]
        return self.minimum + (1 - self.minimum) * fall if self.schedule != "constant" else 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, and how often.

    directory  holds a folder a run, which holds a folder a checkpoint
    interval   optimizer steps between checkpoints; 0: not by steps, but the last step's state is saved; None: no
               checkpoint at all
    minutes    minutes between checkpoints; 0: not by time
    keep       newest checkpoints that are kept, beside those that `last` and `best` point to; 0: all
    resume     what to continue from: a checkpoint, a folder of them, a merged file, a Hugging Face model; None: start
               anew
    """

    directory: Path = Path("checkpoints")
    interval: int | None = 100
    minutes: float = 0.0
    keep: int = 3
    resume: Path | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "minutes", "keep"):
            if not (getattr(self, name) or 0) >= 0:  # NaN is wrong too
                raise UserError(f"checkpoint {name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class LogConfig:
    """Logs: TensorBoard and metrics.jsonl below `directory`, every `interval` steps.

    profile  folder for a profile of a few steps (see `nnscaler.profiler.steps`); None: no profile
    """

    directory: Path = Path("runs")
    interval: int = 1
    profile: Path | None = None


@dataclass(frozen=True)
class TrainerArgs:
    """A training run. `explain`: with run_mode compile, say what would help, which takes a few plans more."""

    name: str
    model: ModelConfig
    compute: ComputeConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009  frozen
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run_mode: str = "run"
    explain: bool = False
    precision: str = "bf16"
    micro_batch_size: int = 1
    max_train_steps: int | None = None
    seed: int = 0
    gen_savedir: Path = field(default=Path(".nnscaler"))

    def __post_init__(self) -> None:
        if self.run_mode not in ("compile", "run"):
            raise UserError(f"run_mode is '{self.run_mode}'; allowed are compile, run")
        if self.explain and self.run_mode != "compile":
            raise UserError(f"explain goes with run_mode compile; run_mode is {self.run_mode}")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision is '{self.precision}'; allowed are bf16, fp32")
        if self.micro_batch_size < 1:
            raise UserError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 1")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise UserError(f"max_train_steps is {self.max_train_steps}; it must be at least 1")
