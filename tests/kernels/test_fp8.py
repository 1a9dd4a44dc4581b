"""Products in fp8: as exact as eight bits allow, the very numbers that are said to be multiplied, and kept as said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nnscaler.kernels import fp8


def inputs(*shape: int, n: int = 48, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x [*shape], W [n, k], and a gradient of the product."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*one, generator=generator) for one in (shape, (n, shape[-1]), (*shape[:-1], n)))
    return x.to(dtype).requires_grad_(), (0.02 * w).to(dtype).requires_grad_(), (1e-4 * g).to(dtype)


def results(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """The product, and the gradients of x and W."""
    y = fp8.linear(fp8.rounded(x), w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def in_fp64(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    x, w, g = (one.detach().double() for one in (x, w, g))
    return [x @ w.t(), g @ w, g.flatten(0, -2).t() @ x.flatten(0, -2)]


def as_e4m3(x: Tensor) -> Tensor:
    """The number that each element is rounded to, by the definition of e4m3: three bits behind the leading one."""
    scale = x.detach().double().abs().max() / 448
    scaled = x.detach().double() / scale
    exponent = torch.frexp(scaled).exponent.clamp(min=-5)  # of the leading bit, plus 1; below are subnormal numbers
    step = torch.pow(2.0, exponent.double() - 4)
    return (scaled / step).round() * step * scale


@pytest.mark.parametrize("shape", [(2, 32, 64), (3, 17, 40)], ids=["aligned", "odd"])
def test_errors_are_those_of_e4m3(shape):
    given = inputs(*shape)
    for found, wanted, of in zip(results(*given), in_fp64(*given), given[0:1] + given):
        error = float((found.double() - wanted).norm() / wanted.norm())
        assert 0.025 < error < 0.045
        assert found.dtype == of.dtype


def test_rounded_numbers_are_multiplied():
    given = inputs(2, 32, 64)
    found, wanted = results(*given), in_fp64(*(as_e4m3(one) for one in given))
    for one, other in zip(found, wanted):
        assert float((one.double() - other).norm() / other.norm()) < 3e-3, "the rounding of bf16"


def test_in_fp32_too():
    given = inputs(2, 32, 64, dtype=torch.float32)
    for one, other in zip(results(*given), in_fp64(*(as_e4m3(one) for one in given))):
        assert one.dtype == torch.float32
        assert float((one.double() - other).norm() / other.norm()) < 1e-6


def test_zeros_stay_and_what_is_no_number_is_not_lost():
    x, w, g = inputs(32, 16)
    assert all(not one.any() for one in results(x, torch.zeros_like(w, requires_grad=True), g * 0))
    for bad in (torch.inf, torch.nan):
        broken = x.detach().clone()
        broken[3, 3] = bad
        assert fp8.linear(fp8.rounded(broken), w).isnan().any()


def test_backward_keeps_x_in_one_byte_and_once_for_all_that_take_it():
    x, w, _ = inputs(2, 32, 64)
    other = torch.nn.Parameter(w.detach().clone())
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        taken = fp8.rounded(x)
        results = fp8.linear(taken, w), fp8.linear(taken, other)
    assert all(result.requires_grad for result in results)
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.dim())
    assert sizes == sorted([x.numel(), w.nbytes, other.nbytes])


def test_of_a_frozen_weight_nothing_is_kept_but_itself():
    x, w, g = inputs(2, 32, 64)
    w = w.detach()
    y = fp8.linear(fp8.rounded(x), w)
    assert all(one is None or one.dim() == 0 or one.data_ptr() == w.data_ptr() for one in y.grad_fn.saved_tensors)
    y.backward(g)
    assert float((x.grad.double() - in_fp64(x, w, g)[1]).norm() / x.grad.double().norm()) < 0.045


def test_a_weight_that_comes_in_fp8_gives_the_same_to_the_last_bit_and_is_kept_so():
    x, w, g = inputs(2, 32, 64)
    scale = fp8.scale_of(w.detach())
    place = torch.zeros((), dtype=w.dtype).expand(w.shape).requires_grad_()
    weight = fp8.Weight(place, scale, fp8.rounded_alone(w.detach(), scale))
    y = fp8.linear(fp8.rounded(x), weight)
    kept = {one.data_ptr() for one in y.grad_fn.saved_tensors if one.dim()}
    assert weight.rows.data_ptr() in kept
    assert not {w.data_ptr(), place.data_ptr()} & kept
    found = [y.detach(), *torch.autograd.grad(y, (x, place), g)]
    assert all(torch.equal(one, wanted) for one, wanted in zip(found, results(x, w, g)))
    assert found[2].dtype == torch.bfloat16


def test_a_weight_whose_scale_is_known_gives_the_same_to_the_last_bit_and_is_not_read_for_it(monkeypatch):
    x, w, g = inputs(2, 32, 64)
    wanted, scale, taken = results(x, w, g), fp8.scale_of(w.detach()), fp8.rounded(x)
    looked, scale_of = [], fp8.scale_of
    monkeypatch.setattr(fp8, "scale_of", lambda matrix: looked.append(matrix.shape) or scale_of(matrix))
    y = fp8.linear(taken, fp8.Weight(w, scale))
    found = [y.detach(), *torch.autograd.grad(y, (x, w), g)]
    assert all(map(torch.equal, found, wanted))
    assert looked == [g.flatten(0, -2).shape], "the gradient's alone"
    assert not torch.equal(fp8.linear(taken, fp8.Weight(w, 3 * scale)), wanted[0]), "it is used"


def test_compiled_is_the_same():
    given = inputs(2, 32, 64)
    compiled = torch.compile(lambda x, w: fp8.linear(fp8.rounded(x), w), backend="aot_eager", fullgraph=True)
    x, w, g = given
    y = compiled(x, w)
    for found, wanted in zip([y, *torch.autograd.grad(y, (x, w), g)], results(*given)):
        assert torch.equal(found, wanted)


def test_sums_of_gradients_are_kept_in_fp32(monkeypatch):
    """On a GPU; those of forward may be kept in less."""
    fast = []
    monkeypatch.setattr(fp8, "_multiplies", lambda on_gpu: True)
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *given, **named: fast.append(named["use_fast_accum"]) or multiplied(*given, **named)
    )
    results(*inputs(2, 32, 64))
    assert fast == [True, False, False]


def multiplied(left, right, scale_a, scale_b, out_dtype, use_fast_accum) -> Tensor:
    """In place of a GPU's product."""
    return ((left.float() @ right.float()) * (scale_a * scale_b)).to(out_dtype)


class OnGpu(Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("rows", "knows", "in_fp8"), [(32, True, True), (32, False, False), (17, True, False)], ids=["new", "older", "odd"]
)
def test_where_a_gpu_has_no_such_product_the_same_numbers_are_multiplied_in_fp32(rows, knows, in_fp8, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **named: asked.append(1) or multiplied(*given, **named))
    monkeypatch.setattr(fp8, "_knows_fp8", lambda: knows)
    x, w, _ = (one.detach() for one in inputs(rows, 64))
    scales = fp8.scale_of(x), fp8.scale_of(w)
    left, right = (fp8.round_by(one, scale) for one, scale in zip((x, w), scales))
    found = fp8.product(left.as_subclass(OnGpu), right, *scales, torch.bfloat16)
    wanted = as_e4m3(x) @ as_e4m3(w).t()
    assert bool(asked) == in_fp8
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).norm() / wanted.norm()) < 3e-3


@pytest.mark.parametrize(
    ("capability", "hip", "knows"), [((8, 9), None, True), ((9, 0), None, True), ((8, 6), None, False),
                                     ((9, 4), "6.0", False)],
)  # fmt: skip
def test_which_gpus_have_products_in_fp8(capability, hip, knows, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert fp8._knows_fp8.__wrapped__() is knows
    assert ("Some GPU has no products in fp8" in caplog.text) is not knows


def test_a_cpu_multiplies_the_same_numbers_in_fp32(monkeypatch):
    def refuse(*given, **named):
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(fp8, "_knows_fp8", lambda: True)
    x, w, _ = (one.detach() for one in inputs(32, 64))
    scales = fp8.scale_of(x), fp8.scale_of(w)
    found = fp8.product(*(fp8.round_by(one, scale) for one, scale in zip((x, w), scales)), *scales, torch.bfloat16)
    wanted = as_e4m3(x) @ as_e4m3(w).t()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).norm() / wanted.norm()) < 3e-3
