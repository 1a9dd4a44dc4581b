"""Where a run's numbers go: a progress bar, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Writes what rank 0 reports; on other ranks it does nothing."""

    def __init__(self, folder: Path, steps: int, start: int, active: bool) -> None:
        self._active = active
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder))
        self._file = (folder / "metrics.jsonl").open("a")
        self._bar = tqdm(total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._active:
            self._bar.close()
            self._writer.close()
            self._file.close()

    def advance(self) -> None:
        """One optimizer step more."""
        if self._active:
            self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """The numbers of an interval that ends with optimizer step `step`."""
        if not self._active:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(_summary(values))


def _summary(values: dict[str, Any]) -> str:
    shown = [f"loss {values['loss']:.4f}", f"{values['tokens_per_second_per_gpu']:.0f} tokens/s/GPU"]
    if "mfu" in values:
        shown.append(f"MFU {100 * values['mfu']:.1f} % ({100 * values['mfu_causal']:.1f} % causal)")
    return ", ".join(shown)
