"""Modules trained by `nnscaler.parallelize` in several processes, and by a plain loop of PyTorch in one."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, OptimizerConfig, parallelize
from nnscaler.signature import MicroBatch
from tests import tiny
from tests.launch import run

# Some gradients, such as those of attention's biases of keys, are rounding errors alone: eps is far above these.
SETTINGS = OptimizerConfig(lr=0.02, eps=1e-3, clip_gnorm=0.7, weight_decay=0.3)
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


@dataclass
class Case:
    """What is trained.

    net      the module, and `batches`: a step's each
    loss_of  what the module returns -> the loss
    compute  fields of ComputeConfig; by default the module is split over all processes
    options  further arguments of `nnscaler.parallelize`
    """

    net: nn.Module
    batches: Sequence[MicroBatch]
    loss_of: Callable[[Any], Tensor] = lambda output: output
    compute: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:  # `loss_of` stays here
        return _case, (self.net, self.batches, self.compute, self.options)


def _case(net: nn.Module, batches: Sequence[MicroBatch], compute: dict[str, Any], options: dict[str, Any]) -> Case:
    return Case(net, batches, compute=compute, options=options)


def train_plainly(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """A step for each batch. Returns the losses, and the weights at the end."""
    net = copy.deepcopy(case.net)
    _, update = update_plainly(net, SETTINGS)
    losses = []
    for batch in case.batches:
        loss = case.loss_of(net(**batch) if isinstance(batch, dict) else net(*batch))
        loss.backward()
        update()
        losses.append(loss.item())
    return losses, net.state_dict()


def train_here(folder: Path) -> None:
    """The same by this process's parts of the plans that `nnscaler.parallelize` finds. Rank 0 saves it."""
    world = int(os.environ["WORLD_SIZE"])
    cases: dict[str, Case] = torch.load(folder / "cases.pt", weights_only=False)
    for name, case in cases.items():
        compute = {"plan_ngpus": world, "runtime_ngpus": world, **case.compute}
        config = ComputeConfig(hardware=str(folder / "hardware.json"), **compute)
        model = parallelize(case.net, case.batches[0], config, SETTINGS, folder=folder / name, **case.options)
        losses, numbers = [], []
        for batch in case.batches:
            losses.append(model.step([batch] * config.micro_batches).item())
            numbers.append({name: number.item() for name, number in model.numbers.items()})
            model.optimizer.step()
        state = model.state_dict()
        if state:
            torch.save((losses, state, numbers), folder / f"{name}.pt")


def check(folder: Path, cases: dict[str, Case], world: int = 2) -> dict[str, list[dict[str, float]]]:
    """Asserts that modules, each compiled in a folder of its name, learn in `world` processes as the plain ones do.

    Returns what else they gave: name of a case -> the numbers of each step.
    """
    tiny.write_hardware(folder)
    torch.save(cases, folder / "cases.pt")
    run(world, train_here, folder, init=False)
    given = {}
    for name, case in cases.items():
        losses, found, given[name] = torch.load(folder / f"{name}.pt")
        wanted_losses, wanted = train_plainly(case)
        for loss, wanted_loss in zip(losses, wanted_losses, strict=True):
            assert abs(loss - wanted_loss) < TOLERANCE * max(1, abs(wanted_loss)), (name, losses, wanted_losses)
        assert found.keys() == wanted.keys(), name
        for weight, tensor in wanted.items():
            torch.testing.assert_close(
                found[weight], tensor.float(), rtol=TOLERANCE, atol=TOLERANCE, msg=f"{name}: {weight}"
            )
    return given


def splits(code: Path) -> set[tuple[str, str]]:
    """(operator, along what it is split), for each operator call of a compiled plan."""
    plan = json.loads((code / "plan.json").read_text())
    return {(node["op"], node["split"]) for block in plan["blocks"].values() for node in block["nodes"].values()}
