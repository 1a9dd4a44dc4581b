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
from nnscaler.runtime.host import HostMemory, StagedTensors, StagingArea, _Copy, _Kept

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


def in_halves(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Keeps both halves of a product, as two tensors of one size in one tensor's memory."""
    first, second = (x @ weight * table).chunk(2)
    return x + torch.cat([first.cos(), second.sin()])


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


@pytest.mark.parametrize("call", [block, recomputed, with_holes, beginning_together, in_halves])
def test_gradients_are_equal_to_the_last_bit_and_buffers_are_used_again(call: Callable[..., Tensor]) -> None:
    model = Model(call)
    host = HostMemory(torch.device("cpu"), model.is_weight)
    wanted = model.gradients(None)
    taken = []
    for _ in range(3):
        assert all(map(torch.equal, model.gradients(host), wanted))
        taken.append(host.pool.bytes)
    # Of `block` its input and tanh's result are kept; recomputed, its input alone; with holes, what is between them;
    # of what begins together, both; and in halves, these.
    half = SIZE // 2
    each = {
        block: SIZE * 2, recomputed: SIZE, with_holes: SIZE + half, beginning_together: 2 * SIZE + half,
        in_halves: SIZE + 2 * half,
    }[call]  # fmt: skip
    assert taken == [each * CALLS] * 3


def test_the_device_holds_what_two_calls_keep_in_backward() -> None:
    model = Model(block)
    host = HostMemory(torch.device("cpu"), model.is_weight)
    most = 0

    def look(gradient: Tensor) -> None:
        nonlocal most
        gc.collect()
        copies = [thing for thing in gc.get_objects() if type(thing) is _Copy]
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
        kept = [thing for thing in gc.get_objects() if type(thing) is _Kept and thing.pool is host.pool]
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
    host.free_sent()
    assert left() == 0
    forward()
    assert left() == 2
    host.free_sent()  # another call has run since
    assert left() == 0
    assert all(map(torch.equal, torch.autograd.grad(waiting.pop(), [model.x, *model.weights]), wanted))


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


@pytest.mark.parametrize(
    ("size", "stride", "dense"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 3, 4), (4, 8, 1), True),
        ((2, 1, 3), (3, 99, 1), True),
        ((1, 3), (7, 1), True),
        ((), (), True),
        ((2, 3), (4, 1), False),
        ((2, 3), (6, 2), False),
        ((2, 3), (0, 1), False),
        ((2, 3), (1, 1), False),
        ((3,), (2,), False),
    ],
)
def test_a_tensor_is_dense_where_its_elements_fill_its_memory(size, stride, dense) -> None:
    assert host._is_dense(torch.empty(24).as_strided(size, stride)) == dense


def test_what_is_small_or_packed_otherwise_stays_on_the_device() -> None:
    model = Model(block)
    wanted = model.gradients(None)
    memory = HostMemory(torch.device("cpu"), model.is_weight)
    memory._small = SIZE + 1
    assert all(map(torch.equal, model.gradients(memory), wanted))
    assert memory.pool.bytes == 0
    memory._small = SIZE
    model.gradients(memory)
    assert memory.pool.bytes == SIZE * 2 * CALLS
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> object:
        return ("packed", packed.append(tensor), len(packed) - 1) if tensor.shape == model.weights[0].shape else tensor

    def unpack(kept: object) -> Tensor:
        return packed[kept[2]] if isinstance(kept, tuple) else kept

    memory = HostMemory(torch.device("cpu"), lambda tensor: False, pack, unpack)
    assert all(map(torch.equal, model.gradients(memory), wanted))
    assert packed
    assert memory.pool.bytes == SIZE * 2 * CALLS, "weights are packed, and all else is sent"


def test_a_copy_comes_after_what_it_copies_and_what_it_overwrites(streams) -> None:
    pool, said = streams
    buffer, source, target = pool.take(4), torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    pool.write(buffer, source)
    assert said == [("out", "waits for", "now"), ("in", "out"), ("out", "records", "out 1")]
    said.clear()
    pool.read(buffer, target, after="before")
    assert torch.equal(target, source)
    assert said == [
        ("back", "waits for", "before"), ("back", "waits for", "now"), ("back", "waits for", "out 1"), ("in", "back"),
        ("back", "records", "back 1"),
    ]  # fmt: skip
    said.clear()
    pool.write(buffer, source)
    assert said[:2] == [("out", "waits for", "now"), ("out", "waits for", "back 1")], "what may still be read"
    said.clear()
    pool.wait(None)
    pool.wait("an event")
    assert said == [("now", "waits for", "an event")]
    pool.give_back(buffer)
    assert pool.take(8) is not buffer
    assert pool.take(4) is buffer
    assert pool.bytes == 12


def test_tensors_take_turns_in_a_staging_area(streams) -> None:
    pool, said = streams
    area = StagingArea(8, 3, torch.device("cpu"))
    first, second = (StagedTensors(pool, area, size, 2) for size in (8, 4))
    assert [len(tensor) for tensor in (*first.here, *second.here)] == [8, 8, 4, 4]
    first.there[1].fill_(3.0)
    first.fetch()
    assert first.here[1].tolist() == [3.0] * 8
    said.clear()
    first.wait_for_fetch()
    assert said == [("now", "waits for", "back 1"), ("now", "waits for", "back 2")]
    first.here[0].fill_(5.0)
    first.send_back()
    assert first.there[0].tolist() == [5.0] * 8
    said.clear()
    second.fetch()
    assert [step for step in said if "out" in step[-1]] == [
        ("back", "waits for", "out 1"), ("back", "waits for", "out 2")
    ], "its place is free once the one before it is on the host again"  # fmt: skip


def test_a_copy_that_nobody_asked_for_ends_before_its_memory_is_another_s(streams) -> None:
    pool, said = streams
    tensor = torch.arange(4, dtype=torch.uint8)
    for fetched in (True, False):
        copy = _Copy(pool, pool.take(4), tensor)
        if fetched:
            copy.fetch()
            copy.fetch()
            assert sum(step[1] == "records" for step in said) == 2, "once there and once back"
        said.clear()
        del copy
        assert said == ([("now", "waits for", "back 1")] if fetched else [])
    assert pool.bytes == 4, "the second had the first one's"


def test_memory_is_free_once_what_lay_there_is_on_the_host(streams) -> None:
    pool, said = streams
    kept = _Kept(pool, None)
    kept.send(torch.arange(4.0))
    said.clear()
    for _ in range(2):
        kept.let_go()
        assert said == [("now", "waits for", "out 1")], "once"
    assert kept._here == []


def test_a_process_waits_for_what_it_reads_on_the_host(streams) -> None:
    pool, said = streams
    staged = StagedTensors(pool, StagingArea(8, 2, torch.device("cpu")), 8, 2)
    said.clear()
    staged.wait_for_host()
    assert said == [], "nothing has been sent"
    staged.send_back()
    said.clear()
    staged.wait_for_host()
    assert said == [("the process", "waits for", "out 1"), ("the process", "waits for", "out 2")]


def test_what_was_kept_is_waited_for_by_who_takes_it(streams) -> None:
    """Whatever order its dimensions had, and wherever in its memory it began."""
    pool, said = streams
    kept = _Kept(pool, None)
    whole = torch.arange(24.0).view(4, 6)
    tensors = [whole.t(), whole[1:3], whole[:, 2:4]]
    sent = [kept.send(tensor) for tensor in tensors]
    kept.fetch()
    for tensor, one in zip(tensors, sent):
        said.clear()
        assert torch.equal(one.take(), tensor)
        assert len(said) == 1
        assert said[0][:2] == ("now", "waits for")
        assert said[0][2].startswith("back ")
