"""Operators that combine the elements along some dimensions: sums, means, softmax, norms, losses, scans."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.registry import (
    Annotate,
    arguments,
    backward_reads,
    family,
    save_inputs,
    save_nothing,
)
from nnscaler.operators.spelling import FUNCTION, WrittenCall


def dims_of(node: Node, rank: int) -> set[int]:
    """The dimensions that the argument `dim` names; all of them where it is not given."""
    given = arguments(node).get("dim")
    if given is None or given == [] or rank == 0:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}


def reduction(mark: str) -> Annotate:
    """A reduction over the dimensions that the argument `dim` names, or over all.

    mark  "+" where devices may each reduce a part and the result is a sum of these; else "^"
    """

    def annotate(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
        names = dim_names(inputs[0])
        reduced = dims_of(node, len(names))
        source = [name + mark if i in reduced else name for i, name in enumerate(names)]
        if len(outputs[0]) == len(names):
            target = ["1" if i in reduced else name for i, name in enumerate(names)]
        else:
            target = [name for i, name in enumerate(names) if i not in reduced]
        return write([source], [target] * len(outputs))

    return annotate


def histogram(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Counts of parts add up, if all count in the same ranges: equal bounds mean those of the elements."""
    given = arguments(node)
    mark = "^" if given["min"] == given["max"] else "+"
    return write([[name + mark for name in dim_names(inputs[0])]], [["bins^"]])


def along_dim(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """The same dimensions in and out. The one that `dim` names stays whole, and may have another size in each
    tensor."""
    names = dim_names(inputs[0])
    whole = dims_of(node, len(names))

    def tensor(own: str) -> list[str]:
        return [f"{own}_{i}^" if i in whole else name for i, name in enumerate(names)]

    return write([tensor(f"i{k}") for k in range(len(inputs))], [tensor(f"o{k}") for k in range(len(outputs))])


def normalization(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`layer_norm` and `rms_norm`: the last dimensions, which the weight has, stay whole."""
    names = dim_names(inputs[0])
    keep = len(names) - len(arguments(node)["normalized_shape"])
    whole = [f"{name}^" for name in names[keep:]]
    return write([[*names[:keep], *whole]] + [whole] * (len(inputs) - 1), [[*names[:keep], *whole]])


def group_norm(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = ["n", *(f"{name}^" for name in dim_names(inputs[0])[1:])]
    return write([names] + [names[1:2]] * (len(inputs) - 1), [names])


REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """`cross_entropy_loss(self [n, c, ...], target [n, ...])`; or the target has the shape of `self`, with
    probabilities."""
    mode = REDUCTIONS[arguments(node)["reduction"]]
    batch = ["n", *(f"d{i}" for i in range(2, len(inputs[0])))] if len(inputs[0]) > 1 else []
    if mode != "none":
        mark = "+" if mode == "sum" else "^"  # the mean counts labels that are not ignored: it is no sum of terms
        batch = [name + mark for name in batch]
    source = [*batch[:1], "c^", *batch[1:]]
    target = source if len(inputs[1]) == len(inputs[0]) else batch
    weight = [["c^"]] * (len(inputs) - 2)
    return write([source, target, *weight], [batch if mode == "none" else []])


def cross_entropy_text(call: WrittenCall) -> str:
    options = [f"ignore_index={call['ignore_index']}", f'reduction="{REDUCTIONS[call.value("reduction")]}"']
    options += [f"{name}={call[name]}" for name in ("weight", "label_smoothing") if name in call.unwritten]
    return f"F.cross_entropy({call['self']}, {call['target']}, {', '.join(options)})"


_self_and_result = backward_reads(self="self result")

family("sum.default sum.dim_IntList", reduction("+"), saves=save_nothing)
family("histc.default", histogram, saves=save_nothing)
family("mean.default mean.dim", reduction("^"), saves=save_nothing)
family("amax.default amin.default max.default min.default", reduction("^"), saves=_self_and_result)
family("argmax.default argmin.default any.default any.dim all.default all.dim", reduction("^"), saves=save_nothing)
family("prod.default prod.dim_int", reduction("^"), saves=_self_and_result)
family("max.dim min.dim", reduction("^"), saves=backward_reads(self="result1"))
family("var.correction var.dim var.default", reduction("^"), saves=backward_reads(self="self"))
family("std.correction std.dim std.default", reduction("^"), saves=_self_and_result)
family("logsumexp.default", reduction("^"), saves=_self_and_result)
family("norm.ScalarOpt_dim", reduction("^"), saves=_self_and_result)
family("linalg_vector_norm.default", reduction("^"), "torch.linalg.vector_norm(*)", saves=_self_and_result)
family("softmax.int log_softmax.int", along_dim, saves=backward_reads(self="result"))
family("_softmax.default _log_softmax.default", along_dim, FUNCTION, saves=backward_reads(self="result"))
family("cumprod.default", along_dim, saves=_self_and_result)
family("cumsum.default", along_dim, saves=save_nothing)
family("sort.default sort.stable topk.default", along_dim, saves=backward_reads(self="result1"))
family("argsort.default argsort.stable", along_dim, saves=save_nothing)
family("diff.default", along_dim, saves=save_nothing)
family("layer_norm.default", normalization, "F.layer_norm(*)", saves=save_inputs)
family("rms_norm.default", normalization, "F.rms_norm(*)", saves=save_inputs)
family("group_norm.default", group_norm, "F.group_norm(*)", saves=save_inputs)
family("cross_entropy_loss.default", cross_entropy, cross_entropy_text, saves=save_inputs)
