"""A module of PyTorch, trained over many devices in a loop of the user's own.

    model = nnscaler.parallelize(net, {"x": x, "y": y}, nnscaler.ComputeConfig(plan_ngpus=2, runtime_ngpus=4))
    for step in range(steps):
        loss = model.step([batch(step, model.copy)])
        model.optimizer.step()

The script runs in one process, or in each of those that torchrun starts. `net`'s forward returns its loss. There are
`copies` copies of the model, and a plan splits each of them over `plan_ngpus` devices. All processes of a copy pass the
same micro-batches; each copy has its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler.checkpoint.sharded import Part, owned_state
from nnscaler.checkpoint.whole import gather_whole, scatter_whole
from nnscaler.compiler import Source
from nnscaler.config import ComputeConfig, OptimizerConfig
from nnscaler.errors import UserError, told_briefly
from nnscaler.loaded import LoadedModel, compiled, predicted_step_seconds
from nnscaler.planner.policies import Policy
from nnscaler.processes import check_world, from_rank_0, join_processes, own_device, wait_for_steps_of
from nnscaler.signature import LossOf, MicroBatch, Numbers, Signature
from nnscaler.trace import build_on_meta

Reduction: TypeAlias = Literal["mean", "sum"]

_WEIGHTS = "model."  # what stands before a parameter's name among the parts of a state


@told_briefly
def parallelize(
    module_or_factory: nn.Module | Callable[[], nn.Module],
    example_inputs: MicroBatch,
    compute_config: ComputeConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    *,
    loss: LossOf | None = None,
    pas_policy: str | Policy | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> ParallelizedModel:
    """Plans, compiles and loads a module for the processes that run. Collective.

    module_or_factory  a module, which is left as it is; its weights are taken from rank 0. Or a function without
                       arguments that makes one; it then takes no memory, and its weights come from `seed`, as its
                       modules' `reset_parameters` or its `_init_weights` make them, as do those of a module on the
                       meta device
    example_inputs     a micro-batch: forward's arguments, by name or in order. They may be nested in lists, tuples and
                       dicts, and optional ones left out. Tensors in every micro-batch have these shapes and types;
                       their values matter only where `compute_config.trace_strategy` executes the model. All else is a
                       constant, the same in every micro-batch.
    compute_config     how to split; by default over all processes, with one micro-batch a step
    optimizer          AdamW's settings
    loss               what forward returns -> the loss that is trained, one number. By default: what forward returns,
                       where that is one number; what it calls `loss`, as a key or an attribute; or the sum, where it
                       returns numbers alone, such as a dict of several losses
    pas_policy         what is fixed of the plan before it is sought: that of `compute_config`, where it is not given.
                       autodist, dp, tp, or a function of the graph; see `nnscaler.planner.policies.apply_policy`
    dtype              of the parameters in computation; default: the module's own. The optimizer updates in fp32 in
                       any case.
    seed               of what is dropped at random; and of the weights, where a function makes the module
    folder             for the plan and the generated code. They are used again if nothing that they depend on has
                       changed. Default: `.nnscaler/<name of the module's class>`

    Raises UserError where the module cannot be compiled, no plan fits, or another number of processes runs than
    `compute_config.runtime_ngpus`.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    config = compute_config or ComputeConfig(world, world)
    if pas_policy is not None:
        config = replace(config, pas_policy=pas_policy)
    check_world(config.runtime_ngpus)
    device = own_device()
    if world > 1 and not dist.is_initialized():
        join_processes(device).close()
    own = module_or_factory if isinstance(module_or_factory, nn.Module) else None
    make = module_or_factory if own is None else _copies_of(own)
    model, _ = build_on_meta(make)
    signature = Signature(model, example_inputs)
    numbers = Numbers(signature, loss)
    dtype = _dtype_of(model) if dtype is None else dtype
    source = Source(lambda: numbers.of(make()), signature.tensors, dtype, seed)
    place = Path(folder) if folder is not None else Path(".nnscaler") / type(model).__name__
    with compiled(source, config, place, device):
        names = from_rank_0(lambda: numbers.names, device)
        loaded = LoadedModel(place, source, optimizer or OptimizerConfig(), device)
    wait_for_steps_of(predicted_step_seconds(place))
    if own is not None and not any(parameter.is_meta for parameter in own.parameters()):
        _take_weights(loaded, own)
    else:
        loaded.initialise(seed)
    return ParallelizedModel(loaded, config.micro_batches, signature, names, loaded.optimizer.config.lr, seed)


class ParallelizedModel:
    """This process's share of a model, and of its training.

    copies     how many copies of the model train, each on its own samples
    copy       the copy that this process belongs to, counted from 0
    optimizer  updates the model
    numbers    the other numbers that forward returned in the last `step` or `evaluate`, each reduced as the loss was:
               the several losses of a dict, or an accuracy, by key, attribute or place
    """

    numbers: dict[str, Tensor]

    def __init__(
        self, loaded: LoadedModel, micro_batches: int, signature: Signature, names: Sequence[str], lr: float, seed: int
    ) -> None:
        self._loaded, self._module, self._device = loaded, loaded.module, loaded.module.axes.device
        self._micro_batches, self._signature, self._names = micro_batches, signature, names
        self._seed = seed
        self.numbers = {}
        self.copies, self.copy = loaded.mesh.replicas, loaded.module.axes.replica
        self.optimizer = Optimizer(loaded, lr)

    @told_briefly
    def step(
        self, micro_batches: Iterable[MicroBatch], reduction: Reduction = "mean", count: float | None = None
    ) -> Tensor:
        """Forward and backward of a step's micro-batches; `optimizer.step()` then updates. Collective.

        micro_batches  those of this copy, as many as `ComputeConfig.micro_batches` says, each like `example_inputs`.
                       They may be on the CPU. A GPU copies those in page-locked memory when it gets there; they must
                       stay as they are until then.
        reduction      "mean": the gradient is that of the losses' mean over the micro-batches of all copies, which is
                       the whole batch's mean where each loss is a mean over as many samples; "sum": of their sum
        count          with "mean": what this copy's micro-batches count for together, where each loss is a sum, such as
                       their samples, or labels that are not ignored: the gradient is that of the sum of all copies'
                       losses over the sum of their counts

        So it is the gradient of a plain loop: with two copies of two micro-batches each, of

            (net(*a) + net(*b) + net(*c) + net(*d)) / 4       step([a, b]) on copy 0, step([c, d]) on copy 1
            net(*a) + net(*b) + net(*c) + net(*d)             step([a, b], "sum"), step([c, d], "sum")
            (net(*a) + net(*b) + net(*c) + net(*d)) / 100     step([a, b], count=60), step([c, d], count=40)

        What is dropped at random depends on the module's seed, on how many steps the optimizer has taken, and on the
        micro-batch; not on the plan. Micro-batch m of copy r is number m * copies + r.

        Returns that loss, of all copies, on every process: fp64, without dimensions, on the device.
        """
        batches = [self._on_device(one) for one in micro_batches]
        if len(batches) != self._micro_batches:
            raise UserError(
                f"step got {len(batches)} micro-batches; the plan is for micro_batches={self._micro_batches} of them"
            )
        divisor = self._divisor(len(batches), reduction, count)
        total = self._module.accumulate(batches, self._seed, self.optimizer._taken)
        self.optimizer._pending = divisor, total.reshape(-1)[0]
        return self._over_all(total, divisor)

    @told_briefly
    def evaluate(
        self, micro_batches: Iterable[MicroBatch], reduction: Reduction = "mean", count: float | None = None
    ) -> Tensor:
        """The loss as `step` gives it, without gradients and with nothing dropped, of any number of micro-batches, as
        many on each process of this copy. Collective."""
        batches = [self._on_device(one) for one in micro_batches]
        divisor = self._divisor(len(batches), reduction, count)
        return self._over_all(self._module.evaluate(batches), divisor)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights on rank 0, whole, on the CPU, trained ones in fp32, by the names that the module's own
        `state_dict` has; nothing on other ranks. Collective. The module itself, and every plan of it, can load them."""
        self._loaded.optimizer.finish()
        state = gather_whole(self._weights())
        return state | {name: state[target] for name, target in self._module.tied.items() if target in state}

    @told_briefly
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes weights that `state_dict` of any plan, or of the module itself, gave. Every process gives them; of a
        file that `torch.load(..., mmap=True)` opened, it reads no more than its share.

        Raises UserError where a tensor is missing or too many, or has another shape.
        """
        known = {*self._loaded.names, *self._module.tied}
        unknown = [name for name in state if name not in known]
        if unknown:
            raise UserError(f"the state has '{unknown[0]}', which the model has not")
        self._loaded.optimizer.finish()
        scatter_whole(self._weights(), state)
        self._loaded.optimizer.publish_masters()

    def _weights(self) -> list[Part]:
        owned = [part for part in owned_state(self._loaded.optimizer) if part.name.startswith(_WEIGHTS)]
        return [replace(part, name=part.name.removeprefix(_WEIGHTS)) for part in (*owned, *self._loaded.fixed)]

    def _on_device(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        given = self._signature.named(micro_batch)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in given.items()}

    def _divisor(self, micro_batches: int, reduction: str, count: float | None) -> float:
        """By what the sum of losses is divided, as this copy's share of it."""
        if reduction not in ("mean", "sum"):
            raise UserError(f"reduction is '{reduction}'; it must be mean or sum")
        if reduction == "sum" and count is not None:
            raise UserError("count goes with reduction mean; reduction is sum")
        if reduction == "sum":
            return 1 / self.copies
        return micro_batches if count is None else count

    def _over_all(self, totals: Tensor, divisor: float) -> Tensor:
        """All copies' losses over all copies' divisors; likewise `numbers`.

        totals  [1 + the number of `numbers`], the loss first; or, where there are no other numbers or this process has
                none of them, without dimensions
        """
        mesh = self._loaded.mesh
        totals = totals.expand(1 + len(self._names)) / mesh.ngpus_with_loss
        sums = torch.cat([totals, totals.new_full((1,), divisor / mesh.plan_ngpus)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, *others = (sums[:-1] / sums[-1].clamp(min=1)).unbind()
        self.numbers = dict(zip(self._names, others, strict=True))
        return loss


class Optimizer(torch.optim.Optimizer):
    """AdamW of PyTorch on this process's share of the fp32 weights. Schedulers of torch.optim.lr_scheduler drive its
    learning rate, `param_groups[0]["lr"]`.

    Gradients begin anew with each `ParallelizedModel.step`, so that there is nothing to set to zero.
    """

    def __init__(self, loaded: LoadedModel, lr: float) -> None:
        self._sharded, self._taken = loaded.optimizer, 0
        self._pending: tuple[float, Tensor] | None = None
        super().__init__(self._sharded.masters, {"lr": lr})

    @told_briefly
    def step(self) -> Tensor:  # type: ignore[override]  # a closure would be a step of the model
        """Clips the gradient of the last `ParallelizedModel.step`, and updates the weights with it. Collective.

        Returns the gradient's norm before clipping, fp32 on the device. Where it, or the loss, is not finite, nothing
        changes: no weight, no moment.
        """
        if self._pending is None:
            raise UserError("optimizer.step() without a step of the model before it: there is no gradient")
        (divisor, total), self._pending = self._pending, None
        self._taken += 1
        return self._sharded.step(divisor, self.param_groups[0]["lr"], total)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """The moments on rank 0, whole, on the CPU: `exp_avg.<name of the weight>`, ...; `steps`, which changed the
        weights; all that were `taken`; and `lr`; nothing on other ranks. Collective. Every plan can load them."""
        self._sharded.finish()
        state: dict[str, Any] = dict(gather_whole(self._moments()))
        counts = {"steps": self._sharded.steps, "taken": self._taken}
        return {**state, **counts, "lr": self.param_groups[0]["lr"]} if state else {}

    @told_briefly
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what `state_dict` of any plan gave, on every process. Raises UserError where it is of another model."""
        self._sharded.finish()
        scatter_whole(self._moments(), state_dict)
        self._sharded.set_steps(state_dict["steps"])
        self._taken = state_dict.get("taken", state_dict["steps"])
        self.param_groups[0]["lr"] = state_dict["lr"]

    def _moments(self) -> list[Part]:
        return [part for part in owned_state(self._sharded) if not part.name.startswith(_WEIGHTS)]


def _copies_of(module: nn.Module) -> Callable[[], nn.Module]:
    """What makes copies of a module whose parameters are on the meta device, and take no memory."""

    def copied() -> nn.Module:
        meta = {
            id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            for parameter in module.parameters()
        }
        try:
            return deepcopy(module, dict(meta))  # which takes these for copies made before
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{type(module).__name__} cannot be copied ({error}); give a function that makes it"
            ) from error

    return copied


def _dtype_of(model: nn.Module) -> torch.dtype:
    """In which all parameters of a module are that are not whole numbers. Raises UserError where there are several."""
    kinds = {one.dtype for one in model.parameters() if one.dtype.is_floating_point}
    if len(kinds) != 1:
        found = ", ".join(sorted(map(str, kinds))) or "none"
        raise UserError(f"the types of the module's parameters are {found}; dtype says in which it is to compute")
    return kinds.pop()


@torch.no_grad()
def _take_weights(loaded: LoadedModel, module: nn.Module) -> None:
    """The module's own weights and buffers, those of rank 0, which are sent one at a time."""
    device = loaded.module.axes.device
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in loaded.module.specs and not dist.is_initialized():
            continue
        value = tensor.detach().to(device).contiguous()
        if dist.is_initialized():
            value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
            dist.broadcast(value, src=0)
        if name in loaded.module.specs:
            loaded.module.load_one(name, value[loaded.module.box(name).slices])
    loaded.optimizer.load_masters()
