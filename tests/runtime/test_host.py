"""What backward needs on the host: the same gradients to the last bit, sent once, and no longer on the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnscaler.errors import UserError
from nnscaler.runtime import gathering, host
from nnscaler.runtime.host import HostMemory, _Copy, _Kept

WIDTH, ROWS, CALLS = 16, 8, 6
SIZE = WIDTH * ROWS * 4  # bytes of an activation


def block(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return x + torch.tanh(x @ weight * table) @ weight.t()


def recomputed(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return checkpoint(block, x, weight, table, use_reentrant=False)


def with_holes(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Keeps every second column of a product."""
    half = (x @ weight)[:, ::2].cos() * table[::2]
    return x + torch.cat([half, half], dim=1)


def beginning_together(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Keeps the first half of a product, and then all of it, which begins at the same address."""
    product = x @ weight * table
    half = product[: ROWS // 2].cos()
    return x + product.sin() + torch.cat([half, half])


class Model:
    def __init__(self, call: Callable[..., Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.call = call
        self.weights = [torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_() for _ in range(CALLS)]
        self.table = torch.randn(WIDTH, generator=generator)
        self.x = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()

    def is_weight(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == w.untyped_storage().data_ptr() for w in self.weights)

    def forward(self, host: HostMemory | None) -> Tensor:
        x = self.x
        for weight in self.weights:
            if host is None:
                x = self.call(x, weight, self.table)
            else:
                with host.keeping(self.table):
                    x = self.call(x, weight, self.table)
        return x.square().sum()

    def gradients(self, host: HostMemory | None) -> list[Tensor]:
        leaves = [self.x, *self.weights]
        if host is not None:
            host.clear()
        gradients = torch.autograd.grad(self.forward(host), leaves)
        if host is not None:
            host.clear()
        return list(gradients)


@pytest.mark.parametrize("call", [block, recomputed, with_holes, beginning_together])
def test_gradients_are_equal_to_the_last_bit_and_buffers_are_used_again(call: Callable[..., Tensor]) -> None:
    model = Model(call)
    host = HostMemory(torch.device("cpu"), model.is_weight)
    wanted = model.gradients(None)
    taken = []
    for _ in range(3):
        assert all(map(torch.equal, model.gradients(host), wanted))
        taken.append(host.pool.bytes)
    # Of `block` its input and tanh's result are kept; recomputed, its input alone; with holes, what is between them;
    # and of what begins together, both.
    half = SIZE // 2
    each = {block: SIZE * 2, recomputed: SIZE, with_holes: SIZE + half, beginning_together: 2 * SIZE + half}[call]
    assert taken == [each * CALLS] * 3


def test_the_device_holds_what_two_calls_keep_in_backward() -> None:
    model = Model(block)
    host = HostMemory(torch.device("cpu"), model.is_weight)
    most = 0

    def look(gradient: Tensor) -> None:
        nonlocal most
        gc.collect()
        copies = [thing for thing in gc.get_objects() if isinstance(thing, _Copy)]
        most = max(most, sum(copy.fetched is not None for copy in copies))

    for weight in model.weights:
        weight.register_hook(look)
    model.gradients(host)
    assert most == 2 * 2


def test_micro_batches_in_flight_leave_the_device_while_they_wait() -> None:
    """As in a pipeline: two forwards, then a backward and a forward by turns."""
    model = Model(block)
    wanted = model.gradients(None)
    host = HostMemory(torch.device("cpu"), model.is_weight)
    waiting: list[Tensor] = []

    def forward() -> None:
        host.clear()
        waiting.append(model.forward(host))

    def left() -> int:
        """Tensors on the device that were sent, or came back."""
        gc.collect()
        kept = [thing for thing in gc.get_objects() if isinstance(thing, _Kept) and thing.pool is host.pool]
        return sum(len(one._here) + sum(copy.fetched is not None for copy in one._copies.values()) for one in kept)

    forward()
    assert left() == 2, "the last call's are on their way"
    forward()
    assert left() == 2, "and those of the micro-batch before have left"
    for _ in range(3):
        forward()
        gradients = torch.autograd.grad(waiting.pop(0), [model.x, *model.weights])
        host.clear()
        assert all(map(torch.equal, gradients, wanted))
        assert left() == 0
    assert host.pool.bytes == 3 * 2 * SIZE * CALLS


def test_a_gathered_weight_is_known_by_its_memory_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering._GatheredWeight, "apply", lambda parameter, gathers, steps: parameter * 1)
    gathers = gathering.Gathers(lambda *gradient: None)
    weight = gathers.weight(torch.ones(4))
    assert gathers.holds(weight.view(2, 2))
    assert not gathers.holds(torch.ones(4))
    address = weight.untyped_storage().data_ptr()
    del weight
    assert address not in gathers._alive


def test_a_machine_that_locks_no_more_pages_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    with pytest.raises(UserError, match=r"no more page-locked memory: 0\.25 GiB refused; .*--host_mem_constraint"):
        host._page_locked(2**28)
