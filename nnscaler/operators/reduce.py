"""Operators that combine the elements of some dimensions: sums, means, softmax, norms, losses, scans."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.registry import Annotate, family, save_both, save_inputs, save_nothing, save_outputs
from nnscaler.operators.text import dim_names, write


def _reduced(node: Node, rank: int, index: int = 1) -> set[int]:
    given = node.args[index] if len(node.args) > index else node.kwargs.get("dim")
    if given is None or given == []:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])} if rank else set()


def reduction(mark: str, index: int = 1) -> Annotate:
    """Reduces the dimensions of argument `index` (all without it); `mark` is + where devices may reduce their parts."""

    def annotate(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
        names = dim_names(inputs[0])
        reduced = _reduced(node, len(names), index)
        source = [name + mark if i in reduced else name for i, name in enumerate(names)]
        if len(outputs[0]) == len(names):
            target = ["1" if i in reduced else name for i, name in enumerate(names)]
        else:
            target = [name for i, name in enumerate(names) if i not in reduced]
        return write([source], [target] * len(outputs))

    return annotate


def along(index: int) -> Annotate:
    """Same shape in and out; the dimension of argument `index` stays whole."""

    def annotate(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
        names = dim_names(inputs[0])
        whole = _reduced(node, len(names), index)
        dims = [f"{name}^" if i in whole else name for i, name in enumerate(names)]
        return write([dims], [dims] * len(outputs))

    return annotate


def normalization(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`layer_norm` and `rms_norm`: the last dimensions, those of the weight, stay whole."""
    names = dim_names(inputs[0])
    keep = len(names) - len(node.args[1])
    whole = [f"{name}^" for name in names[keep:]]
    return write([[*names[:keep], *whole]] + [whole] * (len(inputs) - 1), [[*names[:keep], *whole]])


def cross_entropy(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`cross_entropy_loss(input [n, c], target [n], weight, reduction)`; 0 is none, 1 mean, 2 sum."""
    mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("reduction", 1)
    batch = ["n", *(f"d{i}" for i in range(2, len(inputs[0])))] if len(inputs[0]) > 1 else []
    if mode:
        mark = "+" if mode == 2 else "^"  # the mean counts labels that are not ignored: it cannot be taken in terms
        batch = [name + mark for name in batch]
    source = [*batch[:1], "c^", *batch[1:]]
    weight = [["c^"]] * (len(inputs) - 2)
    return write([source, batch, *weight], [[] if mode else batch])


family("sum.default sum.dim_IntList", reduction("+"), saves=save_nothing)
family("mean.default mean.dim", reduction("^"), saves=save_nothing)
family(
    "amax.default amin.default max.default min.default argmax.default argmin.default any.default any.dim all.default "
    "all.dim prod.default",
    reduction("^"),
    saves=save_both,
)
family("max.dim min.dim", reduction("^"), saves=save_outputs)
family(
    "var.correction std.correction var.dim std.dim logsumexp.default",
    reduction("^"),
    saves=save_both,
)
family("softmax.int log_softmax.int _softmax.default _log_softmax.default", along(1), saves=save_outputs)
family("cumsum.default sort.default", along(1), saves=save_outputs)
family("layer_norm.default rms_norm.default", normalization, saves=save_inputs)
family("cross_entropy_loss.default", cross_entropy, saves=save_inputs)
family("norm.ScalarOpt_dim", reduction("^", 2), saves=save_both)
