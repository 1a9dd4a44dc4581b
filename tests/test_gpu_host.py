"""What lies on the host, on a GPU whose copies come late, and whose freed memory holds no numbers.

A copy that nothing waits for gives the right bytes most of the time: copies are fast, and memory is seldom taken
again at once. Here each copy begins after a random delay, memory that is let go of is filled with NaN, and there is so
much computation beside that copies do overlap.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnscaler.mesh import Mesh
from nnscaler.placement import SHARED
from nnscaler.runtime import gradients as on_the_host
from nnscaler.runtime import host as host_memory
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import GradientReducer, make_buckets
from nnscaler.runtime.gradients import GradientSlots
from nnscaler.runtime.host import HostMemory, HostPool
from nnscaler.runtime.module import Weights
from nnscaler.runtime.optimizer import OptimizerConfig, ShardedOptimizer
from nnscaler.shards import ParameterSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, ROWS, CALLS = 256, 512, 8


@pytest.fixture(params=range(4))
def late_and_poisoned(request, monkeypatch):
    """Copies begin late; buffers of the host, and memory and slots of the device that are let go of, hold NaN."""
    delays = random.Random(request.param)
    write, read, give_back = HostPool.write, HostPool.read, HostPool.give_back
    let_go, send, leave = host_memory._Kept.let_go, GradientSlots._send, GradientSlots.leave

    def late(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(delays.choice([0, 10_000, 3_000_000]))

    def late_write(self, buffer, source):
        late(self._out)
        write(self, buffer, source)

    def late_read(self, buffer, target, after=None, now=True):
        late(self._back)
        read(self, buffer, target, after, now)

    def poisoned_buffer(self, buffer):
        give_back(self, buffer)
        nan = torch.full((buffer.bytes.numel() // 4,), float("nan"), device=self.device).view(torch.uint8)
        nan.record_stream(self._out)
        self.write(buffer, nan)

    def poisoned_memory(self):
        here = list(self._here)
        let_go(self)
        for tensor in here:
            tensor.fill_(float("nan"))  # which the next to take this memory may do at once

    def poisoned_send(self, one):
        slot = self._here[one]
        send(self, one)
        with torch.cuda.stream(self.pool._out):
            slot.bytes.fill_(255)  # bytes of NaN
            slot.left = self.pool._out.record_event()

    def poisoned_leave(self, one):
        self._here[one].bytes.fill_(255)
        leave(self, one)

    monkeypatch.setattr(GradientSlots, "_send", poisoned_send)
    monkeypatch.setattr(GradientSlots, "leave", poisoned_leave)
    monkeypatch.setattr(host_memory, "SMALL", 1)  # checkpoint keeps a tensor without elements
    monkeypatch.setattr(HostPool, "write", late_write)
    monkeypatch.setattr(HostPool, "read", late_read)
    monkeypatch.setattr(HostPool, "give_back", poisoned_buffer)
    monkeypatch.setattr(host_memory._Kept, "let_go", poisoned_memory)


def block(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.tanh(x.clone() @ weight) @ weight.t() / WIDTH


def recomputed(x: Tensor, weight: Tensor) -> Tensor:
    return checkpoint(block, x.clone(), weight, use_reentrant=False)


@pytest.mark.parametrize("call", [block, recomputed])
def test_activations(call, late_and_poisoned):
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, device="cuda", generator=generator).requires_grad_() for _ in range(CALLS)]
    x = torch.randn(ROWS, WIDTH, device="cuda", generator=generator).requires_grad_()
    addresses = {weight.untyped_storage().data_ptr() for weight in weights}
    host = HostMemory(x.device, lambda tensor: tensor.untyped_storage().data_ptr() in addresses)

    def gradients(on_host: bool) -> list[Tensor]:
        host.clear()
        out = x
        for weight in weights:
            if on_host:
                with host.keeping():
                    out = call(out, weight)
            else:
                out = call(out, weight)
        # What is last is needed whole: let go of, it is poisoned.
        found = list(torch.autograd.grad(out.clone().square().mean(), [x, *weights]))
        host.clear()
        return found

    wanted = gradients(on_host=False)
    for _ in range(3):
        assert all(map(torch.equal, gradients(on_host=True), wanted))


def test_state_of_the_optimizer(late_and_poisoned):
    shapes = {f"weight{i}": (97, 1000 + i) for i in range(12)}
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip_gnorm=0.5)

    def trained(on_host: range | tuple[()]) -> list[Tensor]:
        axes = Axes(Mesh((1,), 1), torch.device("cuda"))
        specs = {name: ParameterSpec(shape, torch.bfloat16, (SHARED,), True, False) for name, shape in shapes.items()}
        buckets, parameters = make_buckets(specs, axes, dict.fromkeys(shapes, True), 2**16)
        generator = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape, device="cuda", generator=generator))
        optimizer = ShardedOptimizer(buckets, config, 1, [i for i in on_host if i < len(buckets)])
        optimizer.load_masters()
        for _ in range(5):
            for bucket in buckets:
                bucket.wait()
                bucket.gradient.copy_(torch.randn(bucket.gradient.shape, device="cuda", generator=generator))
            optimizer.step(1, 0.1)
        optimizer.finish()
        return [tensor.cpu().clone() for tensor in (*optimizer.masters, *parameters.values())]

    wanted = trained(())
    assert all(map(torch.equal, trained(range(3, 100)), wanted))
    assert all(tensor.isfinite().all() for tensor in wanted)


def test_update_that_comes_late(monkeypatch):
    """What the update is told by the device, as how much it clips, stays while it runs beside the next forward."""
    spec = ParameterSpec((97, 1000), torch.bfloat16, (SHARED,), True, False)
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip_gnorm=0.5)
    in_turn = ShardedOptimizer._with_state_here

    def late(self, **options):
        torch.cuda._sleep(30_000_000)
        yield from in_turn(self, **options)

    def trained(beside: float) -> Tensor:
        axes = Axes(Mesh((1,), 1), torch.device("cuda"))
        buckets, _ = make_buckets({"weight": spec}, axes, {"weight": True}, 2**14, summed=False)
        optimizer = ShardedOptimizer(buckets, config, 1)
        for step in range(3):
            for bucket in buckets:
                bucket.wait()
                bucket.gradient.fill_(1.0 + step)
            optimizer.step(1, 0.1)
            small = [torch.full((), beside, device="cuda") for _ in range(1000)]
        del small
        optimizer.finish()
        return torch.cat([master.clone() for master in optimizer.masters])

    wanted = trained(0.0)
    monkeypatch.setattr(ShardedOptimizer, "_with_state_here", late)
    assert torch.equal(trained(float("nan")), wanted)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients(micro_batches, late_and_poisoned, monkeypatch):
    """With so few slots that gradients go before they are complete. Of every second bucket, the state is there too."""
    monkeypatch.setattr(on_the_host, "GRADIENT_SLOTS", 3)
    shapes = {f"weight{i}": (97, 1000 + i) for i in range(12)}
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip_gnorm=0.5)

    def trained(on_host: float) -> list[Tensor]:
        axes = Axes(Mesh((1,), 1), torch.device("cuda"))
        specs = {name: ParameterSpec(shape, torch.bfloat16, (SHARED,), True, False) for name, shape in shapes.items()}
        decayed, summed = dict.fromkeys(shapes, True), micro_batches > 1
        buckets, parameters = make_buckets(specs, axes, decayed, 2**16, (), summed, on_host)
        assert any(bucket.on_host is not None for bucket in buckets) == (on_host > 0)
        weights, reducer = Weights(buckets, parameters), GradientReducer(buckets, parameters, micro_batches)
        generator = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape, device="cuda", generator=generator))
        optimizer = ShardedOptimizer(buckets, config, 1, range(0, len(buckets), 2))
        optimizer.load_masters()
        found = []
        for _ in range(4):
            for _ in range(micro_batches):
                loss = torch.zeros((), device="cuda")
                for name, shape in shapes.items():
                    drawn = torch.randn(shape, device="cuda", generator=generator).bfloat16()
                    loss = loss + (weights[name] * drawn).tanh().float().sum()
                loss.backward()
                reducer.end_micro_batch()
            reducer.finish()
            found.append(optimizer.step(1, 0.1))
        optimizer.finish()
        return [tensor.cpu().clone() for tensor in (*found, *optimizer.masters, *parameters.values())]

    wanted = trained(0.0)
    assert all(tensor.isfinite().all() for tensor in wanted)
    for on_host in (1e6, 1e12):
        assert all(map(torch.equal, trained(on_host), wanted))
