"""The experts of a mixture against one expert of one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nnscaler.kernels import kept_bytes, mix
from nnscaler.kernels.experts import outer_products, sum_of_rows

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 7, 2, 4, 6, 3


def gate(x: Tensor) -> Tensor:
    first, rest = x.chunk(2, -1)
    return F.silu(first) * rest


def one_by_one(hidden: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    results = []
    for row, numbers, weights in zip(hidden, chosen.tolist(), scores):
        result = 0 * row
        for number, weight in zip(numbers, weights):
            if number < len(up):
                result = result + weight * (gate(row @ up[number] + bias[number]) @ down[number])
        results.append(result)
    return torch.stack(results)


def example(chosen: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(TOKENS, WIDTH), (TOKENS, CHOICES), (EXPERTS, WIDTH, 2 * INNER), (EXPERTS, INNER, WIDTH)]
    hidden, scores, up, down = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    bias = torch.randn(EXPERTS, 2 * INNER, dtype=torch.float64).requires_grad_()
    return [hidden, chosen, scores, up, down, bias]


def different(number: int) -> Tensor:
    return torch.rand(TOKENS, number, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :CHOICES]


CHOSEN = {
    "any": different(EXPERTS),
    "all the same two": torch.tensor([[2, 0]] * TOKENS),
    "twice the same": torch.full((TOKENS, CHOICES), 1),
    "some elsewhere": different(EXPERTS + 2).clamp(max=EXPERTS),
    "all elsewhere": torch.full((TOKENS, CHOICES), EXPERTS),
}


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("transposed", [False, True])
def test_results_and_gradients(chosen, transposed):
    arguments = example(chosen)
    present = int((chosen < EXPERTS).sum())

    def ours(hidden: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        if transposed:  # in the other order of memory
            up, down = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (up, down))
        return mix(hidden, chosen, scores, up, down, bias, gate, None if present == chosen.numel() else present)

    leaves = [x for x in arguments if x.requires_grad]
    found, wanted = ours(*arguments), one_by_one(*arguments)
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn_like(found)
    expected = torch.autograd.grad(wanted, leaves, gradient, allow_unused=True)
    for one, other in zip(torch.autograd.grad(found, leaves, gradient), expected):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_weights_lies_in_memory_as_they_do(transposed):
    """Else the first one is copied, and each other one added across its order."""
    left, right, ends = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, INNER), torch.tensor([3, TOKENS])
    like = torch.empty(2, INNER, WIDTH).transpose(1, 2) if transposed else torch.empty(2, WIDTH, INNER)
    found = outer_products(left, right, ends, like)
    assert found.stride() == like.stride()
    torch.testing.assert_close(found, torch.stack([left[:3].t() @ right[:3], left[3:].t() @ right[3:]]))


@pytest.mark.parametrize("trained", range(6))
def test_each_gradient_alone(trained):
    """As where weights are frozen."""
    arguments: list[Tensor] = [x.detach() for x in example(CHOSEN["any"])]
    if trained == 1:
        return  # numbers of experts have no gradient
    leaf = arguments[trained] = arguments[trained].requires_grad_()
    (found,) = torch.autograd.grad(mix(*arguments, gate).square().sum(), leaf)
    (wanted,) = torch.autograd.grad(one_by_one(*arguments).square().sum(), leaf)
    torch.testing.assert_close(found, wanted)


def test_what_backward_keeps():
    """Beside the inputs, what the first product gives, and where rows lie."""
    arguments = example(CHOSEN["any"])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    pack: Callable[[Tensor], Tensor] = keep
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        mix(*arguments, gate)
    inputs = {x.untyped_storage().data_ptr() for x in arguments}
    inner = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    ends = 4 * EXPERTS
    own = sum(size for pointer, size in inner.items() if pointer not in inputs)
    assert own == kept_bytes(TOKENS, CHOICES, 2 * INNER, 8) + ends


def test_bf16_is_as_near_as_one_product_after_the_other():
    arguments = [x.detach().bfloat16() if x.is_floating_point() else x for x in example(CHOSEN["any"])]
    exact = one_by_one(*(x.double() if x.is_floating_point() else x for x in arguments))
    found, rounded = mix(*arguments, gate), one_by_one(*arguments)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.1 * (rounded - exact).norm()


def test_products_with_scores_in_fp32_are_rounded_once_they_are_summed():
    hidden, chosen, scores, *weights = (
        x.detach().bfloat16() if x.is_floating_point() else x for x in example(CHOSEN["any"])
    )
    scores = scores.float()
    each = [mix(hidden, one, torch.ones(TOKENS, 1), *weights, gate).float() for one in chosen.split(1, 1)]
    wanted = sum(one * score for one, score in zip(each, scores.split(1, 1)))
    assert torch.equal(mix(hidden, chosen, scores, *weights, gate), wanted.bfloat16())


def test_results_of_many_choices_are_added_up_in_fp32():
    """257 and 258 lie between two neighbours in bf16 and on one: rounded after each choice, the ones were lost."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    for place in ([[0, 1, 2]], [[0, 1, 2, 3]]):  # the last one is elsewhere
        total = sum_of_rows(rows, torch.tensor(place))
        assert total.dtype == torch.bfloat16
        assert total.item() == 258


def test_backward_may_be_asked_twice():
    arguments = example(CHOSEN["any"])
    leaves = [x for x in arguments if x.requires_grad]
    loss = mix(*arguments, gate).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, other in zip(torch.autograd.grad(loss, leaves), first):
        assert torch.equal(one, other)
