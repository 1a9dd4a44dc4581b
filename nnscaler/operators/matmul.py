"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.errors import UserError
from nnscaler.graph import Node, Ref
from nnscaler.operators.annotating import write
from nnscaler.operators.registry import Annotate, arguments, backward_reads, contraction_flops, family, save_cofactors
from nnscaler.operators.spelling import FUNCTION, WrittenCall


def linear(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    return f"* k+, n k+{', n' * (len(inputs) == 3)} -> * n"


def linear_text(call: WrittenCall) -> str:
    _divide_bias(call)
    return call.fill("F.linear(*)")


def linear_in_fp8(call: WrittenCall) -> str:
    _divide_bias(call)
    bias = " + {bias}" if "bias" in call.unwritten else ""
    return call.fill("fp8.linear({input}, {weight})" + bias)


def linear_later(call: WrittenCall) -> str:
    _divide_bias(call)
    return call.fill("later.linear(*)")


def _divide_bias(call: WrittenCall) -> None:
    """Where `k` is split, each device computes a term of a sum, and adds as large a part of the bias."""
    terms = call.parts.get("k", 1)
    if terms > 1 and isinstance(call.arguments["bias"], Ref):
        call.arguments["bias"] = Ref(f"{call.arguments['bias']} / {terms}")


def added_text(call: WrittenCall) -> str:
    """As `_divide_bias`, of a tensor that is multiplied with `beta`."""
    terms = call.parts.get("k", 1)
    if terms > 1:
        call.arguments["beta"] /= terms
        call.unwritten.add("beta")
    return call.fill(FUNCTION)


def mm(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    return "m k+, k+ n -> m n"


def bmm(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    return "b m k+, b k+ n -> b m n"


def added(product: str, result: str) -> Annotate:
    """A product to which a tensor is added, such as a bias, after it is broadcast."""

    def annotate(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
        names = result.split()
        aligned = list(zip(names, outputs[0]))[len(names) - len(inputs[0]) :]
        bias = [name if size == full else "1" for size, (name, full) in zip(inputs[0], aligned)]
        return f"{' '.join(bias) or '()'}, {product} -> {result}"

    return annotate


def matmul(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    left, right = inputs
    batch = outputs[0][: len(outputs[0]) - (len(left) > 1) - (len(right) > 1)]
    m, n = ["m"] * (len(left) > 1), ["n"] * (len(right) > 1)
    sources = [
        [*_batch(left, batch), *m, "k+"],
        [*_batch(right, batch), "k+", *n],
    ]
    return write(sources, [[*_batch((*batch, 1, 1), batch), *m, *n]])


def _batch(shape: Shape, batch: Shape) -> list[str]:
    """Names for all but the last two dimensions of `shape`, aligned from the right with `batch`, those of the
    result."""
    own = shape[:-2]
    aligned = list(enumerate(batch))[len(batch) - len(own) :]
    return [f"b{i}" if size == whole else "1" for size, (i, whole) in zip(own, aligned)]


def einsum(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """An einsum. Its equation is nearly an annotation.

    `...` is written out; and where the result is left out, it has the letters that occur once.
    """
    source, arrow, target = arguments(node)["equation"].replace(" ", "").partition("->")
    terms = source.split(",")
    if not arrow:
        once = (letter for letter in sorted(set(source) - set(".,")) if source.count(letter) == 1)
        target = "..." * ("..." in source) + "".join(once)
    dots = max(len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, inputs))

    def names(term: str, rank: int) -> list[str]:
        before, ellipsis, after = term.partition("...")
        count = rank - len(before) - len(after) if ellipsis else 0
        return [*before, *(f"e{i}" for i in range(dots - count, dots)), *after]

    sources = [names(term, len(shape)) for term, shape in zip(terms, inputs)]
    result = names(target, len(outputs[0]))
    if any(len(set(term)) < len(term) for term in sources):
        raise UserError("a letter that occurs twice in one term is not supported")
    sizes: dict[str, int] = {}
    for term, shape in zip(sources, inputs):
        for name, size in zip(term, shape):
            sizes[name] = max(size, sizes.get(name, 1))
    tensors = [
        ["1" if size < sizes[name] else name if name in result else f"{name}+" for name, size in zip(term, shape)]
        for term, shape in zip(sources, inputs)
    ]
    return write(tensors, [result])


family(
    "linear.default", linear, linear_text, fp8_text=linear_in_fp8, later_text=linear_later,
    flops=contraction_flops, factors=("input", "weight"), saves=backward_reads(input="weight", weight="input"),
)  # fmt: skip
family("mm.default", mm, flops=contraction_flops, saves=backward_reads(self="mat2", mat2="self"))
family("bmm.default", bmm, flops=contraction_flops, saves=backward_reads(self="mat2", mat2="self"))
family("matmul.default", matmul, flops=contraction_flops, saves=backward_reads(self="other", other="self"))
family(
    "addmm.default", added("m k+, k+ n", "m n"), added_text, flops=contraction_flops,
    factors=("mat1", "mat2"), saves=backward_reads(mat1="mat2", mat2="mat1"),
)  # fmt: skip
family(
    "baddbmm.default", added("b m k+, b k+ n", "b m n"), added_text, flops=contraction_flops,
    factors=("batch1", "batch2"), saves=backward_reads(batch1="batch2", batch2="batch1"),
)  # fmt: skip
family("einsum.default", einsum, FUNCTION, flops=contraction_flops, saves=save_cofactors)
