"""A compiled model as one process runs it: it is found or compiled, loaded, and given its first weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nnscaler.batch import Batch, Division
from nnscaler.checkpoint.sharded import fixed_state
from nnscaler.compiler import Source, compile_model, differences, identity
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.counting import counted
from nnscaler.directory import alone_in
from nnscaler.division_search import in_division
from nnscaler.errors import UserError
from nnscaler.first_values import initial_parameters
from nnscaler.identity import DONE
from nnscaler.models.weights import fixed_tensors
from nnscaler.plan import GIB
from nnscaler.processes import from_rank_0, share_folder
from nnscaler.runtime.optimizer import ShardedOptimizer
from nnscaler.runtime.pipeline import load_module

logger = logging.getLogger(__name__)


@contextmanager
def compiled(
    source: Source,
    config: ComputeConfig,
    folder: Path,
    device: torch.device,
    judge: Callable[[nn.Module], None] = lambda model: None,
    batch: Batch | None = None,
) -> Iterator[None]:
    """Inside, `folder` holds on every node what `source` compiles to, and no other run changes it. Collective.

    Rank 0 compiles, unless the folder holds just that already. Nodes that do not share the folder get its files.

    judge  called on rank 0 with the model on the meta device; raises UserError where the model does not suit
    batch  see `compile_model`; the folder then says how it is divided
    Raises UserError on every rank where `compile_model` or `judge` does.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with alone_in(folder) if rank == 0 else nullcontext():
        from_rank_0(lambda: _compile_if_needed(source, config, folder, judge, batch), device)
        if dist.is_initialized():
            share_folder(folder, device)
        yield


def _compile_if_needed(
    source: Source,
    config: ComputeConfig,
    folder: Path,
    judge: Callable[[nn.Module], None],
    batch: Batch | None,
) -> None:
    built = source.build()
    judge(built[0])
    division = division_in(folder)
    possible = batch is not None and division in batch.divisions()  # not where fewer devices are left, say
    wanted = in_division(source, config, division) if possible and division is not None else (source, config)
    changed = None
    if (folder / DONE).exists():  # or nothing is there that the model would have to be run for, to compare
        changed = differences(folder, identity(wanted[0], built, wanted[1], batch=batch))
    if changed == []:
        logger.info("using the compiled plan in %s", folder)
        return
    if changed:
        logger.warning("%s was compiled for something else (%s): compiling", folder, "; ".join(changed))
    compile_model(source, config, folder, batch=batch)


def division_in(folder: Path) -> Division | None:
    """How the planner has divided a batch, of what is compiled in a folder; None: it was not asked."""
    try:
        chosen = json.loads((folder / "plan.json").read_text())["divisions"][0]
        return Division(*(chosen[field.name] for field in fields(Division)))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def predicted_step_seconds(folder: Path) -> float:
    """Predicted seconds of a step, of what is compiled in a folder."""
    return float(json.loads((folder / "plan.json").read_text())["predicted"]["step_seconds"])


def out_of_memory(error: torch.OutOfMemoryError, folder: Path, device: torch.device) -> UserError:
    """What to tell of a device that ran out of memory with what is compiled in a folder."""
    needed = float(json.loads((folder / "plan.json").read_text())["predicted"]["memory_bytes"]) / GIB
    free, size = (one / GIB for one in torch.cuda.mem_get_info(device))
    held = torch.cuda.memory_allocated(device) / GIB
    return UserError(
        f"{device} is out of memory: the plan takes {needed:.1f} of its {size:.1f} GiB; the run holds {held:.1f}, and "
        f"{free:.1f} are free. Do other programs hold memory there? If not, --gpu_mem_constraint {needed - 2:.1f} "
        f"plans for less ({str(error).partition(' GPU ')[0].rstrip('.')})"
    )


class LoadedModel:
    """A compiled model with its optimizer. Its parameters have no values yet.

    folder  what a compile made
    source  what was compiled
    model   the original model, on the meta device
    module  this rank's share of it
    fixed   the tensors of the model that training leaves as they are, as far as this rank has them
    names   of everything that the model's own files hold: parameters and persistent buffers; tied ones once
    """

    def __init__(self, folder: Path, source: Source, config: OptimizerConfig, device: torch.device) -> None:
        self.module = load_module(folder, device)
        self.mesh = self.module.mesh
        self.optimizer = ShardedOptimizer(
            self.module.buckets, config, self.mesh.plan_ngpus, self.module.state_on_host
        )  # fmt: skip
        self.model, buffers, self._first = source.build_with_first_values()
        trained = [name for name, spec in self.module.specs.items() if spec.trained]
        fixed = fixed_tensors(self.model, trained)
        self.module.hold_unused(
            {name: buffers.get(name, tensor) for name, tensor in fixed.items() if name not in self.module.specs}
        )
        self.fixed = fixed_state(self.module, fixed)
        self.names = [name for name in self.module.specs if name in {*trained, *fixed}]

    def initialise(self, seed: int, names: Collection[str] | None = None) -> None:
        """Gives parameters their first values, which depend on the seed and not on the plan: those that are named, or
        all."""
        new = counted(len(names), "new tensor") if names is not None else ""
        what = "weights are" if names is None else f"{new} {'is' if len(names) == 1 else 'are'}"
        logger.info("%s initialised from seed %d", what, seed)
        wanted = self.module.parameters_to_load()
        for name, value in initial_parameters(self.model, seed, self.module.axes.device, names, self._first):
            if name in wanted:
                self.module.load_one(name, value[self.module.box(name).slices])
        self.optimizer.load_masters()
