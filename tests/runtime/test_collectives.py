"""Collectives among three, five and eleven ranks, which are threads of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnscaler.kernels import counting
from nnscaler.operators.experts import experts
from nnscaler.runtime import collectives
from nnscaler.runtime import experts as runtime_experts
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.experts import experts_along_t_n
from nnscaler.sums import IN_FP32, GradientSum
from tests import threads, tiny
from tests.distributed import test_collectives as of_processes
from tests.distributed import test_experts as of_experts
from tests.threads import Ranks

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.mark.parametrize(("count", "shape"), [(3, (3, 6, 9)), (5, (10, 5, 15)), (1, (2, 3, 4))])
def test_resharding_between_all_layouts(count, shape, monkeypatch):
    """The mesh is the axis that a thread has."""
    monkeypatch.setattr(of_processes, "SHAPE", shape)
    monkeypatch.setattr(of_processes, "Mesh", list)
    monkeypatch.setattr(of_processes, "Axes", lambda axes, device: axes)
    alone = Axis(1, 0, None)
    counts = Ranks(count).run(lambda axis: of_processes.check_all_pairs((axis if count > 1 else alone,)))
    assert min(counts) >= 25


def test_a_slice_is_a_copy_that_lies_in_order():
    """Whatever the order of what it is a slice of; else it would keep all of that, and be copied again."""
    turned = torch.arange(24.0).view(4, 6).t()
    for whole, dim in ((turned, 0), (turned, 1), (turned.contiguous(), 0), (turned.contiguous(), 1)):
        found = collectives._sliced(whole, Axis(2, 1, None), dim)
        assert torch.equal(found, whole[3:] if dim == 0 else whole[:, 2:])
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == 12 * 4


@pytest.mark.parametrize("length", [48, 9])
def test_attention_along_the_sequence(length):
    Ranks(3).run(lambda axis: of_processes.check_attention_of_shards(length, axis, Axis(1, 0, None)))


@pytest.mark.parametrize(
    ("count", "owners"), [(3, (2, 0, 1, 1, 0, 2)), (3, (0, 0, 0, 2, 2, 2, 1, 1, 1)), (11, tuple(range(10, -1, -1)))]
)
def test_pieces_travel_to_their_owners_and_back(count, owners):
    def there_and_back(axis: Axis) -> list[int]:
        places = torch.arange(2.0 * len(owners)).view(len(owners), 2).expand(3, -1, -1)
        position = places.chunk(count, 1)[axis.rank].clone().requires_grad_()
        mine = collectives.deal(position, axis, 1, owners)
        assert torch.equal(collectives.collect(mine, axis, 1, owners), position)
        (gradient,) = torch.autograd.grad(mine, position, 2 * mine.detach())
        assert torch.equal(gradient, 2 * position)
        return mine[1].flatten().int().tolist()

    for rank, found in enumerate(Ranks(count).run(there_and_back)):
        pieces = [piece for piece, owner in enumerate(owners) if owner == rank]
        assert found == [2 * piece + at for piece in pieces for at in range(2)]


def test_rows_are_sent_to_whom_they_are_for_and_gradients_back():
    """To some more, to some none; numbers of places, which have no gradient, too."""
    counts = torch.tensor([[2, 0, 3], [1, 4, 0], [0, 2, 1]])  # [from, to]

    def send(axis: Axis) -> tuple[list[list[float]], list[list[float]], list[int]]:
        sent, received = counts[axis.rank].tolist(), counts[:, axis.rank].tolist()
        rows = (100.0 * axis.rank + torch.arange(sum(sent)).unsqueeze(1).expand(-1, 2)).requires_grad_()
        found = collectives.exchange_rows(rows, axis, sent, received)
        (gradient,) = torch.autograd.grad(found, rows, found.detach() + 1)
        number = collectives.exchange_rows(rows[:, 0].long(), axis, sent, received)
        return found.tolist(), gradient.tolist(), number.tolist()

    wanted = [[0, 1, 100], [101, 102, 103, 104, 200, 201], [2, 3, 4, 202]]
    sizes = counts.sum(1).tolist()
    for rank, (found, gradient, number) in enumerate(Ranks(3).run(send)):
        assert number == wanted[rank]
        assert found == [[value, value] for value in wanted[rank]]
        assert gradient == [[100 * rank + at + 1] * 2 for at in range(sizes[rank])]


@pytest.mark.parametrize("shape", [(2, 3), (4,), ()])
@pytest.mark.parametrize(("dtype", "cast"), [(torch.float32, None), (torch.float32, torch.bfloat16)])
def test_shards_are_gathered_in_order_and_cast_before(shape, dtype, cast):
    def gather(axis: Axis) -> torch.Tensor:
        own = torch.full(shape, axis.rank + 1 + 2**-10, dtype=dtype)
        gathered, work = collectives.start_gather(own, axis, cast)
        assert own.eq(axis.rank + 1 + 2**-10).all()
        assert gathered.dtype == (cast or dtype)
        if not shape:
            work.wait()
            return gathered
        return collectives.finish_gather(gathered, work, len(shape) - 1)

    each = [torch.full(shape, rank + 1 + 2**-10, dtype=dtype).to(cast or dtype) for rank in range(5)]
    wanted = torch.cat(each, -1) if shape else torch.stack(each)
    for found in Ranks(5).run(gather):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "sums",
    [IN_FP32, GradientSum("reduce_scatter", "bfloat16"), GradientSum("all_to_all", "bfloat16")],
    ids=lambda sums: f"{sums.collective} {sums.travels_as}",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_of_eleven_ranks_are_summed_in_fp32_at_least(sums, dtype, dim, monkeypatch):
    """256 + 10 x 1 loses all small terms where it is added up in bf16, as by a reduce-scatter of such."""
    shape, sent = (22, 33), set()
    for name in ("all_to_all_single", "reduce_scatter_single"):

        def recorded(output: torch.Tensor, terms: torch.Tensor, *given: Any, name: str = name, **named: Any) -> Any:
            sent.add((name, terms.dtype))
            return getattr(threads, name)(output, terms, *given, **named)

        monkeypatch.setattr(collectives.dist if name == "all_to_all_single" else collectives, name, recorded)

    def scatter(axis: Axis) -> torch.Tensor:
        term = torch.full(shape, 256.0 if axis.rank == 0 else 1.0, dtype=dtype)
        term.select(dim, shape[dim] // 11 * 4).fill_(axis.rank)  # the first place of the fifth rank's slice
        result, work = collectives.start_gradient_scatter(term, axis, dim, sums)
        assert work is not None
        work.wait()
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        return result

    each = shape[dim] // 11
    for rank, found in enumerate(Ranks(11).run(scatter)):
        assert found.shape[dim] == each
        whole = torch.full(found.shape, 266.0)
        if rank == 4:
            whole.select(dim, 0).fill_(55.0)
        error = (found - whole).abs().max()
        assert error == 0 if sums.collective == "all_to_all" or sums == IN_FP32 else error <= 10
    travels_as = torch.bfloat16 if sums != IN_FP32 else torch.promote_types(dtype, torch.float32)
    assert sent == {(f"{sums.collective}_single", travels_as)}


@pytest.mark.parametrize("transposed", [None, False, True])
def test_tokens_travel_to_the_experts_of_three_devices_and_back(transposed, monkeypatch):
    """Nine experts; their weights as they mostly are, or the other way round."""
    monkeypatch.setattr(runtime_experts, "dist", collectives.dist)
    monkeypatch.setattr(of_experts, "EXPERTS", 9)
    given = of_experts.GATED | ({} if transposed is None else {"transposed": transposed})
    for choose in of_experts.CHOSEN:
        (hidden, chosen, scores, up, down, bias), gradient = of_experts.example(choose, biased=True)
        if transposed:
            up, down = up.movedim(3, 1).contiguous(), down.transpose(1, 2).contiguous()
        tensors = [hidden, chosen, scores, up, down, bias]
        wanted = of_experts.results(lambda *args: experts(*args, **given), tensors, gradient)

        def on_a_device(axis: Axis, tensors: Any = (*tensors, gradient)) -> list[torch.Tensor]:
            *parts, incoming = (tensor.chunk(3)[axis.rank] for tensor in tensors)
            noted: list[tuple[torch.Tensor, int]] = []
            counting.set(lambda *choice: noted.append(choice))  # for this thread alone
            found = of_experts.results(lambda *args: experts_along_t_n(axis, *args, **given), parts, incoming)
            ((choices, number),) = noted
            assert torch.equal(choices, parts[1])
            assert number == 9, "of all devices"
            return found

        for whole, *shards in zip(wanted, *Ranks(3).run(on_a_device), strict=True):
            assert tiny.close(torch.cat(shards), whole) < 1e-12, choose.__name__
