"""State-space models and linear attention: what carries a state from token to token, as one operator."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from nnscaler.constants import imported
from nnscaler.graph import Node
from nnscaler.operators.register import register_op
from nnscaler.operators.registry import contraction_flops

TOKENS = "l^"  # what annotations call them


def scan_flops(sizes: dict[str, int], node: Node) -> float:
    """Each number of the state is decayed, added to, and multiplied with what is read, at each token."""
    return 3 * contraction_flops(sizes, node)


@register_op(lambda kernel, annotation, tensors, options: annotation, flops=scan_flops)
def scan(kernel: str, annotation: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The result of a model's own function, without the last state.

    kernel      the function, as `module:name`
    annotation  of `tensors` and the result (see `nnscaler.models.scans`); tokens are not split
    options     its other arguments
    """
    module, _, name = kernel.partition(":")
    *places, place = [_place_of_tokens(text) for text in re.split(", | -> ", annotation)]
    without_values = all(tensor.is_meta for tensor in tensors.values())
    if without_values:  # the result of one token tells the type of all, without a loop over them
        length = next(tensor.shape[at] for tensor, at in zip(tensors.values(), places) if at is not None)
        one = zip(tensors.items(), places)
        tensors = {key: tensor if at is None else tensor.narrow(at, 0, 1) for (key, tensor), at in one}
    found = imported(module, name)(**tensors, **options)
    result: Tensor = found if isinstance(found, Tensor) else found[0]
    assert place is not None
    return result.repeat_interleave(length, place) if without_values else result


def _place_of_tokens(text: str) -> int | None:
    """The dimension of an annotated tensor along which its tokens lie."""
    dims = re.findall(r"\(.*?\)|\S+", text)
    return dims.index(TOKENS) if TOKENS in dims else None
