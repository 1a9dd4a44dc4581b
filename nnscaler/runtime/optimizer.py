"""AdamW on the fp32 master weights of the elements that this rank owns, bucket by bucket, beside the next forward.

Buckets are updated, and what came of it is sent to their other owners, in the order in which forward needs them.
Forward waits for each bucket that it uses (`Bucket.wait`), not for the whole update, which has a stream of its own.
Masters and moments of some buckets may lie on the host: they come to the device for their update, a few buckets ahead,
and go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.config import OptimizerConfig
from nnscaler.runtime.buckets import Bucket
from nnscaler.runtime.host import Buffers, Place, Traveller
from nnscaler.sizes import STATES_AHEAD


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter: not to norms and biases."""
    return len(shape) > 1


def buckets_of(buckets: list[Bucket], size: float) -> list[int]:
    """Indices of the buckets whose state lies on the host, where that shall have at least `size` bytes: those that
    forward needs last, and so waits for least."""
    found = []
    for index in sorted(range(len(buckets)), key=lambda index: -buckets[index].first):
        if size <= 0:
            break
        owned = buckets[index].owned
        size -= owned.numel() * (8 + (4 if owned.dtype != torch.float32 else 0))
        found.append(index)
    return found


class ShardedOptimizer:
    """Clips, updates and publishes the parameters of all buckets.

    The state of a bucket has one fp32 element for each owned one: `master` (the parameter itself where it is fp32),
    `exp_avg` and `exp_avg_sq`.

    on_host  indices of the buckets whose state lies on the host
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, buckets: list[Bucket], config: OptimizerConfig, plan_ngpus: int, on_host: Collection[int] = ()
    ) -> None:
        self.buckets, self.config, self.plan_ngpus = buckets, config, plan_ngpus
        self.device = buckets[0].device
        counted = [float(not bucket.is_copy) for bucket in buckets]
        self._counted = torch.tensor(counted, dtype=torch.float64, device=self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._order = sorted(range(len(buckets)), key=lambda index: buckets[index].first)
        away = [index for index in self._order if index in on_host]
        self._travellers = _travellers(buckets, away, len(self.STATE) + 1)
        self._states = [_State(bucket, config, self._travellers.get(i)) for i, bucket in enumerate(buckets)]

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 weights of each bucket, where they lie between updates."""
        return [state.master for state in self._states]

    @property
    def state(self) -> list[dict[str, Tensor]]:
        """The moments of each bucket, where they lie between updates."""
        return [state.moments for state in self._states]

    def load_masters(self) -> None:
        """Takes the current parameters as masters."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                master.copy_(bucket.owned)

    @property
    def steps(self) -> int:
        """Updates so far. Waits for the device."""
        self.settle()
        return self._states[0].steps

    def set_steps(self, steps: int) -> None:
        """Continues after `steps` updates (the moments must be loaded too)."""
        for state in self._states:
            state.set_steps(steps)

    @torch.no_grad()
    def step(self, labels: float, lr: float, loss: Tensor | None = None) -> Tensor:
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
        found_infinite = (~finite).float()
        with self._beside():
            coming = deque(self._travellers[index] for index in self._order if index in self._travellers)
            for _ in range(min(STATES_AHEAD, len(coming))):
                coming.popleft().bring()
            for index in self._order:
                traveller = self._travellers.get(index)
                if traveller is not None:
                    traveller.arrive()
                    if coming:
                        coming.popleft().bring()
                self._states[index].update(gradients[index], lr, found_infinite)
                if traveller is not None:
                    traveller.leave()
                self._states[index].publish()
        return norm

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Makes every rank's parameters those of the masters."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                bucket.owned.copy_(master)
            bucket.publish()

    def settle(self) -> None:
        """What is computed next, on the current stream, comes after the last update of masters and moments; where they
        lie on the host, this process waits for it."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for traveller in self._travellers.values():
            traveller.settle()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all that this rank owns, masters and moments, is finite. Waits for the device."""
        self.settle()
        tensors = [*self.masters, *(tensor for state in self.state for tensor in state.values())]
        return bool(torch.stack([tensor.isfinite().all().to(self.device) for tensor in tensors]).all())

    def finish(self) -> None:
        """Waits until the last update, and the exchange of what it gave, is done."""
        self.settle()
        for bucket in self.buckets:
            bucket.wait()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Inside, what is computed comes after what was before, beside what comes after."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield


class _State:
    """Master and moments of one bucket, and what updates them.

    traveller  takes them from the host and back; None: they lie on the device
    """

    def __init__(self, bucket: Bucket, config: OptimizerConfig, traveller: Traveller | None) -> None:
        self.bucket = bucket
        names = ShardedOptimizer.STATE
        is_master = bucket.owned.dtype == torch.float32
        if traveller is None:
            self.master = bucket.owned if is_master else bucket.owned.to(torch.float32)
            self.moments = {name: torch.zeros_like(self.master) for name in names}
            here = {"master": self.master, **self.moments}
        else:
            there = dict(zip([*names, "master"], traveller.there))
            here = dict(zip([*names, "master"], traveller.here))
            if is_master:
                there["master"] = here["master"] = bucket.owned
            else:
                there["master"].copy_(bucket.owned)
            self.master = there["master"]
            self.moments = {name: there[name] for name in names}
        self._master = here["master"]  # where they are updated
        decays_by = zip(_decay_ranges(bucket), (config.weight_decay, 0.0))
        ranges = [(part, decay) for part, decay in decays_by if part.stop > part.start]
        self._ranges = [part for part, _ in ranges]
        groups = [{"params": [self._master[part]], "weight_decay": decay} for part, decay in ranges]
        self._adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for parameter, part in zip(self._parameters(), self._ranges, strict=True):
            self._adam.state[parameter] = {"step": torch.zeros((), device=parameter.device)}
            self._adam.state[parameter].update({name: here[name][part] for name in names})

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def set_steps(self, steps: int) -> None:
        for parameter in self._parameters():
            self._adam.state[parameter]["step"].fill_(float(steps))

    @property
    def steps(self) -> int:
        return int(self._adam.state[self._parameters()[0]]["step"])

    def update(self, gradient: Tensor, lr: float, found_infinite: Tensor) -> None:
        for parameter, part in zip(self._parameters(), self._ranges, strict=True):
            parameter.grad = gradient[part]
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.found_inf = found_infinite  # type: ignore[attr-defined]  # torch's kernels ask for this
        self._adam.step()

    def publish(self) -> None:
        """Makes every owner's parameters those of the master that was just updated."""
        if self._master is not self.bucket.owned:
            self.bucket.owned.copy_(self._master)
        self.bucket.publish()


def _travellers(buckets: list[Bucket], away: list[int], tensors: int) -> dict[int, Traveller]:
    """What takes the state of each bucket that is `away` to the device and back, in this order: there are places for a
    few at a time."""
    if not away:
        return {}
    buffers = Buffers(buckets[0].device)
    largest = max(buckets[index].owned.numel() for index in away)
    places = [Place(largest, tensors, buckets[0].device) for _ in range(STATES_AHEAD + 1)]
    found = {}
    for count, index in enumerate(away):
        bucket = buckets[index]
        wanted = tensors - (bucket.owned.dtype == torch.float32)
        found[index] = Traveller(buffers, places[count % len(places)], bucket.owned.numel(), wanted)
    return found


def _decay_ranges(bucket: Bucket) -> tuple[slice, slice]:
    """The owned elements with weight decay, and those without."""
    owned = bucket.owned_range
    boundary = max((slot.stop for slot in bucket.slots if decays(slot.spec.shape)), default=0)
    cut = min(max(boundary - owned.start, 0), len(owned))
    return slice(0, cut), slice(cut, len(owned))
