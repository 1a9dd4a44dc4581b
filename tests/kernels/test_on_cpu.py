"""What only a GPU runs, on a CPU: kernels through a stand-in for their language, and which of two ways is taken."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch import Tensor

from nnscaler.kernels import (
    add_gradient,
    add_product,
    gradient,
    loss,
    mix,
    rounded_in_place,
    scale_gradient,
    softmax_loss,
)
from tests.kernels import on_cpu
from tests.kernels.on_cpu import OnGpu
from tests.kernels.test_experts import CHOSEN, gate

PADDING = -7


@pytest.fixture
def kernels(monkeypatch):
    for name, module in on_cpu.MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    for where, name in ((gradient, "_kernels"), (loss, "_kernel")):
        monkeypatch.setattr(where, name, functools.cache(getattr(where, name).__wrapped__))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 8192, 20001])
def test_gradients_are_added_and_scaled(dtype, size, kernels):
    one, other = draw(2, size, dtype=dtype)
    total = torch.full((size,), float("nan")).as_subclass(OnGpu)
    add_gradient(total, one, first=True)
    assert torch.equal(total, one.float())
    add_gradient(total, other, first=False)
    assert torch.equal(total, one.float() + other.float())
    for factor in (0.5, 1.0, 1 / 3):
        mine = one.clone().as_subclass(OnGpu)
        scale_gradient(mine, torch.tensor(factor))
        assert torch.equal(mine, (one.float() * torch.tensor(factor)).to(dtype))


def test_a_gradient_in_strides_is_added_too(kernels):
    total = draw(3).as_subclass(OnGpu)
    wanted = total + draw(6)[::2]
    add_gradient(total, draw(6)[::2], first=False)
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("size", [1, 64, 65, 128, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_is_rounded_in_its_own_memory(dtype, size, kernels, monkeypatch):
    monkeypatch.setattr(gradient, "_FIRST", 64)
    monkeypatch.setattr(gradient, "_BLOCK", 32)
    total = draw(size).as_subclass(OnGpu)
    wanted = (total * 0.3).to(dtype)
    found = rounded_in_place(total, torch.tensor(0.3), dtype)
    assert found.data_ptr() == total.data_ptr()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", [True, False])
def test_a_gpu_adds_a_product_to_a_sum_in_fp32(first, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "addmm", lambda *given, **named: asked.append((given, named)))
    total = draw(2, 4).as_subclass(OnGpu)
    left, right = draw(2, 3, dtype=torch.bfloat16), draw(3, 4, dtype=torch.bfloat16)
    add_product(total, left, right, first)
    ((given, named),) = asked
    assert [one is other for one, other in zip(given, (total, left, right))] == [True] * 3
    assert named == {"out_dtype": torch.float32, "beta": 0 if first else 1, "out": total}


LABELS = [3, 100, PADDING, 0, 57]


@pytest.mark.parametrize("words", [101, 16384, 40000])
@pytest.mark.parametrize("given", ["none", "any", "in strides", "one for all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_of_logits(words, given, dtype, kernels):
    logits, labels = 3 * draw(5, words, dtype=dtype), torch.tensor(LABELS)
    labels[1] = words - 1
    logits[2, 1] = float("nan")  # of a row that counts for nothing
    logits[4, 5] = -float("inf")
    incoming = {
        "none": None, "any": draw(5), "in strides": draw(10)[::2], "one for all": torch.tensor(0.7).expand(5)
    }[given]  # fmt: skip
    wanted = softmax_loss(logits.clone(), labels, PADDING, incoming, True)
    found = softmax_loss(logits.clone().as_subclass(OnGpu), labels, PADDING, incoming, True)
    torch.testing.assert_close(Tensor(found[0]), wanted[0], rtol=1e-5, atol=1e-5)
    rounding = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(found[1].as_subclass(Tensor), wanted[1], **rounding)
    only = logits.clone().as_subclass(OnGpu)
    losses, _ = softmax_loss(only, labels, PADDING, None, False)
    torch.testing.assert_close(losses.as_subclass(Tensor), wanted[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(only.nan_to_num(), logits.nan_to_num()), "nobody wants the gradient"


def test_what_is_no_number_and_a_label_that_is_no_word_show(kernels):
    logits = torch.zeros(4, 300).as_subclass(OnGpu)
    logits[0, 7] = float("nan")
    losses, _ = softmax_loss(logits, torch.tensor([3, 300, -1, 299]), PADDING, None, True)
    assert losses.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_in_another_order_of_memory_and_fp64_take_the_plain_way(dtype, kernels):
    logits, labels = draw(5, 101).to(dtype), torch.tensor(LABELS)
    other = logits if dtype == torch.float64 else logits.t().contiguous().t()
    wanted = softmax_loss(logits.clone(), labels, PADDING, None, True)
    found = softmax_loss(
        other.clone(memory_format=torch.preserve_format).as_subclass(OnGpu), labels, PADDING, None, True
    )
    for one, right in zip(found, wanted):
        torch.testing.assert_close(one.as_subclass(Tensor), right)


def grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """As torch has it: a group's rows by its matrix; or a group's columns by its rows. Of no rows it writes nothing."""
    assert offs.dtype == torch.int32
    for tensor in (left, right):
        short, long = sorted(tensor.stride()[-2:])
        assert (short, long * tensor.itemsize % 16) == (1, 0)
    ranges = list(zip([0, *offs.tolist()], offs.tolist()))
    if right.dim() == 3:
        return torch.cat([left[a:b] @ right[group] for group, (a, b) in enumerate(ranges)])
    nothing = left.new_full((len(left), right.shape[1]), float("nan"))
    return torch.stack([left[:, a:b] @ right[a:b] if a < b else nothing for a, b in ranges])


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [8, 6])
def test_experts_whose_products_are_one_call(chosen, transposed, width, monkeypatch):
    """Six numbers in bf16 are no multiple of 16 bytes: then it is one product after the other."""
    calls: list[int] = []
    monkeypatch.setattr(torch, "_grouped_mm", lambda *given, offs: calls.append(1) or grouped_mm(*given, offs))
    number = CHOSEN[chosen]
    present = int((number < 4).sum())
    shapes = [(7, width), (7, 2), (4, width, 2 * width), (4, width, width), (4, 2 * width)]
    tensors = [draw(*shape, dtype=torch.bfloat16) for shape in shapes]

    def run() -> list[Tensor]:
        leaves = [one.clone().requires_grad_() for one in tensors]
        hidden, scores, up, down, bias = leaves
        if transposed:  # in the other order of memory
            up, down = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (up, down))
        result = mix(hidden, number, scores, up, down, bias, gate, None if present == number.numel() else present)
        gradients = torch.autograd.grad(result, leaves, torch.ones_like(result))
        return [result.detach(), *gradients]

    wanted = run()
    assert not calls
    with monkeypatch.context() as gpu:
        gpu.setattr(Tensor, "is_cuda", True, raising=False)
        found = run()
    # Forward: two products; backward: one for each factor of both, and one for the bias.
    assert len(calls) == (0 if width == 6 or not present else 7)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
