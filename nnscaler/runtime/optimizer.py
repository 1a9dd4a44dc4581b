"""AdamW on the fp32 master weights of the elements that this rank owns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.config import OptimizerConfig
from nnscaler.runtime.buckets import Bucket


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter: not to norms and biases."""
    return len(shape) > 1


class ShardedOptimizer:
    """Clips, updates and publishes the parameters of all buckets.

    The state of a bucket has one fp32 element for each owned one: `master` (the parameter itself where it is fp32),
    `exp_avg` and `exp_avg_sq`.
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(self, buckets: list[Bucket], config: OptimizerConfig, plan_ngpus: int) -> None:
        self.buckets, self.config, self.plan_ngpus = buckets, config, plan_ngpus
        self.masters = [
            bucket.owned if bucket.owned.dtype == torch.float32 else bucket.owned.to(torch.float32)
            for bucket in buckets
        ]
        self.state = [{key: torch.zeros_like(master) for key in self.STATE} for master in self.masters]
        counted = [float(not bucket.is_copy) for bucket in buckets]
        self._counted = torch.tensor(counted, dtype=torch.float64, device=buckets[0].device)
        self.steps = 0
        ranges = [_decay_ranges(bucket) for bucket in buckets]
        decayed, others = ([(i, parts[kind]) for i, parts in enumerate(ranges)] for kind in (0, 1))
        groups = [
            {"params": [self.masters[index][part] for index, part in parts], "weight_decay": weight_decay}
            for parts, weight_decay in ((decayed, config.weight_decay), (others, 0.0))
        ]
        self._parts = [*decayed, *others]  # (bucket, range of its owned elements) of each parameter of the optimizer
        self._adam = _adamw(groups, config, buckets[0].device)
        self._bind_state()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def _bind_state(self) -> None:
        """Makes the optimizer's moments views of `state`, so that there is one tensor a bucket to save and load."""
        for parameter, (index, part) in zip(self._parameters(), self._parts, strict=True):
            state = self._adam.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            for key in self.STATE:
                state[key] = self.state[index][key][part]

    def load_masters(self) -> None:
        """Takes the current parameters as masters."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                master.copy_(bucket.owned)

    def set_steps(self, steps: int) -> None:
        """Continues after `steps` updates (the moments must be loaded too)."""
        self.steps = steps
        for parameter in self._parameters():
            self._adam.state[parameter]["step"].fill_(float(steps))
        for group in self._adam.param_groups:
            group["step"] = steps  # where apex counts

    @torch.no_grad()
    def step(self, labels: int, lr: float) -> Tensor:
        """One update from the accumulated gradients of summed losses, taken as the mean over all labels.

        labels  number of labels in this rank's micro-batches
        Returns the norm of the mean's whole gradient before clipping, on the device; nothing waits for the device.
        """
        gradients = [bucket.gradient for bucket in self.buckets]
        squares = (torch.stack(torch._foreach_norm(gradients)).double().square() * self._counted).sum()
        # A constant filled in on the device: copying one there would wait for all that runs on it.
        sums = torch.stack([squares, torch.full_like(squares, labels / self.plan_ngpus)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every element is owned by one rank, copies apart; the ranks of a replica see the same labels.
            dist.all_reduce(sums)
        scale = (1.0 / sums[1].clamp(min=1)).float()
        norm = sums[0].sqrt().float() * scale
        if self.config.clip_gnorm:
            scale = scale * (self.config.clip_gnorm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        for parameter, (index, part) in zip(self._parameters(), self._parts, strict=True):
            parameter.grad = gradients[index][part]
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self.steps += 1
        self.publish_masters()
        return norm

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Makes every rank's parameters those of the masters."""
        works = []
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                bucket.owned.copy_(master)
            works.append(bucket.publish())
        for work in works:
            if work is not None:
                work.wait()


def _decay_ranges(bucket: Bucket) -> tuple[slice, slice]:
    """The owned elements with weight decay, and those without."""
    owned = bucket.owned_range
    boundary = max((slot.stop for slot in bucket.slots if decays(slot.spec.shape)), default=0)
    cut = min(max(boundary - owned.start, 0), len(owned))
    return slice(0, cut), slice(cut, len(owned))


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """apex's fused AdamW where it is installed and there is a GPU, torch's fused AdamW otherwise."""
    if device.type == "cuda":
        try:
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
        except ImportError:
            pass
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
