"""AdamW on the fp32 master weights of the elements that this rank owns: bucket by bucket, beside the next forward.

Buckets are updated in the order in which forward needs them, and each is then sent to its other owners. The update has
a stream of its own. Forward waits only for the buckets that it uses (`Bucket.wait`), not for the whole update.
The master weights and moments of some buckets may lie on the host. They come to the device for their update, a few
buckets ahead, and go back. So do gradients that lie there, which do not go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.config import OptimizerConfig
from nnscaler.runtime.buckets import Bucket, needed_last, norms
from nnscaler.runtime.host import HostPool, StagedTensors, StagingArea
from nnscaler.sizes import STATES_AHEAD


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter of this shape: not to norms and biases, which have one dimension."""
    return len(shape) > 1


def buckets_of(buckets: list[Bucket], size: float) -> list[int]:
    """Indices of the buckets whose state lies on the host, when that is to be at least `size` bytes.

    They are those that forward needs last: it then waits for them least.
    """
    return needed_last(
        buckets, size, lambda bucket: bucket.owned.numel() * (8 + (4 if bucket.owned.dtype != torch.float32 else 0))
    )


class ShardedOptimizer:
    """Clips the gradients of all buckets, updates the parameters, and sends them to their other owners.

    The state of a bucket has fp32 elements, one for each owned element: `master` (which is the parameter itself where
    that is in fp32), `exp_avg` and `exp_avg_sq`.

    plan_ngpus  devices of one copy of the model; each of them counts the same labels
    on_host     indices of the buckets whose state lies on the host
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
        ordered = [index for index in self._order if index in on_host]
        self._staged = _staged_tensors(buckets, ordered, len(self.STATE) + 1)
        self._states = [_State(bucket, config, self._staged.get(i)) for i, bucket in enumerate(buckets)]

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 weights of each bucket, where they lie between updates."""
        return [state.master for state in self._states]

    @property
    def state(self) -> list[dict[str, Tensor]]:
        """The moments of each bucket, where they lie between updates."""
        return [state.moments for state in self._states]

    def load_masters(self) -> None:
        """Sets the master weights to the current parameters."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                master.copy_(bucket.owned)

    @property
    def steps(self) -> int:
        """How many updates there have been. Waits for the device."""
        self.settle()
        return self._states[0].steps

    def set_steps(self, steps: int) -> None:
        """Continues as after `steps` updates. The moments must be loaded too."""
        for state in self._states:
            state.set_steps(steps)

    @torch.no_grad()
    def step(self, labels: float, lr: float, loss: Tensor | None = None) -> Tensor:
        """One update, from the gradients of summed losses, which are taken as the mean over all labels.

        labels  how many labels this rank's micro-batches have
        loss    the sum of their losses, or 0 where another rank has it; None: whether it is finite does not matter

        If the loss or the norm of the gradient is not finite on any rank, nothing changes: no weight, no moment, and
        not the number of updates. All ranks decide alike. The norm is also infinite where the square of an element is.

        Returns the norm of the whole mean gradient before clipping; it is not finite where nothing has changed. It is a
        tensor on the device, and nothing waits for the device.
        """
        squares = (norms(self.buckets).double().square() * self._counted).sum()
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
        found_infinite = (~finite).float()
        with self._beside(scale, found_infinite):
            for index in self._with_state_here(gradients=True):
                bucket = self.buckets[index]
                gradient = bucket.gradient if bucket.on_host is None else bucket.on_host.take()
                gradient = gradient.float().mul_(scale)  # in fp32, or scaling would round it
                self._states[index].update(gradient, lr, found_infinite)
                if bucket.on_host is not None:
                    bucket.on_host.leave()
                if index in self._staged:
                    self._staged[index].send_back()
                self._states[index].publish()
        return norm

    def _with_state_here(self, gradients: bool = False) -> Iterator[int]:
        """The buckets, in the order of their update. The state of each is on the device when its turn has come.

        gradients  whether gradients that lie on the host shall come with it; `GradientOnHost.take` waits for them
        """
        coming = deque(
            index
            for index in self._order
            if index in self._staged or (gradients and self.buckets[index].on_host is not None)
        )
        awaited = set(coming)
        for _ in range(min(STATES_AHEAD, len(coming))):
            self._fetch(coming.popleft(), gradients)
        for index in self._order:
            if index in self._staged:
                self._staged[index].wait_for_fetch()
            if index in awaited and coming:
                self._fetch(coming.popleft(), gradients)
            yield index

    def _fetch(self, index: int, gradients: bool) -> None:
        bucket = self.buckets[index]
        if index in self._staged:
            self._staged[index].fetch()
        if gradients and bucket.on_host is not None:
            bucket.on_host.fetch()

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Sets every rank's parameters to the master weights."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.owned:
                bucket.owned.copy_(master)
            bucket.publish()

    def settle(self) -> None:
        """Makes what is computed next, on the current stream, come after the last update of masters and moments.

        Where these lie on the host, this process waits for them.
        """
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for staged in self._staged.values():
            staged.wait_for_host()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all master weights and moments that this rank owns are finite. Waits for the device."""
        self.settle()
        found = [t.isfinite().all() for index in self._with_state_here() for t in self._states[index].here.values()]
        return bool(torch.stack(found).all())

    def finish(self) -> None:
        """Waits until the last update, and the sending of its results, is done."""
        self.settle()
        for bucket in self.buckets:
            bucket.wait()

    @contextmanager
    def _beside(self, *used: Tensor) -> Iterator[None]:
        """Inside, computation comes after all before it, and runs beside all after it.

        used  what it uses of tensors that are let go of meanwhile: their memory stays theirs until then
        """
        if self._stream is None:
            yield
            return
        for tensor in used:
            tensor.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield


class _State:
    """The master weights and moments of one bucket, and what updates them.

    staged  brings them from the host and back; None: they lie on the device
    here    master weights and moments where they are updated, on the device
    """

    def __init__(self, bucket: Bucket, config: OptimizerConfig, staged: StagedTensors | None) -> None:
        self.bucket = bucket
        names = ShardedOptimizer.STATE
        is_master = bucket.owned.dtype == torch.float32
        if staged is None:
            self.master = bucket.owned if is_master else bucket.owned.to(torch.float32)
            self.moments = {name: torch.zeros_like(self.master) for name in names}
            self.here = {"master": self.master, **self.moments}
        else:
            there = dict(zip([*names, "master"], staged.there))
            self.here = dict(zip([*names, "master"], staged.here))
            if is_master:
                there["master"] = self.here["master"] = bucket.owned
            else:
                there["master"].copy_(bucket.owned)
            self.master = there["master"]
            self.moments = {name: there[name] for name in names}
        self._master = self.here["master"]
        decays_by = zip(_decay_ranges(bucket), (config.weight_decay, 0.0))
        ranges = [(part, decay) for part, decay in decays_by if part.stop > part.start]
        self._ranges = [part for part, _ in ranges]
        groups = [{"params": [self._master[part]], "weight_decay": decay} for part, decay in ranges]
        self._adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for parameter, part in zip(self._parameters(), self._ranges, strict=True):
            self._adam.state[parameter] = {"step": torch.zeros((), device=parameter.device)}
            self._adam.state[parameter].update({name: self.here[name][part] for name in names})

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
        for parameter in self._parameters():
            parameter.grad = None  # which may be a copy, in fp32

    def publish(self) -> None:
        """Sets every owner's parameters to the master weights that have just been updated."""
        if self._master is not self.bucket.owned:
            self.bucket.owned.copy_(self._master)
        self.bucket.publish()


def _staged_tensors(buckets: list[Bucket], on_host: list[int], tensors: int) -> dict[int, StagedTensors]:
    """Index of a bucket -> its state, for the buckets whose state lies on the host.

    on_host  their indices, in the order of the update: a few of them take turns in as many staging areas
    tensors  how many tensors the state has
    """
    if not on_host:
        return {}
    pool = HostPool(buckets[0].device)
    largest = max(buckets[index].owned.numel() for index in on_host)
    areas = [StagingArea(largest, tensors, buckets[0].device) for _ in range(STATES_AHEAD + 1)]
    found = {}
    for count, index in enumerate(on_host):
        bucket = buckets[index]
        wanted = tensors - (bucket.owned.dtype == torch.float32)
        found[index] = StagedTensors(pool, areas[count % len(areas)], bucket.owned.numel(), wanted)
    return found


def _decay_ranges(bucket: Bucket) -> tuple[slice, slice]:
    """The range of owned elements with weight decay, and the range of those without."""
    owned = bucket.owned_range
    boundary = max((slot.stop for slot in bucket.slots if decays(slot.spec.shape)), default=0)
    cut = min(max(boundary - owned.start, 0), len(owned))
    return slice(0, cut), slice(cut, len(owned))
