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

from chunk_linear_cross_entropy import chunk_linear_cross_entropy

PADDING = -100


def inputs(batch, length, width, words, dtype=torch.float64, padded=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, words, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < padded] = PADDING
    return hidden, weight, labels


def reference(hidden, weight, labels):
    logits = hidden.double() @ weight.double().t()
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING, reduction="none")
    return flat.view(labels.shape)


def gradients(losses, incoming, *inputs):
    return torch.autograd.grad(losses, inputs, incoming.to(losses.dtype))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 23), width=st.integers(1, 9), words=st.integers(2, 17),
    chunk=st.integers(1, 40), padded=st.sampled_from([0.0, 0.4, 1.0]), ones=st.booleans(),
)  # fmt: skip
def test_agrees_with_cross_entropy_in_fp64(batch, length, width, words, chunk, padded, ones):
    hidden, weight, labels = inputs(batch, length, width, words, padded=padded)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, PADDING, chunk)
    wanted = reference(hidden, weight, labels)
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


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = inputs(1, 6, 4, 7)
    losses = chunk_linear_cross_entropy(hidden, weight.detach(), labels, PADDING, 4)
    losses.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        chunk_linear_cross_entropy(hidden, weight, labels, PADDING, 4)


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
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
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
    """Measured as the growth of the process: all logits would take 8 GiB, a chunk takes 64 MiB."""
    tokens, words, chunk = 16384, 131072, 128
    command = [sys.executable, "-c", MEASURE, str(tokens), str(words), str(chunk)]
    root = Path(__file__).parents[1]
    grown = int(
        subprocess.run(command, capture_output=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": "."}).stdout
    )
    logits = chunk * words * 4
    gradients_kept = (tokens + 2 * words) * 64 * 4
    assert grown < gradients_kept + 3.5 * logits, f"{grown / 2**20:.0f} MiB"
