"""The chunked loss against torch's cross-entropy in fp64, and the memory that it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_linear_cross_entropy import chunk_linear_cross_entropy, in_chunks
from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.kernels import add_product, gradient, rounded_in_place, softmax_loss
from nnscaler.operators.registry import find
from tests import tiny

PADDING = -100


def inputs(batch, length, width, words, dtype=torch.float64, padded=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, words, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < padded] = PADDING
    return hidden, weight, labels


def reference(hidden, weight, labels, padding=PADDING):
    logits = hidden.double() @ weight.double().t()
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=padding, reduction="none")
    return flat.view(labels.shape)


def gradients(losses, incoming, *inputs):
    return torch.autograd.grad(losses, inputs, incoming.to(losses.dtype))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 23), width=st.integers(1, 9), words=st.integers(2, 17),
    chunk=st.integers(1, 40), padded=st.sampled_from([0.0, 0.4, 1.0]), ones=st.booleans(),
    padding=st.sampled_from([PADDING, 0, 1]),
)  # fmt: skip
def test_agrees_with_cross_entropy_in_fp64(batch, length, width, words, chunk, padded, ones, padding):
    """Also where the padding's label is that of a word."""
    hidden, weight, labels = inputs(batch, length, width, words, padded=padded)
    labels[labels == PADDING] = padding
    losses = chunk_linear_cross_entropy(hidden, weight, labels, padding, chunk)
    wanted = reference(hidden, weight, labels, padding)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    # An expanded scalar, as a sum's backward gives, and any other gradient take different ways.
    incoming = torch.tensor(0.7).expand(labels.shape) if ones else torch.randn(labels.shape)
    for found, right in zip(gradients(losses, incoming, hidden, weight), gradients(wanted, incoming, hidden, weight)):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, tolerance):
    hidden, weight, labels = inputs(2, 37, 16, 101, dtype)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 8)
    wanted = reference(hidden, weight, labels)
    assert (losses - wanted).norm() / wanted.norm() < tolerance
    ones = torch.ones(labels.shape)
    for found, right in zip(gradients(losses, ones, hidden, weight), gradients(wanted, ones, hidden, weight)):
        assert found.dtype == dtype
        assert (found.double() - right.double()).norm() / right.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("chunks", [32, 128])
def test_gradients_are_as_exact_as_without_chunks(dtype, scale, chunks):
    """The weight's is summed over chunks: in the type of the weight, 128 chunks cost five times the error."""
    tokens, generator = 2048, torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, 64, generator=generator).to(dtype)
    weight = (0.1 * torch.randn(512, 64, generator=generator)).to(dtype)
    labels = torch.randint(0, 512, (1, tokens), generator=generator)

    def errors(loss, exact=None, dtype=dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        found = torch.autograd.grad(loss(*inputs, labels).sum(), inputs, torch.tensor(scale, dtype=torch.float32))
        return found if exact is None else [tiny.close(a, b) for a, b in zip(found, exact)]

    def plain(hidden, weight, labels):
        logits = F.linear(hidden, weight).float().flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), reduction="none")

    exact = errors(lambda h, w, y: reference(h, w, y).float(), dtype=torch.float64)
    of_hidden, of_weight = errors(lambda *x: chunk_linear_cross_entropy(*x, PADDING, tokens // chunks), exact)
    of_hidden_plain, of_weight_plain = errors(plain, exact)
    assert of_weight < 1.01 * of_weight_plain
    # That of the hidden states is there for ones, and rounded once more when it is scaled.
    assert of_hidden < (1.01 if scale == 1 else 1.2) * of_hidden_plain


@pytest.mark.parametrize("uniform", [True, False])
def test_a_second_backward_gives_the_same_once_more(uniform):
    hidden, weight, labels = inputs(2, 9, 4, 7)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)
    wanted = reference(hidden, weight, labels)
    incoming = torch.tensor(0.7).expand(labels.shape) if uniform else torch.rand(labels.shape)
    first = torch.autograd.grad(losses, (hidden, weight), incoming, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for factor in (2.0, 0.5):
        again = (factor * incoming[0, 0]).expand(labels.shape) if uniform else factor * incoming
        found = torch.autograd.grad(losses, (hidden, weight), again, retain_graph=True)
        right = torch.autograd.grad(wanted, (hidden, weight), again.double(), retain_graph=True)
        for a, b in zip(found, right):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(first, kept):
        assert a.equal(b)


def test_a_gradient_of_the_gradient_is_refused():
    hidden, weight, labels = inputs(1, 6, 4, 7)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_that_is_no_word_is_refused(label):
    hidden, weight, labels = inputs(1, 6, 4, 7)
    labels[0, 3] = label
    with pytest.raises(ValueError, match=f"a label is {label}; labels must be from 0 to 6, or padding_idx=-100"):
        chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)


@pytest.mark.parametrize("label", [7, -1])
def test_nor_does_the_loss_itself_take_one_for_another_word(label):
    with pytest.raises(RuntimeError, match="out of bounds"):
        softmax_loss(torch.zeros(2, 7), torch.tensor([3, label]), PADDING, None, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1, 5 * 2**16 - 3])
def test_a_sum_is_rounded_in_its_own_memory(dtype, size):
    total = torch.randn(size)
    wanted = (total * 0.3).to(dtype)
    found = rounded_in_place(total, torch.tensor(0.3), dtype)
    assert found.data_ptr() == total.data_ptr()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("slow", [False, True])
def test_products_are_added_without_rounding_them(slow, monkeypatch):
    monkeypatch.setattr(gradient, "are_slow", lambda device, dtype: slow)
    left, right = torch.randn(30, 200).bfloat16(), torch.randn(200, 20).bfloat16()
    total = torch.full((30, 20), float("nan"))
    add_product(total, left, right, first=True)
    add_product(total, left, right, first=False)
    assert tiny.close(total, 2 * (left.double() @ right.double())) < 2e-5


def test_padded_positions_count_for_nothing():
    hidden, weight, labels = inputs(2, 9, 4, 7, padded=0.0)
    labels[0] = PADDING
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)
    hidden_gradient, weight_gradient = gradients(losses.sum(), torch.tensor(1.0), hidden, weight)
    assert losses[0].eq(0).all()
    assert hidden_gradient[0].eq(0).all()
    only = chunk_linear_cross_entropy(hidden[1:], weight, labels[1:], PADDING, 4)
    torch.testing.assert_close(weight_gradient, gradients(only.sum(), torch.tensor(1.0), weight)[0])


def test_a_huge_activation_at_a_padded_position_does_no_harm():
    hidden, weight, labels = inputs(1, 6, 4, 7, padded=0.0)
    labels[0, 2] = PADDING
    with torch.no_grad():
        hidden[0, 2] = 1e30
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)
    assert losses.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_at_a_padded_position_do_no_harm(value):
    logits, labels = torch.randn(4, 7), torch.tensor([1, PADDING, 6, PADDING])
    right = torch.stack([logits[0], logits[2]]).requires_grad_()
    wanted = F.cross_entropy(right, labels[::2], reduction="none")
    (exact,) = torch.autograd.grad(wanted.sum(), right)
    logits[1] = logits[3, 2] = value
    losses, found = softmax_loss(logits, labels, PADDING, None, wanted=True)
    assert losses[1::2].eq(0).all()
    assert found[1::2].eq(0).all()
    torch.testing.assert_close(losses[::2], wanted.detach())
    torch.testing.assert_close(found[::2], exact)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = inputs(1, 6, 4, 7)
    losses = chunk_linear_cross_entropy(hidden, weight.detach(), labels, PADDING, 4)
    losses.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)


def test_without_values_one_chunk_says_what_comes_out(monkeypatch):
    """So a long sequence is traced as soon as a short one."""
    projected = []
    monkeypatch.setattr(
        "chunk_linear_cross_entropy.softmax_loss", lambda *given: projected.append(given) or softmax_loss(*given)
    )
    hidden, weight, labels = (
        one.detach().to("meta").requires_grad_(grad) for one, grad in zip(inputs(2, 50, 4, 7), (True, True, False))
    )
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 8)
    assert (losses.shape, losses.dtype, losses.is_meta, losses.requires_grad) == ((2, 50), torch.float32, True, True)
    assert len(projected) == 1
    losses.sum().backward()
    assert (hidden.grad.shape, weight.grad.shape) == ((2, 50, 4), (7, 4))


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "chunk", "message"),
    [
        ((1, 6, 4), (7, 5), (1, 6), 4, "do not fit"),
        ((1, 6, 4), (7, 4), (1, 5), 4, "do not fit"),
        ((1, 6, 4), (7, 4), (1, 6), 0, "chunk_size is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden, weight, labels, chunk, message):
    with pytest.raises(ValueError, match=message):
        chunk_linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long), PADDING, chunk
        )


MEASURE = """
import resource, sys, torch
from chunk_linear_cross_entropy import chunk_linear_cross_entropy, in_chunks
tokens, words, chunk = map(int, sys.argv[1:])
torch.set_num_threads(1)
hidden = torch.randn(1, tokens, 64, requires_grad=True)
weight = torch.randn(words, 64, requires_grad=True)
labels = torch.randint(0, words, (1, tokens))
chunk_linear_cross_entropy(hidden[:, :8], weight, labels[:, :8], -100, 8).sum().backward()  # what libraries load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunk_linear_cross_entropy(hidden, weight, labels, -100, chunk).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_one_chunk_of_logits():
    """Measured as the growth of the process: all logits would take 2 GiB, a chunk takes 64 MiB."""
    tokens, words, chunk = 4096, 131072, 128
    command = [sys.executable, "-c", MEASURE, str(tokens), str(words), str(chunk)]
    root = Path(__file__).parents[1]
    grown = int(
        subprocess.run(command, capture_output=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": "."}).stdout
    )
    logits = chunk * words * 4
    gradients_kept = (tokens + 2 * words) * 64 * 4
    assert grown < gradients_kept + 3.5 * logits, f"{grown / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("dtype", "trained", "more"),
    [(torch.bfloat16, True, 2), (torch.bfloat16, False, 0), (torch.float32, True, 0)],
)
def test_the_planner_is_told_what_it_holds(dtype, trained, more):
    """A chunk of logits, and the sum in fp32 beyond the gradient that it becomes."""
    operator = find("chunk_linear_cross_entropy")
    metas = [
        TensorMeta((2, 50, 8), dtype, True),
        TensorMeta((30, 8), dtype, trained),
        TensorMeta((2, 50), torch.int64, False),
    ]
    given = (Ref("h"), Ref("w"), Ref("y"), PADDING)
    for args, named, tokens, at_once in (
        (given, {"chunk_size": 16}, 50, 16), ((*given, 16), {}, 50, 16), (given, {}, 50, 100), (given, {}, 600, 1024),
        (given, in_chunks.keywords, 3000, 2048),
    ):  # fmt: skip
        node = Node("loss", "chunk_linear_cross_entropy", args, named, ("l",))
        held = operator.workspace({"b": 2, "l": tokens, "d": 8, "n": 30}, node, metas)
        assert held == at_once * 30 * dtype.itemsize + 30 * 8 * more
