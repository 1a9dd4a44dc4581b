"""Where a run's numbers go: a progress bar, TensorBoard and metrics.jsonl.

A log folder belongs to one run, which `run.json` names. A run that continues from an earlier step removes what it wrote
about later steps, so that each step is there once.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nnscaler.directory import writing

logger = logging.getLogger(__name__)

METRICS, _RUN = "metrics.jsonl", "run.json"


def is_free(folder: Path, run: str | None = None) -> bool:
    """Whether a run (None: a new one) may write its logs into a folder: the logs there are its own, or there are
    none."""
    try:
        return json.loads((folder / _RUN).read_text())["run"] == run
    except (OSError, ValueError, KeyError, TypeError):
        return not (folder / METRICS).exists() and not any(folder.glob("events.out.tfevents.*"))


def log_folder(directory: Path, name: str, run: str) -> Path:
    """The first of `name`, `name-2`, ... in a directory that is free for the run."""
    folder, count = directory / name, 1
    while not is_free(folder, run):
        count += 1
        folder = directory / f"{name}-{count}"
    return folder


class RunLog:
    """Writes what rank 0 reports; on other ranks it does nothing.

    folder      None: another rank writes
    run         the run's own name (`claim.Claim.run`)
    start       the step that training begins after
    about       for Weights & Biases: what the run is; None: it gets no numbers
    """

    def __init__(
        self, folder: Path | None, run: str, steps: int, start: int, about: dict[str, Any] | None = None
    ) -> None:
        self._active = folder is not None
        if folder is None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _RUN).write_text(json.dumps({"run": run}))
            _drop_after(folder / METRICS, start)
            self._writer = SummaryWriter(str(folder), purge_step=start + 1)
            self._file = (folder / METRICS).open("a")
        self._folder, self._failed = folder, False
        self._wandb = _wandb_run(folder, run, about) if about is not None else None
        self._shown: dict[str, float] = {}
        self._bar = tqdm(total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._active:
            self._bar.close()
            for file in (self._file, self._writer):
                with suppress(OSError):  # which `write` has told
                    file.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def advance(self) -> None:
        """One more optimizer step is done."""
        if self._active:
            self._bar.update()

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """The numbers of an interval that ends with optimizer step `step`; those that are not finite become null."""
        if not self._active:
            return
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if self._wandb is not None:
            self._wandb.log(known, step=step)
        try:
            self._file.write(json.dumps({"step": step, **{name: known.get(name) for name in values}}) + "\n")
            self._file.flush()
            for name, value in known.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:  # a full disk, say, need not end a long training
            if not self._failed:
                reason = error.strerror or error
                logger.warning("cannot write numbers from step %d on to '%s': %s", step, self._folder, reason)
            self._failed = True
        self._shown = {name: value for name, value in self._shown.items() if name not in values} | known
        self._bar.set_postfix_str(_summary(self._shown))


def _wandb_run(folder: Path, run: str, about: dict[str, Any]) -> Any:
    """The run of that name at Weights & Biases, which goes on where it is there already."""
    import wandb  # takes seconds, and few have it

    return wandb.init(project="nnscaler", name=folder.name, id=run, resume="allow", dir=str(folder), config=about)


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines about later steps, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(kept))
    new.replace(path)


def _summary(values: dict[str, Any]) -> str:
    loss = f"loss {values['loss']:.4f}" if "loss" in values else "loss not finite"
    shown = [loss]
    if "eval_loss" in values:
        shown.append(f"validation {values['eval_loss']:.4f}")
    if "tokens_per_second_per_gpu" in values:
        shown.append(f"{values['tokens_per_second_per_gpu']:.0f} tokens/s/GPU")
    if "mfu" in values:
        shown.append(
            f"causal MFU {100 * values['mfu_causal']:.1f} % ({100 * values['mfu']:.1f} % by the document's formula)"
        )
    return ", ".join(shown)
