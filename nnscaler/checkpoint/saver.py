"""Saving in the background, while training goes on.

A save copies what this rank owns to the CPU; training waits for nothing more. A thread then writes the copy. On a GPU
the copy runs beside the next forward and backward, and only the update of the weights waits for it. The threads of all
ranks agree through a process group of their own, on the CPU, so that they do not disturb training's collectives.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler.checkpoint import folder as folders
from nnscaler.checkpoint.checksums import Checksums, Piece, whole_file
from nnscaler.checkpoint.folder import TrainerState
from nnscaler.checkpoint.randomness import as_tensors
from nnscaler.checkpoint.sharded import Part, owned_state, save_parts, whole
from nnscaler.errors import UserError
from nnscaler.runtime.locked import host_memory, lock
from nnscaler.runtime.optimizer import ShardedOptimizer

logger = logging.getLogger(__name__)

LARGE = 2**30  # bytes of a node's part, below which any disk is fast
_PROBE = 2**26  # bytes that are written to find the disk's speed
_CRASH_SECONDS = 60  # that a save under way is given when training fails


class Saver:
    """Writes checkpoints into a run's folder. `start` and `finish` are collective.

    fixed        the tensors of the model that training leaves as they are; they are saved in each checkpoint
    save_assets  writes into a folder what makes an exported model complete; None: nothing
    check        raises where the folder is no longer this run's; called on rank 0 before a checkpoint gets its name

    A save that fails changes neither training nor the checkpoints before it: a line is logged. If it is the last one of
    a run, `finish` raises UserError instead.
    """

    def __init__(
        self, run: Path, optimizer: ShardedOptimizer, fixed: list[Part], device: torch.device,
        save_assets: Callable[[Path], None] | None, check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run, self._device, self._save_assets, self._check = run, device, save_assets, check
        self._optimizer, self._owned, self._fixed = optimizer, owned_state(optimizer, copies=False), fixed
        self._distributed = dist.is_initialized()
        self._rank = dist.get_rank() if self._distributed else 0
        self._group = dist.new_group(backend="gloo") if self._distributed else None
        self._staged: list[Part] | None = None
        self._copied: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None  # the step, the error
        self._assets: dict[str, bytes] | None = None
        self._told_limit = self._rank > 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._thread is not None:
            self._thread.join(_CRASH_SECONDS)  # what training did before it failed may still be saved

    def start(self, state: TrainerState, random: dict[str, Any]) -> None:
        """Begins to save what the last update left. If an earlier save is still being written, it waits for that.

        random  the states of this rank's random number generators at that time, from `random_states`
        """
        if self._thread is not None and self._thread.is_alive():
            logger.warning("the checkpoint before that of step %d is still being written: waiting", state.step)
        self._join()
        self._report()
        streams = [whole(f"random.{name}.{self._rank}", tensor) for name, tensor in as_tensors(random).items()]
        parts = [*self._stage(), *self._fixed, *streams]
        self._thread = threading.Thread(target=self._write, args=(parts, state), daemon=True, name="checkpoint")
        self._thread.start()

    def is_finite(self) -> bool:
        """Whether what the last update left on this rank is finite; nothing else is worth saving."""
        if self._device.type == "cpu":
            return self._optimizer.is_finite()
        with torch.cuda.stream(self._stream_after_update()):
            return self._optimizer.is_finite()

    def _stream_after_update(self) -> torch.cuda.Stream:
        """A stream for what needs the last update, but not what the device has been given since."""
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            self._optimizer.settle()
        return stream

    def before_update(self) -> None:
        """To be called before the weights change: makes the device wait until they are copied."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        if self._thread is not None and not self._thread.is_alive():
            self._report()

    def finish(self) -> None:
        """Waits for the last save. Raises UserError, on every rank, where it failed."""
        self._join()
        if self._failure is not None:
            raise UserError(self._describe()) from self._failure[1]

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _report(self) -> None:
        if self._failure is not None and self._rank == 0:
            logger.error("%s; training goes on", self._describe())
        self._failure = None

    def _describe(self) -> str:
        assert self._failure is not None
        step, error = self._failure
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        complete = folders.own_checkpoints(self.run)
        newest = f"the newest complete one is '{complete[-1]}'" if complete else "there is no complete one"
        return f"cannot save a checkpoint of step {step} in '{self.run}': {reason}; {newest}"

    def _stage(self) -> list[Part]:
        """Copies of the owned parts on the CPU, in memory that is used again and again."""
        if self._staged is None:
            self._staged = _copies(self._owned, self._device)
        if self._device.type == "cpu":
            _copy(self._owned, self._staged)
            return self._staged
        stream = self._stream_after_update()
        with torch.cuda.stream(stream):
            _copy(self._owned, self._staged)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        return self._staged

    def predict_seconds(self) -> None:
        """Warns at once if a save will take longer than torchrun waits, by the measured speed of the disk."""
        size = sum(part.tensor.nbytes for part in self._owned) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        size += sum(part.tensor.nbytes for part in self._fixed)
        if self._told_limit or size < LARGE:
            return
        probe, began = self.run / ".speed", time.monotonic()
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE))
                os.fsync(file.fileno())
            probe.unlink()
        except OSError:
            return  # the save itself will say what is wrong
        self._tell_limit(size * (time.monotonic() - began) / _PROBE, "is to take")

    def _tell_limit(self, seconds: float, takes: str) -> None:
        limit = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
        if not self._told_limit and "TORCHELASTIC_RUN_ID" in os.environ and seconds > limit:
            self._told_limit = True
            logger.warning(
                "a checkpoint %s %.0f s: for one to be saved on SIGTERM, torchrun needs --shutdown-timeout %d or more",
                takes, seconds, ceil(2 * seconds),
            )  # fmt: skip

    def _write(self, parts: list[Part], state: TrainerState) -> None:
        """In the background: all ranks' shards, then rank 0 the rest and the name."""
        work, began = folders.working_folder(self.run, state.step), time.monotonic()
        try:
            if self._copied is not None:
                self._copied.synchronize()
            own = torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device.type == "cuda" else nullcontext()
            with own:  # what is copied here does not wait for training
                save_parts(work, parts, lambda pieces: self._complete(work, state, pieces), self._group)
            self._tell_limit(time.monotonic() - began, "took")
        except BaseException as error:  # whatever it is, training does not end because of it
            self._failure = state.step, error
            if self._rank == 0:
                shutil.rmtree(work, ignore_errors=True)

    def _complete(self, work: Path, state: TrainerState, shards: list[Piece]) -> None:
        """On rank 0, when every rank has written its shard: writes the other files and checksums, and gives the
        name."""
        state.write(work)
        for name, content in self._model_assets().items():
            path = work / folders.ASSETS / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        known = {piece.file for piece in shards}
        others = [path for path in work.rglob("*") if path.is_file() and path.relative_to(work).as_posix() not in known]
        Checksums(work, [*shards, *(whole_file(work, path) for path in others)]).write()
        self._check()
        folders.publish(work, state)
        folders.remove_old(self.run, state.keep, state.owner)

    def _model_assets(self) -> dict[str, bytes]:
        """Relative path -> content; made once, since they do not change."""
        if self._assets is None:
            self._assets = {}
            if self._save_assets is not None:
                with tempfile.TemporaryDirectory() as directory:
                    self._save_assets(Path(directory))
                    files = [path for path in Path(directory).rglob("*") if path.is_file()]
                    self._assets = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
        return self._assets


def _copy(sources: list[Part], targets: list[Part]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.tensor.copy_(source.tensor, non_blocking=True)


def _copies(parts: list[Part], device: torch.device) -> list[Part]:
    """Parts of the same sizes in one block of CPU memory, which a GPU can write to by itself."""
    assert all(part.tensor.dtype == torch.float32 for part in parts)
    count = sum(part.tensor.numel() for part in parts)
    on_accelerator = device.type == "cuda" and count > 0
    memory = host_memory(4 * count).view(torch.float32) if on_accelerator else torch.empty(count)
    if on_accelerator and not lock(memory):
        logger.warning("checkpoints are copied slowly: the system does not lock %d bytes of memory", memory.nbytes)
    chunks = memory.split([part.tensor.numel() for part in parts])
    return [replace(part, tensor=chunk.view(part.box.sizes)) for part, chunk in zip(parts, chunks)]
