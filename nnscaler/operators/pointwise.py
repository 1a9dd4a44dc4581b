"""Operators that compute each element of the output from the input elements at the same place, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.registry import backward_reads, family, save_both, save_nothing
from nnscaler.operators.spelling import FUNCTION, WrittenCall, infix


def broadcast(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Dimensions are aligned from the right. One of size 1 that is broadcast stays whole."""
    names = dim_names(outputs[0])
    tensors = []
    for shape in inputs:
        aligned = list(zip(names, outputs[0]))[len(names) - len(shape) :]
        tensors.append([name if size == full else "1" for size, (name, full) in zip(shape, aligned)])
    return write(tensors, [names])


def like_the_first(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """The result is like the first tensor; only the type of the second matters."""
    names = dim_names(outputs[0])
    return f"{' '.join(names) or '()'}, ? -> {' '.join(names) or '()'}"


def cast(call: WrittenCall) -> str:
    """A tensor in another type. All tensors are on one device, so nothing else can change."""
    for name in ("dtype", "other"):
        call.unwritten.discard(name)
    return f"{call['self']}.to({call.dtype})"


def copied(call: WrittenCall) -> str:
    """The second tensor, in the shape and type of the first: `copy_` without writing in place."""
    call.unwritten.discard("self")
    return f"{call['src']}.expand({', '.join(map(str, call.shape)) or '()'}).to({call.dtype})"


def where(call: WrittenCall) -> str:
    condition, first, second = (call[name] for name in ("condition", "self", "other"))
    return f"torch.where({condition}, {first}, {second})"


def activation(name: str, **facts: object) -> None:
    """A function of `torch.nn.functional`."""
    family(f"{name}.default", broadcast, "F.{op}(*)", **facts)  # type: ignore[arg-type]


saves_self = backward_reads(self="self")
saves_result = backward_reads(self="result")

# Backward needs nothing but the gradient.
family("add.Tensor add.Scalar", broadcast, infix("+"), saves=save_nothing)
family("sub.Tensor sub.Scalar", broadcast, infix("-"), saves=save_nothing)
family("rsub.Scalar rsub.Tensor", broadcast, infix("-", swapped=True), saves=save_nothing)
family("mul.Scalar", broadcast, infix("*"), saves=save_nothing)
family("div.Scalar", broadcast, infix("/"), saves=save_nothing)
family("to.dtype to.device to.dtype_layout _to_copy.default", broadcast, cast, saves=save_nothing)
family("to.other type_as.default", like_the_first, cast, saves=save_nothing)
family("clone.default contiguous.default neg.default", broadcast, saves=save_nothing)
family("lift_fresh_copy.default", broadcast, "{self}.clone()", saves=save_nothing)
family("alias.default", broadcast, "{self}", saves=save_nothing, alias=True)
family("detach.default", broadcast, saves=save_nothing, alias=True)
family("zeros_like.default ones_like.default", broadcast, FUNCTION, saves=save_nothing)
family("full_like.default empty_like.default", broadcast, FUNCTION, saves=save_nothing)
family("floor.default ceil.default round.default round.decimals", broadcast, saves=save_nothing)
family("trunc.default sign.default", broadcast, saves=save_nothing)
family("copy.default", broadcast, copied, saves=save_nothing)
# No gradient at all: comparisons, logic, tests.
family(
    "eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor "
    "ge.Scalar logical_and.default logical_or.default logical_xor.default logical_not.default isfinite.default "
    "isnan.default isinf.default floor_divide.default floor_divide.Scalar",
    broadcast,
    saves=save_nothing,
)
family("bitwise_and.Tensor bitwise_and.Scalar __and__.Tensor __and__.Scalar", broadcast, infix("&"), saves=save_nothing)
family("bitwise_or.Tensor bitwise_or.Scalar __or__.Tensor __or__.Scalar", broadcast, infix("|"), saves=save_nothing)
family("bitwise_xor.Tensor bitwise_xor.Scalar", broadcast, infix("^"), saves=save_nothing)
family("bitwise_not.default", broadcast, saves=save_nothing)
# Two tensors.
family("mul.Tensor", broadcast, infix("*"), saves=backward_reads(self="other", other="self"))
family("div.Tensor", broadcast, infix("/"), saves=backward_reads(self="other", other="self other"))
family("div.Tensor_mode", broadcast, saves=backward_reads(self="other", other="self other"))
family("div.Scalar_mode remainder.Scalar fmod.Scalar", broadcast, saves=save_nothing)
family("remainder.Tensor", broadcast, saves=backward_reads(other="self other"))
family("fmod.Tensor", broadcast, saves=backward_reads(other="self other"))
family("maximum.default minimum.default", broadcast, saves=backward_reads(self="self other", other="self other"))
family("where.self where.ScalarOther where.ScalarSelf where.Scalar", broadcast, where, saves=backward_reads(
    self="condition", other="condition"))  # fmt: skip
family("masked_fill.Scalar masked_fill.Tensor", broadcast, saves=backward_reads(self="mask", value="mask"))
family("addcmul.default", broadcast, saves=backward_reads(tensor1="tensor2", tensor2="tensor1"))
family("lerp.Scalar", broadcast, saves=save_nothing)
family("atan2.default", broadcast, saves=backward_reads(self="self other", other="self other"))
# Powers.
family("square.default pow.Tensor_Scalar", broadcast, saves=saves_self)
family("pow.Tensor_Tensor", broadcast, saves=save_both)
family("pow.Scalar", broadcast, FUNCTION, saves=backward_reads(exponent="exponent result"))
# One tensor, with what its derivative is computed from.
family(
    "log.default log2.default log10.default log1p.default sin.default cos.default abs.default erf.default "
    "clamp.default clamp_min.default clamp_max.default",
    broadcast,
    saves=saves_self,
)
family("clamp.Tensor", broadcast, saves=backward_reads(self="self min max", min="self min max", max="self min max"))
family(
    "exp.default exp2.default expm1.default rsqrt.default sqrt.default sigmoid.default tanh.default relu.default "
    "reciprocal.default",
    broadcast,
    saves=saves_result,
)
for _name in ("silu", "gelu", "mish", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "softplus", "celu"):
    activation(_name, saves=saves_self)
for _name in ("selu", "relu6"):
    activation(_name, saves=saves_self)
family("elu.default", broadcast, "F.elu({self}, {alpha})", saves=saves_self)
family("log_sigmoid.default", broadcast, "F.logsigmoid(*)", saves=saves_self)
family("threshold.default", broadcast, "F.threshold(*)", saves=saves_self)
family("hardshrink.default softshrink.default", broadcast, "F.{op}(*)", saves=saves_self)
family("tan.default", broadcast, saves=saves_result)
family(
    "asin.default acos.default atan.default sinh.default cosh.default asinh.default nan_to_num.default logit.default "
    "sinc.default",
    broadcast,
    saves=saves_self,
)
family("frac.default deg2rad.default rad2deg.default", broadcast, saves=save_nothing)
family("addcdiv.default", broadcast, saves=backward_reads(self="tensor2", tensor1="tensor2", tensor2="tensor1 tensor2"))
family("lerp.Tensor", broadcast, saves=backward_reads(self="weight", end="weight", weight="self end weight"))
family("clamp_min.Tensor", broadcast, saves=backward_reads(self="self min", min="self min"))
family("clamp_max.Tensor", broadcast, saves=backward_reads(self="self max", max="self max"))
family("hypot.default", broadcast, saves=backward_reads(self="self result", other="other result"))
family("polar.default", broadcast, FUNCTION, saves=backward_reads(abs="result", angle="result"))
family("logaddexp.default", broadcast, saves=backward_reads(self="self other", other="self other"))
family("fill.Scalar fill.Tensor", broadcast, FUNCTION, saves=save_nothing)
