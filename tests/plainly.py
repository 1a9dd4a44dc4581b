"""Modules trained by `nnscaler.parallelize` in several processes, and by a plain loop of PyTorch in one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, OptimizerConfig, parallelize
from nnscaler.parallel import MicroBatch
from tests import tiny
from tests.launch import run

SETTINGS = OptimizerConfig(lr=0.02, eps=1e-6, clip_gnorm=0.7, weight_decay=0.3)
TOLERANCE = 1e-5


def update_plainly(net: nn.Module, config: OptimizerConfig) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """What PyTorch does, said plainly: AdamW with decay of matrices alone, and a step with the gradient cut."""
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_gnorm)
        adamw.step()
        adamw.zero_grad()

    return adamw, update


def train_plainly(
    net: nn.Module, batches: Sequence[MicroBatch], loss_of: Callable[[Any], Tensor] = lambda output: output
) -> tuple[list[float], dict[str, Tensor]]:
    """A step for each batch. Returns the losses, and the weights at the end."""
    _, update = update_plainly(net, SETTINGS)
    losses = []
    for batch in batches:
        loss = loss_of(net(**batch) if isinstance(batch, dict) else net(*batch))
        loss.backward()
        update()
        losses.append(loss.item())
    return losses, net.state_dict()


def train_here(
    folder: Path, net: nn.Module, batches: Sequence[MicroBatch], config: dict[str, Any], options: dict[str, Any]
) -> None:
    """The same by this process's part of the plan that `nnscaler.parallelize` finds with `options`. Rank 0 saves it."""
    compute = ComputeConfig(hardware=str(folder / "hardware.json"), **config)
    model = parallelize(net, batches[0], compute, SETTINGS, folder=folder / "code", **options)
    losses = []
    for batch in batches:
        losses.append(model.step([batch]).item())
        model.optimizer.step()
    state = model.state_dict()
    if state:
        torch.save((losses, state), folder / "found.pt")


def check(
    folder: Path,
    net: nn.Module,
    batches: Sequence[MicroBatch],
    loss_of: Callable[[Any], Tensor] = lambda output: output,
    world: int = 2,
    **options: Any,
) -> set[tuple[str, str]]:
    """Asserts that a module, split over `world` processes, learns as the plain one does.

    options  further arguments of `nnscaler.parallelize`
    Returns (operator, along what it was split), for each operator call of the plan.
    """
    tiny.write_hardware(folder)
    wanted_losses, wanted = train_plainly(copy.deepcopy(net), batches, loss_of)
    config = {"plan_ngpus": world, "runtime_ngpus": world}
    run(world, train_here, folder, net, batches, config, options, init=False)
    losses, found = torch.load(folder / "found.pt")
    for index, loss in enumerate(wanted_losses):
        assert abs(losses[index] - loss) < TOLERANCE * max(1, abs(loss)), (losses, wanted_losses)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tiny.close(found[name], tensor) < TOLERANCE, name
    return splits(folder / "code")


def splits(code: Path) -> set[tuple[str, str]]:
    """(operator, along what it is split), for each operator call of a compiled plan."""
    plan = json.loads((code / "plan.json").read_text())
    return {(node["op"], node["split"]) for block in plan["blocks"].values() for node in block["nodes"].values()}
