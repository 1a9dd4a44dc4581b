"""The kernels for GPUs against what runs on the CPU."""

import functools

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.kernels import Documents, add_gradient, add_product, fp8, rounded_in_place, scale_gradient, softmax_loss
from nnscaler.kernels.random import draws_of, dropout, kept, kept_at_once, numbers_of, place_of, together
from nnscaler.operators.attention import attention
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PADDING = -100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("words", [101, 40000])
@pytest.mark.parametrize("given", [False, True])
def test_loss_and_gradient_of_logits(dtype, tolerance, words, given):
    logits = (torch.randn(5, words) * 3).to(dtype)
    labels = torch.tensor([3, words - 1, PADDING, 0, 100])
    incoming = torch.randn(5) if given else None
    wanted = softmax_loss(logits.clone(), labels, PADDING, incoming, True)
    found = softmax_loss(logits.cuda(), labels.cuda(), PADDING, None if incoming is None else incoming.cuda(), True)
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=tolerance, atol=1e-6)


def test_a_logit_that_is_not_a_number_shows():
    logits = torch.zeros(2, 300, device="cuda")
    logits[0, 7] = float("nan")
    losses, _ = softmax_loss(logits, torch.tensor([3, 3], device="cuda"), PADDING, None, True)
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_chunked_loss(factor):
    hidden, weight = torch.randn(1, 37, 64), torch.randn(1001, 64)
    labels = torch.randint(1001, (1, 37))
    labels[0, ::5] = PADDING

    def gradients(device):
        inputs = [tensor.to(device).requires_grad_() for tensor in (hidden, weight)]
        losses = chunk_linear_cross_entropy(*inputs, labels.to(device), PADDING, 8)
        return [gradient.cpu() for gradient in torch.autograd.grad(factor * losses.sum(), inputs)]

    for found, wanted in zip(gradients("cuda"), gradients("cpu")):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 64, 20001])
def test_gradients_are_added_and_scaled(dtype, size):
    gradient = torch.randn(size + 64, dtype=dtype, device="cuda")
    total = torch.full((size,), float("nan"), device="cuda")
    add_gradient(total, gradient[64:], first=True)
    torch.testing.assert_close(total, gradient[64:].float(), rtol=0, atol=0)
    add_gradient(total, gradient[:size], first=False)
    torch.testing.assert_close(total, gradient[64:].float() + gradient[:size].float(), rtol=0, atol=0)
    wanted = (gradient.float() * 0.5).to(dtype)
    scale_gradient(gradient, torch.tensor(0.5, device="cuda"))
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2**16 + 1, 5 * 2**16 - 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_is_rounded_in_its_own_memory(dtype, size):
    total = torch.randn(size, device="cuda")
    factor = torch.tensor(0.3, device="cuda")
    wanted = (total * factor).to(dtype)
    found = rounded_in_place(total, factor, dtype)
    assert found.data_ptr() == total.data_ptr()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_added_without_rounding_them(dtype):
    left, right = (torch.randn(shape, device="cuda").to(dtype) for shape in ((304, 200), (200, 24)))
    total = torch.full((304, 24), float("nan"), device="cuda")
    add_product(total, left, right, first=True)
    add_product(total, left, right, first=False)
    assert tiny.close(total, 2 * (left.double() @ right.double())) < 2e-5


def test_a_label_that_is_no_word_shows():
    losses, _ = softmax_loss(
        torch.zeros(3, 300, device="cuda"), torch.tensor([299, 300, -1], device="cuda"), PADDING, None, True
    )
    assert losses.isnan().tolist() == [False, True, True]


SHAPE = (2, 64, 1024)
DRAWS, PLACE = draws_of(seed=-5, step=10**6, micro_batch=7), place_of("layers.3", 1)


def test_what_is_dropped_is_the_same_as_on_a_cpu():
    numbers = together(numbers_of(SHAPE)) + 2**33
    given = DRAWS.cuda(), PLACE.cuda(), numbers.cuda()
    for function in (kept, kept_at_once):
        assert torch.equal(function(0.1, *given).cpu(), kept(0.1, DRAWS, PLACE, numbers))


def test_dropout_inside_a_compiled_region():
    x, gradient = torch.randn(SHAPE), torch.randn(SHAPE)

    def run(call, device):
        mine = x.to(device).requires_grad_()
        result = call(mine, 0.1, DRAWS.to(device), PLACE.to(device), numbers_of(SHAPE, device))
        return [y.cpu() for y in (result.detach(), *torch.autograd.grad(result, mine, gradient.to(device)))]

    compiled = torch.compile(torch.ops.nnscaler.dropout, fullgraph=True, dynamic=False)
    for found, wanted in zip(run(compiled, torch.device("cuda")), run(dropout, torch.device("cpu"))):
        torch.testing.assert_close(found, wanted)


def test_attention_drops_the_same_weights():
    inputs = [torch.randn(shape) for shape in ((2, 4, 96, 16), (2, 2, 96, 16), (2, 2, 96, 16))]
    batches, heads, *_ = numbers_of((2, 4, 96, 96))
    which = {"draws": DRAWS, "place": PLACE, "batches": batches, "heads": heads}

    def run(device):
        mine = [x.to(device).requires_grad_() for x in inputs]
        result = attention(*mine, dropout=0.2, **{name: x.to(device) for name, x in which.items()})
        return [y.cpu() for y in (result.detach(), *torch.autograd.grad(result.square().sum(), mine))]

    for found, wanted in zip(run("cuda"), run("cpu")):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shard_is_rounded_to_fp8_as_on_a_cpu(dtype):
    shard = torch.randn(300, 70, dtype=dtype) * 3
    scale = fp8.scale_of(shard)
    found = fp8.rounded_alone(shard.cuda(), scale.cuda())
    assert torch.equal(found.cpu().view(torch.uint8), fp8.rounded_alone(shard, scale).view(torch.uint8))


def test_a_weight_that_comes_in_fp8_gives_the_same_in_a_compiled_region():
    x, w, g = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((64, 128), (256, 128), (64, 256)))
    scale = fp8.scale_of(w)
    place = torch.zeros((), dtype=w.dtype, device="cuda").expand(w.shape).requires_grad_()
    parts = (place, scale, fp8.rounded_alone(w, scale))

    @functools.partial(torch.compile, dynamic=False, fullgraph=True)
    def region(x, *weight):
        return fp8.linear(fp8.rounded(x), fp8.Weight(*weight) if len(weight) > 1 else weight[0])

    x, w = x.requires_grad_(), w.requires_grad_()
    found, wanted = ([y := region(x, *some), *torch.autograd.grad(y, (x, some[0]), g)] for some in (parts, (w,)))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_what_two_products_take_in_fp8_is_written_once():
    x, *weights = (torch.randn(size, 256, dtype=torch.bfloat16, device="cuda") for size in (64, 128, 32))

    def products(x, *weights):
        given = fp8.rounded(x.relu())
        return [fp8.linear(given, weight) for weight in weights]

    _, (code,) = run_and_get_code(torch.compile(products), x, *weights)
    assert code.count("empty_strided_cuda((64, 256), (256, 1), torch.float8_e4m3fn)") == 1


def test_borders_of_documents_do_not_wait_for_the_device():
    """By hand, as on the CPU: places 4, 5 and 6 of two rows."""
    numbers = torch.tensor([[0, 0, 0, 1, 1, 5, 5, 5, 2], [3, 1, 1, 1, 1, 1, 1, 0, 0]])
    there = numbers.cuda()
    Documents(there).note(numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, keys, longest = Documents(there).borders(4, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (rows.device, rows.dtype, longest) == (there.device, torch.int32, 6)
    assert rows.tolist() == [0, 0, 1, 3, 3, 3, 6, 6]
    assert keys.tolist() == [0, 3, 5, 8, 9, 10, 16, 18]
