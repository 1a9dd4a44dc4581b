"""Attention on the CPU against a softmax written out in fp64, with every option, and lengths that are no default."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor

from nnscaler import UserError
from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.kernels import KERNELS, Asked, Documents, attend, random
from nnscaler.kernels import written_out as dropping
from nnscaler.kernels.attention import choice, libraries, probe, rows
from nnscaler.kernels.random import draws_of, numbers_of, place_of
from nnscaler.operators.attention import attention, dropped_weights
from nnscaler.runtime.attention import attention_along_l
from nnscaler.runtime.axis import Axis
from tests.kernels.attention import written_out

SIZES = [(4, 4, 7, 7), (4, 2, 7, 7), (4, 2, 5, 9)]  # heads, key-value heads, rows, keys


def inputs(heads: int, shared: int, rows: int, keys: int) -> list[Tensor]:
    """query, key, value, sinks and slopes"""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 6), (2, shared, keys, 6), (2, shared, keys, 5), (heads,), (heads,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


# What is asked of attention; `sinks` and `slopes` are tensors of their own, here whether they are there.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.05},
    {"scale": 2.0, "is_causal": False},
    {"window": (2, None)},
    {"window": (0, None), "scale": 0.3},
    {"window": (2, 1), "is_causal": False},
    {"window": (None, 2), "is_causal": False},
    {"window": (100, 100)},
    {"softcap": 0.7},
    {"sinks": True},
    {"sinks": True, "is_causal": False, "window": (1, 3)},
    {"slopes": True},
    {"slopes": True, "is_causal": False, "softcap": 1.5},
    {"documents": True},
    {"documents": True, "is_causal": False},
    {"documents": True, "is_causal": False, "window": (2, 1)},
    {"documents": True, "window": (1, None), "softcap": 2.0, "sinks": True, "slopes": True, "scale": 0.4},
    {"dropout": 0.3},
    {"dropout": 0.5, "is_causal": False, "window": (2, 1), "documents": True, "sinks": True, "slopes": True},
    {"dropout": 0.4, "window": (2, None), "softcap": 0.7},
]


def options_of(asked: dict[str, Any], tensors: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """(tensors with a gradient, the arguments that are none) of a call for one of OPTIONS."""
    query, key, value, sinks, slopes = tensors
    given = dict(asked)
    used = [query, key, value]
    for name, tensor in (("sinks", sinks), ("slopes", slopes)):
        if given.pop(name, False):
            used.append(tensor)
    if given.pop("documents", False):
        given["documents"] = torch.tensor([[0, 0, 0, 1, 1, 5, 5, 5, 2], [3, 1, 1, 1, 1, 1, 1, 0, 0]])[:, : key.shape[2]]
    if "dropout" in given:
        batches, heads, *_ = numbers_of((*query.shape[:3], key.shape[2]))
        given |= {"draws": draws_of(1, 2, 3), "place": place_of("attention", 0), "batches": batches, "heads": heads}
    return used, given


def call(function: Callable[..., Tensor], asked: dict[str, Any], **given: Any) -> Callable[..., Tensor]:
    """A function of the tensors with a gradient alone."""
    names = [name for name in ("sinks", "slopes") if asked.get(name)]
    return lambda q, k, v, *others: function(q, k, v, **dict(zip(names, others)), **given)


@pytest.mark.parametrize("scores", [rows._SCORES, 50], ids=["at once", "in chunks"])
@pytest.mark.parametrize("asked", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_option_counts(sizes, asked, scores, monkeypatch):
    monkeypatch.setattr(rows, "_SCORES", scores)
    tensors, given = options_of(asked, inputs(*sizes))
    right = call(written_out, asked, **given)(*tensors)
    assert_same(call(attention, asked, **given), right, tensors)


@pytest.mark.parametrize("asked", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_along_the_sequence_every_option_counts(sizes, asked):
    """What each device computes of its rows; here one has all of them."""
    tensors, given = options_of(asked, inputs(*sizes))
    along = functools.partial(attention_along_l, Axis(1, 0, None))
    assert_same(call(along, asked, **given), call(written_out, asked, **given)(*tensors), tensors)


def test_along_the_sequence_the_kernel_that_is_asked_for_computes():
    query, key, value, sinks, _ = inputs(4, 2, 7, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    for others in ({}, {"documents": documents}):
        with pytest.raises(UserError, match=r"'cudnn' has no .*sinks"):
            attention_along_l(Axis(1, 0, None), query, key, value, sinks, kernel="cudnn", **others)


def test_along_the_sequence_no_call_keeps_the_weight_itself():
    """Backward would gather it again for each call, of which devices have different numbers."""
    query, key, value, sinks, _ = inputs(4, 2, 7, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().data_ptr()), lambda x: x):
        attention_along_l(Axis(1, 0, None), query, key, value, sinks)
    assert kept
    assert sinks.untyped_storage().data_ptr() not in kept


def assert_same(function: Callable[..., Tensor], wanted: Tensor, tensors: list[Tensor]) -> None:
    """Values and gradients of `function(*tensors)` are those of `wanted`."""
    found = function(*tensors)
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
    for mine, right in zip(*(torch.autograd.grad(x, tensors, gradient) for x in (found, wanted))):
        torch.testing.assert_close(mine, right)


def test_some_rows_of_a_longer_sequence():
    query, key, value, _, slopes = inputs(4, 2, 3, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 5, 5, 5, 2], [3, 1, 1, 1, 1, 1, 1, 0, 0]])
    for first, left, right in [(4, None, 0), (4, 2, 0), (3, 2, 2), (5, None, None), (0, 1, 1)]:
        asked = Asked(0.3, first, left, right, None, None, slopes, Documents(documents))
        longer = torch.cat([torch.zeros(2, 4, first, 6, dtype=query.dtype), query], 2)
        end = first + 3
        longer = torch.cat([longer, torch.zeros(2, 4, 9 - end, 6, dtype=query.dtype)], 2)
        options = {"scale": 0.3, "is_causal": right == 0, "window": (left, right), "documents": documents}
        wanted = written_out(longer, key, value, slopes=slopes, **options)
        torch.testing.assert_close(attend(query, key, value, asked, "auto"), wanted[:, first:end])


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, learnable_sink: Tensor | None = None,
) -> Any:  # fmt: skip
    """As flash-attn's libraries have it: [b, l, h, d]; some give the scores' logarithms beside the result."""
    window = tuple(None if side == -1 else side for side in window_size)
    return written_out(
        *(x.transpose(1, 2) for x in (q, k, v)), learnable_sink, alibi_slopes, scale=softmax_scale, is_causal=causal,
        window=window, softcap=softcap or None,
    ), None  # fmt: skip


def flash_attention_of_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    **options: Any,
) -> Any:  # fmt: skip
    """Of sequences [l, h, d] that lie one after the other, with where they begin."""
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:]))
    assert max(b - a for a, b, _, _ in ends) <= max_seqlen_q
    assert max(d - c for _, _, c, d in ends) <= max_seqlen_k
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    parts = [flash_attention(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0][0] for a, b, c, d in ends if b > a]
    return torch.cat(parts)


@pytest.fixture
def libraries_are_there(monkeypatch):
    """Those that are not here are stood in for by what they are documented to do."""
    functions = {"flash_attn_func": flash_attention, "flash_attn_varlen_func": flash_attention_of_documents}
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(libraries, "sdpa_kernel", lambda backends: nullcontext())
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def through(kernel: str, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | None:
    """What a kernel makes of `attention`'s arguments; None where it does not say that it does that."""
    left, right = given.get("window", (None, None))
    right = 0 if given.get("is_causal", True) else right
    asked = Asked(given.get("scale", 6**-0.5), k.shape[2] - q.shape[2], left, right, given.get("softcap"))
    asked = replace(asked, sinks=given.get("sinks"), slopes=given.get("slopes"))
    asked = replace(asked, documents=Documents.of(given.get("documents")))
    which = [given.get(name) for name in ("draws", "place", "batches", "heads")]
    asked = replace(asked, dropped=dropped_weights(given.get("dropout", 0.0), q, k, *which))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v, asked = choice._in_reach(q.shape[1], k, v, asked)
    able = asked.options(q.shape[1], k.shape[1]) <= KERNELS[kernel].can
    return KERNELS[kernel].load()(q, k, v, asked) if able else None


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_does_what_it_says(kernel, libraries_are_there):
    has_backward = kernel != "flex_attention"  # on a CPU
    done = 0
    for sizes in SIZES:
        for options in OPTIONS:
            tensors = [x.detach().float().requires_grad_(has_backward) for x in inputs(*sizes)]
            tensors, given = options_of(options, tensors)
            function = call(functools.partial(through, kernel), options, **given)
            with torch.no_grad():
                if function(*tensors) is None:
                    continue
            wanted = call(written_out, options, **given)(*tensors)
            if has_backward:
                assert_same(function, wanted, tensors)
            else:
                torch.testing.assert_close(function(*tensors), wanted)
            done += 1
    assert done >= 3 * (4 if kernel in ("cudnn", "sdpa") else 12)


def test_a_kernel_is_not_asked_for_what_it_does_not_do():
    query, key, value, sinks, _ = inputs(4, 2, 7, 7)
    with pytest.raises(UserError, match=r"'cudnn' has no sinks and windows, .*one of auto, flash_attention_4"):
        attention(query, key, value, sinks, window=(2, None), kernel="cudnn")
    attention(query, key, value, window=(6, None), kernel="sdpa")  # which hides nothing
    attention(query, key, value, is_causal=False, window=(None, 6), kernel="sdpa")
    with pytest.raises(UserError, match="'sdpa' has no windows"):
        attention(query, key, value, is_causal=False, window=(None, 5), kernel="sdpa")


def test_documents_whose_keys_go_on_behind_the_rows_are_an_option_of_their_own():
    """Rows 2 to 4 of 9 keys; of 5; and where later keys are hidden anyway."""
    documents, later = Documents(torch.zeros(1, 9)), "documents with later keys"
    assert later in Asked(1.0, 2, documents=documents).options(3, 9)
    assert later not in Asked(1.0, 2, documents=documents).options(3, 5)
    assert later not in Asked(1.0, 2, right=0, documents=documents).options(3, 9)
    assert later not in Asked(1.0, 2).options(3, 9)


def test_kernels_are_tried_with_what_the_call_is():
    """Type, sizes and heads; documents are three; a window of more than a quarter of the tokens is cut to that."""
    query, key, value, *_ = (x.transpose(1, 2).bfloat16() for x in inputs(4, 2, 6, 6)[:3])
    asked = Asked(0.4, 0, 5, 0, 0.7, torch.zeros(4), torch.ones(4), Documents(torch.zeros(2, 6)))
    kind = probe.kind_of(query, key, value, asked)
    assert [tuple(x.shape) for x in kind.tensors()] == [(1, 6, 4, 6), (1, 6, 2, 6), (1, 6, 2, 5), (1, 6, 4, 5)]
    assert {x.dtype for x in kind.tensors()} == {torch.bfloat16}
    tried = kind.asked()
    assert (tried.first, tried.left, tried.right, tried.softcap) == (0, 5, 0, 0.7)
    assert tried.documents.numbers.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert (len(tried.sinks), tried.sinks.dtype, len(tried.slopes)) == (4, torch.bfloat16, 4)
    assert tried.sinks.requires_grad
    timed = kind.timed()
    assert (timed.heads, timed.shared, timed.length) == (32, 16, 6)
    plain = probe.kind_of(query, key, value, Asked(0.4)).asked()
    assert (plain.sinks, plain.slopes, plain.documents) == (None, None, None)
    assert [probe._within(side, 40) for side in (None, 0, 9, 10, 11)] == [None, 0, 9, 10, 10]
    assert probe.kind_of(query, key.expand(2, 6, 2, 6).repeat(1, 2000, 1, 1), value, asked).length == 8192


def test_a_kernel_may_be_as_wrong_as_twice_plain_attention(monkeypatch):
    """Of a call without options: torch's own knows none. It is compared on 1024 tokens, and timed on all."""
    query, key, value, *_ = (x.transpose(1, 2) for x in inputs(4, 2, 6, 6)[:3])
    asked = Asked(0.4, 0, 5000, 7, 0.7, torch.zeros(4), torch.ones(4), Documents(torch.zeros(2, 6)))
    kind = replace(probe.kind_of(query, key, value, asked), length=8192)
    compared, timed = [], []

    def error(run: Any, kind: probe.Kind) -> float:
        compared.append(kind)
        return run if isinstance(run, float) else 0.05

    monkeypatch.setattr(probe, "_error", error)
    monkeypatch.setattr(probe, "_time", lambda run, kind: timed.append(kind) or run)
    assert probe.fastest(kind, {"worse": lambda: 0.1015, "better": lambda: 0.1005}) == "better"
    short = replace(kind, length=1024, left=256)
    plain = replace(short, left=None, right=0, softcap=None, sinks=False, slopes=False, documents=False)
    assert compared == [plain, short, short]
    assert timed == [kind.timed()]


@pytest.mark.parametrize(("scores", "steps"), [(200, [3, 3, 1]), (55, [1] * 7), (2**22, [7])])
def test_so_many_scores_are_in_memory_at_once(scores, steps, monkeypatch):
    """Two sequences of four heads have 56 in a row of seven keys."""
    monkeypatch.setattr(rows, "_SCORES", scores)
    query, key, value = (x.transpose(1, 2) for x in inputs(4, 2, 7, 7)[:3])
    found = [part.stop - part.start for part, _ in rows._Call(query, key, value, Asked(0.4)).chunks()]
    assert found == steps


def test_a_call_is_timed_with_documents_of_their_usual_length():
    node = Node("", "attention", tuple(map(Ref, "qkv")), {"documents": Ref("d"), "document_length": 2}, ())
    metas = [TensorMeta((2, 1, 5, 4), torch.float32)] * 3 + [TensorMeta((2, 5), torch.int64)]
    (place, values), *others = attention.operator.examples(node, metas).items()
    assert (place, values.tolist(), others) == (3, [[0, 0, 1, 1, 2]] * 2, [])
    node.kwargs["document_length"] = None
    assert attention.operator.examples(node, metas) == {}


def test_uncompiled_attention_drops_anew_in_each_call():
    query, key, value, *_ = inputs(4, 2, 7, 7)
    first, second = (attention(query, key, value, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match=r"drops its weights with probability 1\.5; it must be from 0 to 1"):
        attention(query, key, value, dropout=1.5)


def test_a_kernel_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="attention kernel 'flash_attention_3' is not installed"):
        choice._load("flash_attention_3")


def test_the_fastest_of_those_that_are_right(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tensors = [x.transpose(1, 2).float() for x in inputs(4, 2, 64, 64)[:3]]
    asked = Asked(0.4, 0, 5, 0, 0.7, torch.zeros(4), None, Documents(torch.zeros(2, 64)))
    kind = probe.kind_of(*tensors, asked)

    def without_cap(*call: Any) -> Tensor:
        return rows.attend_by_rows(*call[:3], replace(call[3], softcap=None))

    def slow(*call: Any) -> Tensor:
        return rows.attend_by_rows(*call) + 0 * sum(rows.attend_by_rows(*call) for _ in range(5))

    kernels = {"wrong": without_cap, "slow": slow, "right": rows.attend_by_rows}
    assert probe.fastest(kind, {name: lambda run=run: run for name, run in kernels.items()}) == "right"
    assert "kernel wrong is wrong by" in caplog.text
    assert probe.fastest(kind, {"wrong": lambda: without_cap}) is None

    def failing(error: type[Exception]) -> Callable[[], Any]:
        def run(*call: Any) -> Tensor:
            raise error

        return lambda: run

    def missing() -> Any:
        raise ImportError

    broken = [failing(error) for error in (RuntimeError, AssertionError, TypeError, AttributeError)]
    kernels = {str(number): load for number, load in enumerate([*broken, missing])}
    assert probe.fastest(kind, kernels) is None
    assert probe.fastest(kind, kernels | {"right": lambda: rows.attend_by_rows}) == "right"


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize(
    ("mask", "is_causal", "scale"),
    [(None, False, None), (None, True, 0.3), ("hides", False, 2.0), ("adds", False, None)],
)
def test_torchs_attention_written_out_is_torchs(shared, mask, is_causal, scale, monkeypatch):
    """Five rows of seven keys, whose causal mask ends with the fifth. What may be dropped is weights."""
    query, key, value, *_ = inputs(4, shared, 5, 7)
    masks = {"hides": torch.arange(35).view(5, 7) % 3 > 0, "adds": torch.randn(5, 7, dtype=query.dtype)}
    given = (query, key, value, masks.get(mask))
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": shared < 4}
    wanted = torch.nn.functional.scaled_dot_product_attention(*given, **options)
    torch.testing.assert_close(dropping.written_out(*given, is_causal, scale, shared < 4, lambda x: 2 * x), 2 * wanted)
    one = (x[0] for x in given[:3])
    found = dropping.written_out(*one, given[3], is_causal, scale, shared < 4, lambda x: x)
    torch.testing.assert_close(found, wanted[0])
    dropped = []
    monkeypatch.setattr(random, "drop", lambda weights, p, by_feature: dropped.append((p, by_feature)) or weights)
    found = dropping._traced(*given, 0.3, is_causal, scale, shared < 4)
    torch.testing.assert_close(found, wanted)
    assert dropped == [(0.3, False)]
