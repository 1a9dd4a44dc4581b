"""AdamW on the fp32 master weights of the elements that this rank owns."""

from __future__ import annotations

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
        ranges = [_decay_ranges(bucket) for bucket in buckets]
        decayed, others = ([(i, parts[kind]) for i, parts in enumerate(ranges)] for kind in (0, 1))
        groups = [
            {"params": [self.masters[index][part] for index, part in parts], "weight_decay": weight_decay}
            for parts, weight_decay in ((decayed, config.weight_decay), (others, 0.0))
        ]
        self._parts = [*decayed, *others]  # (bucket, range of its owned elements) of each parameter of the optimizer
        self._adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
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

    @property
    def steps(self) -> int:
        """Updates so far. Waits for the device."""
        return int(next(iter(self._adam.state.values()))["step"])

    def set_steps(self, steps: int) -> None:
        """Continues after `steps` updates (the moments must be loaded too)."""
        for parameter in self._parameters():
            self._adam.state[parameter]["step"].fill_(float(steps))

    @torch.no_grad()
    def step(self, labels: int, lr: float, loss: Tensor | None = None) -> Tensor:
        """One update from the accumulated gradients of summed losses, taken as the mean over all labels.

        labels  number of labels in this rank's micro-batches
        loss    the sum of their losses, 0 where another rank has it; None: whether it is finite does not matter

        Where a rank's loss or the gradient's norm is not finite, as that of elements is whose squares are not, nothing
        changes: no weight, no moment, no count of updates. All ranks decide alike.

        Returns the norm of the mean's whole gradient before clipping, which is not finite where nothing has changed. It
        is on the device, and nothing waits for the device.
        """
        gradients = [bucket.gradient for bucket in self.buckets]
        squares = (torch.stack(torch._foreach_norm(gradients)).double().square() * self._counted).sum()
        # A constant filled in on the device: copying one there would wait for all that runs on it.
        sums = torch.stack([
            squares, torch.full_like(squares, labels / self.plan_ngpus),
            torch.zeros_like(squares) if loss is None else loss.to(squares.dtype) * 0,
        ])  # fmt: skip
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every element is owned by one rank, copies apart; the ranks of a replica see the same labels.
            dist.all_reduce(sums)
        scale = (1.0 / sums[1].clamp(min=1)).float()
        norm = sums[0].sqrt().float() * scale + sums[2].float()
        finite = norm.isfinite()
        if self.config.clip_gnorm:
            scale = scale * (self.config.clip_gnorm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        for parameter, (index, part) in zip(self._parameters(), self._parts, strict=True):
            parameter.grad = gradients[index][part]
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.found_inf = (~finite).float()  # type: ignore[attr-defined]  # torch's kernels ask for this
        self._adam.step()
        self.publish_masters()
        return norm

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all that this rank owns, masters and moments, is finite. Waits for the device."""
        tensors = [*self.masters, *(tensor for state in self.state for tensor in state.values())]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

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
