"""Example calls for every operator in the tables: for sizes a, b, c, d (even numbers), the arguments of one or more."""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler.operators import registry


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def flags(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


UNARY = tuple(
    "neg floor ceil round sign silu gelu sin cos abs square softplus mish hardswish leaky_relu erf exp sigmoid tanh "
    "relu elu clone contiguous zeros_like ones_like alias detach isnan isinf".split()
)
UNARY_POSITIVE = ["log", "log1p", "rsqrt", "sqrt", "reciprocal"]
BINARY = ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "rsub.Tensor", "maximum.default", "minimum.default"]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]
REDUCE_DIM = ["amax", "amin", "mean", "any", "all"]


def samples(a: int, b: int, c: int, d: int) -> dict[str, list[tuple]]:
    """Overload name -> argument tuples (a dict at the end: keyword arguments)."""
    x = real(a, b, c)
    calls: dict[str, list[tuple]] = {f"{name}.default": [(real(a, b, c),), (real(b),)] for name in UNARY}
    calls |= {f"{name}.default": [(positive(a, b),)] for name in UNARY_POSITIVE}
    calls |= {
        name: [(real(a, b, c), real(b, c)), (real(a, 1, c), real(b, 1)), (real(a, b), positive(1))] for name in BINARY
    }
    calls |= {f"{name}.Tensor": [(x.round(), real(b, c).round())] for name in COMPARE}
    calls |= {f"{name}.Scalar": [(x.round(), 0)] for name in COMPARE}
    calls |= {f"{name}.Scalar": [(real(a, b), 3)] for name in ("add", "sub", "rsub", "mul", "div")}
    calls |= {f"logical_{name}.default": [(flags(a, b), flags(b))] for name in ("and", "or")}
    calls |= {f"bitwise_{name}.Tensor": [(flags(a, b), flags(a, 1))] for name in ("and", "or")}
    calls |= {f"{name}.default": [(flags(a, b),)] for name in ("logical_not", "bitwise_not")}
    calls |= {
        "to.dtype": [(x, torch.float32)],
        "to.device": [(x, "cpu", torch.float32)],
        "to.dtype_layout": [(x, {"dtype": torch.float32})],
        "_to_copy.default": [(x, {"dtype": torch.float32})],
        "full_like.default": [(x, 2.0)],
        "floor_divide.default": [(index(9, a, b), index(5, b) + 1)],
        "remainder.Scalar": [(index(9, a, b), 3)],
        "remainder.Tensor": [(index(9, a, b), index(5, b) + 1)],
        "pow.Tensor_Scalar": [(x, 2)],
        "pow.Tensor_Tensor": [(positive(a, b), real(b))],
        "pow.Scalar": [(2.0, x)],
        "clamp.default": [(x, -0.5, 0.5)],
        "clamp_min.default": [(x, 0.1)],
        "clamp_max.default": [(x, 0.1)],
        "where.self": [(flags(b, c), real(a, b, c), real(a, 1, c))],
        "masked_fill.Scalar": [(x, flags(b, c), -1.0)],
        "addcmul.default": [(real(a, b), real(a, b), real(b))],
        "lerp.Scalar": [(real(a, b), real(a, b), 0.3)],
        "linear.default": [(real(a, b, c), real(d, c)), (real(a, c), real(d, c), real(d)), (real(c), real(d, c))],
        "mm.default": [(real(a, b), real(b, c))],
        "bmm.default": [(real(a, b, c), real(a, c, d))],
        "addmm.default": [(real(d), real(a, b), real(b, d)), (real(a, d), real(a, b), real(b, d))],
        "matmul.default": [
            (real(a, b, c), real(c, d)), (real(a, b, c), real(a, c, d)), (real(2, a, b, c), real(a, c, d)),
            (real(a), real(a)), (real(a, b, c), real(c)), (real(c), real(a, c, d)), (real(a, 1, b, c), real(2, c, d)),
        ],
        "view.default": [(x, [a * b, c]), (x, [a, b * c]), (real(a * b, c), [a, b, c]), (x, [1, a, b, c]), (x, [-1]),
                         (real(6, 4), [4, 6]), (real(a, b, 3 * c), [a, b, c, 3])],
        "reshape.default": [(x.transpose(0, 1), [b, a * c])],
        "_unsafe_view.default": [(x, [a * b, c])],
        "flatten.using_ints": [(x, 0, 1), (x, 1, 2)],
        "unflatten.int": [(real(a * b, c), 0, [a, b])],
        "expand.default": [(real(a, 1, c), [a, b, c]), (real(b), [a, b])],
        "transpose.int": [(x, 0, 2), (x, -1, -2)],
        "t.default": [(real(a, b),), (real(a),)],
        "permute.default": [(x, [2, 0, 1])],
        "unsqueeze.default": [(x, 0), (x, -1), (x, 2)],
        "squeeze.default": [(real(a, 1, b, 1),)],
        "squeeze.dim": [(real(a, 1, b), 1), (real(a, 1, b), 0)],
        "squeeze.dims": [(real(a, 1, b, 1), [1, 3])],
        "slice.Tensor": [(x, 1, 0, b // 2), (x, 2, 1, 9223372036854775807), (x, -1, 0, 2)],
        "narrow.default": [(x, 0, 1, a - 1)],
        "split.Tensor": [(x, b // 2, 1)],
        "split_with_sizes.default": [(x, [1, c - 1], 2)],
        "split.sizes": [(x, [1, c - 1], 2)],
        "chunk.default": [(x, 2, -1)],
        "select.int": [(x, 1, 0), (x, -1, 1)],
        "unbind.int": [(x, 1), (x,)],
        "cat.default": [([real(a, b), real(a, c)], 1), ([real(a, b), real(c, b)],), ([x, x], -1)],
        "stack.default": [([real(a, b), real(a, b)], 1), ([real(a), real(a), real(a)],)],
        "constant_pad_nd.default": [(x, [1, 2], 0.0), (x, [1, 0, 0, 1])],
        "repeat.default": [(real(a, b), [2, 1]), (real(a, b), [3, 1, 2])],
        "repeat_interleave.self_int": [(x, 3, 1)],
        "flip.default": [(x, [0, 2])],
        "roll.default": [(x, [1], [1])],
        "sum.default": [(x,)],
        "sum.dim_IntList": [(x, [1]), (x, [-1], True), (x, [0, 2])],
        "mean.default": [(x,)],
        "mean.dim": [(x, [-1], True), (x, [0, 1])],
        "prod.default": [(real(a, b),)],
        **{f"{name}.default": [(real(a, b),)] for name in ("max", "min", "argmin", "argmax")},
        "amax.default": [(x, [1])],
        "amin.default": [(x, [-1], True)],
        "any.default": [(flags(a, b),)],
        "all.default": [(flags(a, b),)],
        "any.dim": [(flags(a, b), 1)],
        "all.dim": [(flags(a, b), 0)],
        "max.dim": [(x, 1)],
        "min.dim": [(x, -1, True)],
        "var.correction": [(x, [1]), (x, [-1], {"keepdim": True})],
        "std.correction": [(x, [1])],
        "var.dim": [(x, [1])],
        "std.dim": [(x, [2])],
        "norm.ScalarOpt_dim": [(x, 2, [1], True)],
        "logsumexp.default": [(x, [1])],
        "softmax.int": [(x, -1), (x, 1, torch.float64)],
        "log_softmax.int": [(x, 2)],
        "_softmax.default": [(x, 1, False)],
        "_log_softmax.default": [(x, -1, False)],
        "cumsum.default": [(x, 1)],
        "sort.default": [(x, 1)],
        "layer_norm.default": [(x, [c], real(c), real(c)), (x, [b, c])],
        "rms_norm.default": [(x, [c], positive(c))],
        "cross_entropy_loss.default": [
            (real(a, b), index(b, a)), (real(a, b), index(b, a), None, 2), (real(a, b), index(b, a), None, 0),
            (real(a, b, c), index(b, a, c), None, 0), (real(a, b), index(b, a), None, 2, 1),
        ],
        "embedding.default": [(real(d, c), index(d, a, b)), (real(d, c), index(d, a))],
        "gather.default": [(x, 2, index(c, a, b, d)), (x, 1, index(b, a, b, c))],
        "index_select.default": [(x, 1, index(b, d))],
        "tril.default": [(x,)],
        "triu.default": [(x, 1)],
        "arange.default": [(a,)],
        "arange.start": [(1, a)],
        "arange.start_step": [(1, a, 2)],
        "zeros.default": [([a, b],)],
        "ones.default": [([a, b],)],
        "full.default": [([a, b], 2.0)],
        "empty.memory_format": [],
        "scalar_tensor.default": [(2.0,)],
        "lift_fresh_copy.default": [(real(a),)],
        "scaled_dot_product_attention.default": [
            (real(a, b, c, d), real(a, b, c, d), real(a, b, c, d), None, 0.0, True),
            (real(a, b, c, d), real(a, b, 6, d), real(a, b, 6, d)),
            (real(a, b, c, d), real(a, b, c, d), real(a, b, c, d), real(a, 1, c, c)),
            (real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d), None, 0.0, True, {"enable_gqa": True}),
            (real(b, c, d), real(b, c, d), real(b, c, d)),
        ],
    }  # fmt: skip
    return {f"aten.{name}": [_arguments(call) for call in found] for name, found in calls.items()} | {
        "attention": [
            ((real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d)), {}),
            ((real(a, b, c, d), real(a, b, 6, d), real(a, b, 6, d), 0.3, False), {}),
        ]
    }


def _arguments(call: tuple) -> tuple[tuple, dict]:
    return (call[:-1], call[-1]) if call and isinstance(call[-1], dict) else (call, {})


def known() -> list[str]:
    """Operators of the tables, without those that a test registers."""
    return [name for name in registry.names() if name.startswith("aten.") or name == "attention"]
