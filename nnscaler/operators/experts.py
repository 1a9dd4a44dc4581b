"""The experts of a mixture as one operator. It is split over tokens, inside each expert, or over experts and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nnscaler.graph import Node, TensorMeta
from nnscaler.kernels import gate_named, kept_bytes, mix, note_choice
from nnscaler.operators.register import register_op
from nnscaler.operators.registry import arguments


def annotation(
    hidden: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None,
    *, transposed: bool = False, **_: Any,
) -> str:  # fmt: skip
    """The annotation: t tokens, k choices, n experts of inner size f, and c for the two halves of the first product.

    Where experts are split inside, each device gives a term of the sum. Tokens and experts may be split at the same
    time.
    """
    inner = "c^ f+" if up.dim() == 4 else "(f+ c^)"
    first, second = (f"n^ d^ {inner}", "n^ f+ d^") if transposed else (f"n^ {inner} d^", "n^ d^ f+")
    bias = "" if up_bias is None else f", n^ {inner}"
    return f"t d^, t k^, t k^, {first}, {second}{bias} -> t d^ | t n"


def experts_flops(sizes: dict[str, int], node: Node) -> float:
    """For each choice of each token: the first product, and the second, which gives a row again."""
    return 2.0 * sizes["t"] * sizes["k"] * sizes["d"] * sizes["f"] * (sizes["c"] + 1)


def experts_backward(node: Node, inputs: Sequence[TensorMeta]) -> float:
    """The operations of backward, as a multiple of forward's: each product once for each of its two factors."""
    needed = dict(zip(node.inputs, (meta.requires_grad for meta in inputs)))
    given = arguments(node)

    def any_of(*names: str) -> bool:
        return any(needed.get(getattr(given[name], "name", ""), False) for name in names)

    down = 1 / (1 + inputs[3].numel / inputs[4].numel)  # the second product's part of forward
    return (
        down * (any_of("down") + any_of("hidden", "scores", "up", "up_bias"))
        + (1 - down) * (any_of("up") + any_of("hidden"))
    )  # fmt: skip


def experts_saves(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """All but the numbers of the experts, of which the order of the rows is kept."""
    return [name for index, name in enumerate(node.inputs) if index != 1]


def experts_keeps(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    return kept_bytes(sizes["t"], sizes["k"], sizes["f"] * sizes["c"], inputs[0].dtype.itemsize)


def experts_workspace(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    """In backward: of each choice, the token's row, its gradient, and that of the gate's two sides, twice."""
    width = 2 * sizes["d"] + 2 * sizes["f"] * (sizes["c"] + 1)
    return float(sizes["t"] * sizes["k"] * width * inputs[0].dtype.itemsize)


def experts_exchange(sizes: dict[str, int], devices: int, inputs: Sequence[TensorMeta]) -> float:
    """Bytes of a token's row for each device that has an expert of its choice, if all are as likely."""
    reached = devices * (1 - (1 - 1 / devices) ** sizes["k"])
    return sizes["t"] * reached * sizes["d"] * inputs[0].dtype.itemsize


@register_op(
    annotation,
    flops=experts_flops,
    backward=experts_backward,
    saves=experts_saves,
    keeps=experts_keeps,
    workspace=experts_workspace,
    along={"t n": "nnscaler.runtime.experts.experts_along_t_n"},
    exchanges={"t n": experts_exchange},
)
def experts(
    hidden: Tensor,
    chosen: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gate: str,
    constants: Mapping[str, Any],
) -> Tensor:
    """The weighted sum of the experts that each token's router has chosen.

    hidden      [t, d];  chosen [t, k] int64: numbers of experts;  scores [t, k]
    up          [n, c, f, d], or [n, (f c), d] where gate and the rest lie in turn, or [n, f, d] where c is 1;
                up_bias: the same without d, or None
    down        [n, d, f]
    transposed  `up` has d, and `down` f, as the second of its dimensions
    gate        see `nnscaler.kernels.experts.gate_named`, and constants

    Returns [t, d] in the type of `hidden`. No token is dropped, however uneven the choice.
    """
    note_choice(chosen, len(down))
    first, second = as_matrices(up, down, transposed)
    bias = None if up_bias is None else up_bias.flatten(1)
    return mix(hidden, chosen, scores, first, second, bias, gate_named(gate, constants))


def as_matrices(up: Tensor, down: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """The weights as `mix` takes them: [n, d, i] and [n, f, d]."""
    if transposed:
        return (up.flatten(2) if up.dim() == 4 else up), down
    return (up.flatten(1, 2) if up.dim() == 4 else up).transpose(1, 2), down.transpose(1, 2)
