"""Operators that compute each output element from the input elements at the same place, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.registry import (
    family,
    save_cofactors,
    save_inputs,
    save_nothing,
    save_outputs,
)
from nnscaler.operators.text import dim_names, write


def broadcast(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Dimensions aligned from the right; one of size 1 that is broadcast stays whole."""
    names = dim_names(outputs[0])
    tensors = []
    for shape in inputs:
        aligned = list(zip(names, outputs[0]))[len(names) - len(shape) :]
        tensors.append([name if size == full else "1" for size, (name, full) in zip(shape, aligned)])
    return write(tensors, [names])


# Backward needs nothing but the gradient (or a mask it can take from it).
family(
    "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor neg.default to.dtype to.device "
    "to.dtype_layout _to_copy.default clone.default contiguous.default mul.Scalar div.Scalar floor.default "
    "ceil.default round.default sign.default zeros_like.default ones_like.default full_like.default",
    broadcast,
    saves=save_nothing,
)
# No gradient at all: comparisons and logic.
family(
    "eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor "
    "ge.Scalar logical_and.default logical_or.default logical_not.default bitwise_and.Tensor bitwise_or.Tensor "
    "bitwise_not.default isnan.default isinf.default floor_divide.default remainder.Scalar remainder.Tensor",
    broadcast,
    saves=save_nothing,
)
family("mul.Tensor", broadcast, saves=save_cofactors)
family(
    "div.Tensor pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar square.default silu.default gelu.default log.default "
    "log1p.default sin.default cos.default abs.default maximum.default minimum.default clamp.default clamp_min.default "
    "clamp_max.default softplus.default mish.default hardswish.default leaky_relu.default where.self "
    "masked_fill.Scalar erf.default addcmul.default lerp.Scalar",
    broadcast,
    saves=save_inputs,
)
family(
    "exp.default rsqrt.default sqrt.default sigmoid.default tanh.default relu.default reciprocal.default elu.default",
    broadcast,
    saves=save_outputs,
)
