"""Attention as one operator, with all options that models use. It is split over key-value heads, or along the
sequence."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from nnscaler.annotation import Shape
from nnscaler.errors import UserError
from nnscaler.graph import Node, TensorMeta
from nnscaler.kernels import Asked, Documents, Dropped, attend
from nnscaler.kernels.random import numbers_of
from nnscaler.operators.annotating import write
from nnscaler.operators.register import register_op
from nnscaler.operators.registry import Counters, Flops, arguments, family, save_both

Window = tuple[int | None, int | None]
ALL: Window = (None, None)


def attention_flops(sizes: dict[str, int], node: Node) -> float:
    """Two products of every query row with every key that it sees. The last query row has the place of the last key.

    The lengths of documents are known only at run time; `document_length` stands for them.
    """
    given = arguments(node)
    rows, keys, limits = sizes["l"], sizes["s"], reach(given["is_causal"], given.get("window", ALL))
    document = _document(sizes, node)
    seen = pairs(rows, keys, *limits) / rows if document == keys else pairs(document, document, *limits) / document
    return unmasked_flops(sizes, node) * seen / document


def unmasked_flops(sizes: dict[str, int], node: Node) -> float:
    """Two products of every query row with every key, or every one of its document."""
    width = sizes["d"] + sizes["e"]
    return 2.0 * sizes["b"] * sizes["k"] * sizes["g"] * sizes["l"] * _document(sizes, node) * width


def _document(sizes: dict[str, int], node: Node) -> int:
    """Tokens of a document, on average."""
    return min(sizes["s"], arguments(node).get("document_length") or sizes["s"])


def pairs(rows: int, keys: int, left: int | None, right: int | None) -> int:
    """How many pairs of row and key there are, for the last rows of a sequence of `keys` tokens.

    left, right  how many keys before and after its place a row sees; None: all
    """
    before = 0 if left is None else _triangle(keys - 1 - left) - _triangle(keys - 1 - rows - left)
    after = 0 if right is None else _triangle(rows - 1 - right)
    return rows * keys - before - after


def _triangle(side: int) -> int:
    """1 + 2 + ... + side"""
    return max(0, side) * (max(0, side) + 1) // 2


def reach(is_causal: bool, window: Window) -> Window:
    """(how many keys before its place a row sees, how many after it); None: all."""
    return window[0], 0 if is_causal else window[1]


def attention_backward(node: Node, inputs: Sequence[TensorMeta]) -> float:
    """Of forward's two products one is over queries' and one over values' sizes. Backward, which computes the scores
    again, has three and two."""
    size, value_size = inputs[0].shape[-1], inputs[2].shape[-1]
    return (3 * size + 2 * value_size) / (size + value_size)


def attention_keeps(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    """The sum of each row's exponentials, for each head, in fp32."""
    return 4.0 * sizes["b"] * sizes["k"] * sizes["g"] * sizes["l"]


def attention_workspace(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    """Backward sums gradients of queries in fp32; and those of keys and values, where several heads share them."""
    query, key, value = (meta.numel for meta in inputs[:3])
    return 4.0 * (query + (key + value if sizes["g"] > 1 else 0))


def document_examples(node: Node, inputs: Sequence[TensorMeta]) -> dict[int, Tensor]:
    """Documents of `document_length` tokens each."""
    given = arguments(node)
    documents, length = given["documents"], given["document_length"]
    if documents is None or length is None:
        return {}
    place = node.inputs.index(documents.name)
    shape = inputs[place].shape
    return {place: (torch.arange(shape[1]) // length).expand(shape)}


def drops(node: Node) -> bool:
    given = arguments(node)
    return bool(given["dropout"]) and given["draws"] is None


def count_weights(node: Node, inputs: Sequence[Shape], counters: Counters) -> None:
    weights = (*inputs[0][:3], inputs[1][2])
    node.kwargs |= {
        "draws": counters.draws,
        "place": counters.place(),
        "batches": counters.numbers(weights, 0),
        "heads": counters.numbers(weights, 1),
    }


@register_op(
    "b (k g^) l d^, b k s^ d^, b k s^ e^, (k g^), (k g^), b s^, 1 5, (), b, (k g^) -> b l (k g^) e^",
    flops=attention_flops,
    unmasked=unmasked_flops,
    backward=attention_backward,
    saves=save_both,
    keeps=attention_keeps,
    workspace=attention_workspace,
    along={"l": "nnscaler.runtime.attention.attention_along_l"},
    examples=document_examples,
    draws=drops,
    counted=count_weights,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
    draws: Tensor | None = None,
    place: Tensor | None = None,
    batches: Tensor | None = None,
    heads: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: Window = ALL,
    softcap: float | None = None,
    kernel: str = "auto",
    document_length: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention with grouped key-value heads, and all that models ask of it.

    query [b, h, l, d], key [b, k, s, d], value [b, k, s, e], with h a multiple of k: query head i attends to key-value
    head i // (h / k). Returns [b, l, h, e] in the dtype of `query`. The last query row has the place of the last key.

    sinks      [h]: for each head, a score that takes part in the softmax but has no value
    slopes     [h]: for each head, by how much a score falls with each place between a row and the key (ALiBi)
    documents  [b, s] integers: a row sees only keys of its own document; equal numbers are neighbours
    scale      multiplies the products of query and key, the scores; None is 1 / sqrt(d)
    is_causal  whether a row sees no key after its place
    window     (how many keys before its place a row sees, how many after it); None: all
    softcap    scores s become softcap * tanh(s / softcap), before slopes are taken into account
    kernel     a name of `nnscaler.kernels.KERNELS`, or auto
    document_length  for predictions alone: tokens of the document in which a token stands, on average; None: as many as
               there are keys
    dropout    with which probability a weight is dropped after the softmax; the others are divided by 1 - dropout
    draws, place, batches, heads  tell which (see `nnscaler.kernels.Dropped`). A compiled model passes them; without
               them, each call draws anew
    """
    first = key.shape[2] - query.shape[2]
    dropped = dropped_weights(dropout, query, key, draws, place, batches, heads)
    return attention_of_rows(
        query, key, value, first, sinks, slopes, Documents.of(documents), dropped, scale, is_causal, window, softcap,
        kernel,
    )  # fmt: skip


def dropped_weights(
    p: float,
    query: Tensor,
    key: Tensor,
    draws: Tensor | None,
    place: Tensor | None,
    batches: Tensor | None,
    heads: Tensor | None,
) -> Dropped | None:
    """Which weights a call of `attention` drops. Raises UserError for a probability that is none."""
    if not 0 <= p <= 1:
        raise UserError(f"attention drops its weights with probability {p}; it must be from 0 to 1")
    if not p:
        return None
    if draws is None or place is None or batches is None or heads is None:
        shape = (*query.shape[:3], key.shape[2])
        batches, heads = (numbers_of(shape, query.device)[dim] for dim in (0, 1))
        draws = torch.randint(2**32, (1, 5), device=query.device)
        draws[0, 4] = 1
        place = draws[0, 0]
    return Dropped(p, draws, place, batches, heads, key.shape[2])


def attention_of_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    sinks: Tensor | None,
    slopes: Tensor | None,
    documents: Documents | None,
    dropped: Dropped | None,
    scale: float | None,
    is_causal: bool,
    window: Window,
    softcap: float | None,
    kernel: str,
) -> Tensor:
    """`attention` of some rows of the query. The first of them has place `first` among the keys."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    asked = Asked(scale, first, *reach(is_causal, window), softcap, sinks, slopes, documents, dropped)
    return attend(query, key, value, asked, kernel)


def scaled_dot_product_attention(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """ATen's own attention: query [..., h, l, d], key and value [..., k, s, d]; a mask, if any, broadcasts to the
    scores."""
    query, key = inputs[0], inputs[1]
    lead = [f"b{i}" for i in range(len(query) - 3)]
    heads, shared = (["(k g^)"], ["k"]) if len(query) > 2 and query[-3] != key[-3] else (["k"], ["k"])
    if len(query) == 2:
        heads, shared = [], []
    rows = "l^" if arguments(node)["is_causal"] else "l"
    tensors = [[*lead, *heads, rows, "d^"], [*lead, *shared, "s^", "d^"], [*lead, *shared, "s^", "e^"]]
    for mask in inputs[3:]:
        scores = list(zip([*lead, *heads, rows, "s^"], [*query[:-1], key[-2]]))[len(query) - len(mask) :]
        tensors.append([name if size == full else "1" for size, (name, full) in zip(mask, scores)])
    return write(tensors, [[*lead, *heads, rows, "e^"]])


def of_one_batch(flops: Flops) -> Flops:
    """What the annotation of ATen's attention calls b0, b1 and so on is one batch b."""

    def count(sizes: dict[str, int], node: Node) -> float:
        batch = prod(size for name, size in sizes.items() if name.startswith("b"))
        return flops({"k": 1, "g": 1, **sizes, "b": batch}, node)

    return count


family(
    "scaled_dot_product_attention.default",
    scaled_dot_product_attention,
    "F.scaled_dot_product_attention(*)",
    flops=of_one_batch(attention_flops),
    unmasked=of_one_batch(unmasked_flops),
    backward=attention_backward,
    saves=save_both,
    draws=lambda node: arguments(node)["dropout_p"] > 0,
)
