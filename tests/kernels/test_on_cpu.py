"""What only a GPU runs, on a CPU: kernels through a stand-in for their language, and which of two ways is taken."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

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
from nnscaler.kernels.attention import Asked, choice, libraries, probe
from tests.kernels import on_cpu
from tests.kernels.attention import written_out
from tests.kernels.on_cpu import OnGpu
from tests.kernels.test_experts import CHOSEN, gate

PADDING = -7


@pytest.fixture
def kernels(monkeypatch) -> list[int]:
    """How often those of gradients were asked for."""
    asked: list[int] = []
    with monkeypatch.context() as there:  # no longer than that: others ask whether Triton is here, and remember it
        for name, module in on_cpu.MODULES.items():
            there.setitem(sys.modules, name, module)
        made = gradient._kernels.__wrapped__(), loss._kernel.__wrapped__()
    monkeypatch.setattr(gradient, "_kernels", lambda: asked.append(1) or made[0])
    monkeypatch.setattr(loss, "_kernel", lambda: made[1])
    return asked


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
    assert len(kernels) == 5


def test_without_a_gpu_too_a_factor_is_not_rounded_to_the_gradients_type():
    """In bf16, 1 + 1/256 would be 1."""
    gradient = torch.tensor([255 / 128], dtype=torch.bfloat16)
    scale_gradient(gradient, torch.tensor(1 + 1 / 256))
    assert gradient.item() == 2.0


def test_a_gradient_in_strides_is_added_too(kernels):
    total = draw(3).as_subclass(OnGpu)
    wanted = total + draw(6)[::2]
    add_gradient(total, draw(6)[::2], first=False)
    assert torch.equal(total, wanted)
    assert not kernels, "which know no strides"


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


def asked_of(shape: int = 5, **options: object) -> tuple[list[Tensor], Asked]:
    """query [1, shape, 4, 6], keys and values of two heads and seven places"""
    tensors = [draw(1, shape, 4, 6), draw(1, 7, 2, 6), draw(1, 7, 2, 3)]
    return [one.as_subclass(OnGpu) for one in tensors], Asked(0.4, 7 - shape, **options)


@pytest.mark.parametrize(("options", "able"), [
    ((), {"flash_attention_4", "flash_attention_3", "flash_attention_2", "cudnn", "sdpa", "flex_attention"}),
    (("sinks",), {"flash_attention_4", "flex_attention"}),
    (("ALiBi", "windows"), {"flash_attention_2", "flex_attention"}),
    (("soft caps", "windows", "documents"),
     {"flash_attention_4", "flash_attention_3", "flash_attention_2", "flex_attention"}),
    (("documents with later keys",), {"flex_attention"}),
    (("dropout",), set()),
])  # fmt: skip
def test_the_fastest_kernel_is_sought_among_those_that_are_able(options, able, monkeypatch, caplog):
    """Not plain PyTorch, which comes last; on the call's device, once it has nothing else to do."""
    said: list[object] = []

    def fastest(kind: object, kernels: dict[str, object]) -> str | None:
        said.append(set(kernels))
        return "cudnn" if not options else None

    monkeypatch.setattr(choice, "fastest", fastest)
    monkeypatch.setattr(torch.cuda, "device", lambda device: said.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waits"))
    found = choice._probed.__wrapped__(SimpleNamespace(device="cuda:1"), frozenset(options))
    assert found == ("rows" if options else "cudnn")
    assert said == (["cuda:1", "waits", able] if able else [])
    assert ("no fast kernel of attention has dropout" in caplog.text) is not bool(able)


def test_on_a_gpu_the_kernel_is_that_which_is_asked_for_or_the_fastest(monkeypatch):
    probed = []
    monkeypatch.setattr(choice, "_probed", lambda *given: probed.append(given) or "fastest of all")
    monkeypatch.setattr(choice, "_load", lambda name: name)
    tensors, asked = asked_of(right=0)
    some = frozenset({"windows"})
    assert choice._chosen(*tensors, asked, some, "cudnn") == "cudnn"
    assert not probed
    assert choice._chosen(*tensors, asked, some, "auto") == "fastest of all"
    ((kind, options),) = probed
    assert (kind.length, kind.heads, kind.shared, kind.size, kind.value_size) == (7, 4, 2, 6, 3)
    assert options == some
    plain = [one.as_subclass(Tensor) for one in tensors]
    assert choice._chosen(*plain, asked, some, "cudnn") == "rows", "a CPU has none of these"
    assert choice._chosen(*plain, asked, frozenset(), "auto") == "sdpa"


@pytest.mark.parametrize("make", [libraries.sdpa, libraries.cudnn])
def test_fewer_rows_than_keys_take_torchs_own_flash_attention(make, monkeypatch):
    """Whose causal mask ends with the last row, as no other of torch's does."""
    called = []

    def flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float) -> Any:
        called.append((dropout_p, is_causal))
        return written_out(query, key, value, scale=scale, is_causal=is_causal).transpose(1, 2), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    tensors, asked = asked_of(right=0)
    found = make()(*tensors, asked)
    wanted = written_out(*(one.as_subclass(Tensor).transpose(1, 2) for one in tensors), scale=0.4)
    torch.testing.assert_close(found.as_subclass(Tensor), wanted)
    assert called == [(0.0, True)]


def test_a_kernels_time_is_that_of_one_run(monkeypatch):
    """Of three, after a first one that may compile; forward and backward, of as many heads as a device is busy with."""
    now, seen = [0.0], []

    def run(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
        now[0] += 2.0 if seen else 100.0
        seen.append((query.shape, key.shape))
        return query * 1.0 + 0 * (key.sum() + value.sum())

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (query, key, _), asked = asked_of(7)
    kind = probe.kind_of(*(one.as_subclass(Tensor) for one in (query, key, key)), asked)
    assert probe._time(run, kind) == 2.0
    assert seen == [((1, 7, 4, 6), (1, 7, 2, 6))] * 4
