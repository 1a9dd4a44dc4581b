"""Example calls for every operator in the tables: for sizes a, b, c, d (even numbers), the arguments of one or more."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nnscaler.kernels.random import draws_of, numbers_of, place_of
from nnscaler.operators import registry
from tests.operators.calls import fixed


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def flags(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


UNARY = tuple(
    "neg floor ceil round trunc sign silu gelu sin cos abs square softplus mish hardswish hardsigmoid hardtanh "
    "leaky_relu erf exp exp2 expm1 sigmoid tanh relu relu6 elu celu selu log_sigmoid clone contiguous zeros_like "
    "ones_like alias detach isnan isinf isfinite".split()
)
UNARY_POSITIVE = ["log", "log2", "log10", "log1p", "rsqrt", "sqrt", "reciprocal"]
BINARY = ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "rsub.Tensor", "maximum.default", "minimum.default"]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]


DRAWS, PLACE = draws_of(seed=3, step=1, micro_batch=2), place_of("layers.0", 1)


def _numbers_of_weights(*shape: int) -> dict[str, Tensor]:
    return dict(zip(("batches", "heads"), numbers_of(shape)))


@cache
def samples(a: int, b: int, c: int, d: int) -> dict[str, list[tuple]]:
    """Overload name -> argument tuples (a dict at the end: keyword arguments)."""
    x = real(a, b, c)
    calls: dict[str, list[tuple]] = {f"{name}.default": [(real(a, b, c),), (real(b),)] for name in UNARY}
    calls |= {f"{name}.default": [(positive(a, b),)] for name in UNARY_POSITIVE}
    calls |= {
        name: [(real(a, b, c), real(b, c)), (real(a, 1, c), real(b, 1)), (real(a, b), positive(1)), (x, positive())]
        for name in BINARY
    }
    for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"):  # what Python's operators write
        calls[name] += [(x, 2), (x, -0.5), (index(9, a, b) + 1, 0.5), (index(9, a, b), 3), (index(9, a, b), positive())]
    for name in ("add.Tensor", "sub.Tensor", "rsub.Tensor"):
        calls[name] += [(x, real(b, c), {"alpha": 2.5}), (index(9, a, b), index(9, b), {"alpha": 3})]
    calls["add.Tensor"] += [(x, 2.0, {"alpha": 3}), (flags(a, b), 1)]
    calls |= {f"{name}.Tensor": [(x.round(), real(b, c).round()), (x.round(), positive().round())] for name in COMPARE}
    calls |= {f"{name}.Scalar": [(x.round(), 0), (index(9, a, b), 2.5)] for name in COMPARE}
    calls |= {
        f"{name}.Scalar": [(real(a, b), 3), (index(9, a, b), 2.5)] for name in ("add", "sub", "rsub", "mul", "div")
    }
    for name in ("add", "sub", "rsub"):
        calls[f"{name}.Scalar"] += [(x, 3, 2), (x, 1.5, -0.5)]
    calls |= {f"logical_{name}.default": [(flags(a, b), flags(b)), (x, flags(c))] for name in ("and", "or", "xor")}
    calls |= {f"bitwise_{name}.Tensor": [(flags(a, b), flags(a, 1))] for name in ("and", "or", "xor")}
    calls |= {f"bitwise_{name}.Scalar": [(index(9, a, b), 5)] for name in ("and", "or", "xor")}
    calls |= {f"__{name}__.Tensor": [(flags(a, b), flags(a, 1))] for name in ("and", "or")}
    calls |= {f"__{name}__.Scalar": [(index(9, a, b), 5)] for name in ("and", "or")}
    calls |= {f"{name}.default": [(flags(a, b),)] for name in ("logical_not", "bitwise_not")}
    for name in ("clone", "contiguous", "zeros_like", "ones_like"):
        calls[f"{name}.default"] += [(x, {"memory_format": torch.contiguous_format})]
    for name in ("zeros_like", "ones_like"):
        calls[f"{name}.default"] += [(x, {"dtype": torch.float32, "device": "cpu", "pin_memory": False})]
    calls["gelu.default"] += [(x, {"approximate": "tanh"})]
    calls["softplus.default"] += [(x, 2, 0.5)]
    calls["leaky_relu.default"] += [(x, 0.3)]
    calls["elu.default"] += [(x, 0.5)]
    calls["celu.default"] += [(x, 0.5)]
    calls["hardtanh.default"] += [(x, -0.5, 0.25)]
    causal = (real(a, b, c, d), real(a, b, c, d), real(a, b, c, d))
    calls |= {
        **{f"{name}.default": [(x,)] for name in "tan atan sinh cosh asinh sinc frac deg2rad rad2deg".split()},
        **{f"{name}.default": [(positive(a, b) / 2,)] for name in ("asin", "acos")},
        "threshold.default": [(x, 0.1, 2.0)],
        "hardshrink.default": [(x,), (x, 0.3)],
        "softshrink.default": [(x,), (x, 0.3)],
        "nan_to_num.default": [(x / 0,), (x / 0, 1.0, 2.0, -3.0)],
        "logit.default": [(positive(a, b) / 2, 0.1), (positive(a, b) / 2,)],
        "addcdiv.default": [(x, real(b, c), positive(a, b, c)), (x, real(c), positive(c), {"value": 0.3})],
        "lerp.Tensor": [(x, real(b, c), positive(a, b, c)), (x, real(a, b, c), positive())],
        "clamp_min.Tensor": [(x, real(b, c))],
        "clamp_max.Tensor": [(x, real(b, c))],
        "hypot.default": [(x, positive(b, c))],
        "polar.default": [(x, real(b, c)), (positive(c), x)],
        "logaddexp.default": [(x, real(b, c))],
        "fill.Scalar": [(x, 2.0), (index(9, a), 3)],
        "fill.Tensor": [(x, real())],
        "mse_loss.default": [(x, real(a, b, c)), (x, real(a, b, c), 0), (x, real(a, b, c), 2)],
        "smooth_l1_loss.default": [(x, real(a, b, c)), (x, real(a, b, c), 0, 0.3), (x, real(a, b, c), 2)],
        "huber_loss.default": [(x, real(a, b, c)), (x, real(a, b, c), 0, 0.3), (x, real(a, b, c), 2)],
        "cumprod.default": [(x, 1), (x.float(), -1, {"dtype": torch.float64})],
        "round.decimals": [(x, {"decimals": 1})],
        "dropout.default": [(x, 0.5, False), (x, 0.0, True)],
        "feature_dropout.default": [(x, 0.5, False)],
        "alpha_dropout.default": [(x, 0.5, False)],
        "to.dtype": [(x, torch.float32), (index(9, a), torch.float64, False, True), (x, torch.int64)],
        "to.device": [(x, "cpu", torch.float32)],
        "to.dtype_layout": [(x, {"dtype": torch.float32}), (x, {"device": "cpu", "layout": torch.strided})],
        "to.other": [(x, positive(d).float()), (index(9, a), positive())],
        "type_as.default": [(x, positive(d).float())],
        "_to_copy.default": [(x, {"dtype": torch.float32}), (x, {"memory_format": torch.preserve_format})],
        "full_like.default": [(x, 2.0), (index(9, a), 2), (x, 1, {"dtype": torch.int64})],
        "floor_divide.default": [(index(9, a, b), index(5, b) + 1)],
        "floor_divide.Scalar": [(index(9, a, b), 2)],
        "div.Tensor_mode": [
            (x, positive(b, c), {"rounding_mode": mode}) for mode in (None, "floor", "trunc")
        ] + [(index(9, a), 2, {"rounding_mode": "floor"})],
        "div.Scalar_mode": [(x, 0.3, {"rounding_mode": "floor"}), (index(9, a), 2, {"rounding_mode": "trunc"})],
        "remainder.Scalar": [(index(9, a, b), 3), (x, 0.7)],
        "remainder.Tensor": [(index(9, a, b), index(5, b) + 1), (x, positive(c))],
        "fmod.Scalar": [(x, 0.7)],
        "fmod.Tensor": [(x, positive(c))],
        "atan2.default": [(x, positive(b, c))],
        "pow.Tensor_Scalar": [(x, 2), (positive(a, b), -0.5), (x, 0), (index(9, a), 2), (index(9, a), 0.5)],
        "pow.Tensor_Tensor": [(positive(a, b), real(b)), (positive(a, b), positive())],
        "pow.Scalar": [(2.0, x), (2, index(5, a)), (3, x)],
        "clamp.default": [(x, -0.5, 0.5), (x, None, 0.5), (x, {"max": 0.1}), (x, 0), (index(9, a), 2, 5)],
        "clamp.Tensor": [(x, real(c) - 1, positive(b, c)), (x, None, real(c))],
        "clamp_min.default": [(x, 0.1)],
        "clamp_max.default": [(x, 0.1)],
        "where.self": [
            (flags(b, c), real(a, b, c), real(a, 1, c)), (flags(a, b), real(b).float(), real()),
            (flags(a), index(9, a), real(a)),
        ],
        "where.ScalarOther": [
            (flags(a, b), x[..., 0], 0.0), (flags(a), index(9, a), 0.5), (flags(a), real(a).float(), 2),
        ],
        "where.ScalarSelf": [(flags(a, b), -1e4, x[..., 0]), (flags(a), 0.5, index(9, a))],
        "where.Scalar": [(flags(a, b), 1.0, 0.0), (flags(a, b), 1, 0), (flags(a), 1, 0.5)],
        "masked_fill.Scalar": [(x, flags(b, c), -1.0), (x, flags(a, b, c), float("-inf"))],
        "masked_fill.Tensor": [(x, flags(b, c), positive())],
        "addcmul.default": [(real(a, b), real(a, b), real(b)), (real(a), real(a), real(a), {"value": 0.5})],
        "lerp.Scalar": [(real(a, b), real(a, b), 0.3)],
        "linear.default": [(real(a, b, c), real(d, c)), (real(a, c), real(d, c), real(d)), (real(c), real(d, c))],
        "mm.default": [(real(a, b), real(b, c))],
        "bmm.default": [(real(a, b, c), real(a, c, d))],
        "addmm.default": [
            (real(d), real(a, b), real(b, d)), (real(a, d), real(a, b), real(b, d)),
            (real(a, 1), real(a, b), real(b, d)),
            (real(1, d), real(a, b), real(b, d), {"beta": 0.5, "alpha": 2}),
        ],
        "baddbmm.default": [
            (real(a, b, d), real(a, b, c), real(a, c, d)), (real(b, d), real(a, b, c), real(a, c, d), {"beta": 0.5}),
            (real(a, 1, d), real(a, b, c), real(a, c, d), {"alpha": 0.5}),
        ],
        "matmul.default": [
            (real(a, b, c), real(c, d)), (real(a, b, c), real(a, c, d)), (real(2, a, b, c), real(a, c, d)),
            (real(a), real(a)), (real(a, b, c), real(c)), (real(c), real(a, c, d)), (real(a, 1, b, c), real(2, c, d)),
        ],
        "einsum.default": [
            ("abc,cd->abd", [real(a, b, c), real(c, d)]), ("b h l d, b h s d -> b h l s", [real(a, b, c, d)] * 2),
            ("ab,ab->a", [real(a, b), real(a, b)]), ("...c,cd->...d", [real(a, b, c), real(c, d)]),
            ("ij,jk", [real(a, b), real(b, c)]), ("ab->ba", [real(a, b)]), ("...c,...c", [real(a, b, c), real(1, c)]),
        ],
        "view.default": [(x, [a * b, c]), (x, [a, b * c]), (real(a * b, c), [a, b, c]), (x, [1, a, b, c]), (x, [-1]),
                         (real(6, 4), [4, 6]), (real(a, b, 3 * c), [a, b, c, 3]), (real(1), [])],
        "reshape.default": [(x.transpose(0, 1), [b, a * c]), (x, [a, -1])],
        "_unsafe_view.default": [(x, [a * b, c])],
        "flatten.using_ints": [(x, 0, 1), (x, 1, 2), (x,), (x, 1)],
        "unflatten.int": [(real(a * b, c), 0, [a, b]), (real(c, a * b), -1, [-1, b])],
        "expand.default": [
            (real(a, 1, c), [a, b, c]), (real(b), [a, b]), (real(a, 1, c), [-1, b, -1]), (real(b), [a, -1]),
            (real(a, 1, c), [a, b, c], {"implicit": True}),
        ],
        "expand_as.default": [(real(a, 1, c), x)],
        "transpose.int": [(x, 0, 2), (x, -1, -2)],
        "t.default": [(real(a, b),), (real(a),)],
        "permute.default": [(x, [2, 0, 1]), (x, [0, -1, -2])],
        "movedim.int": [(x, 0, 2), (x, -1, 0)],
        "movedim.intlist": [(x, [0, 1], [1, 2])],
        "view_as_complex.default": [(real(a, b, 2),), (real(2),)],
        "view_as_real.default": [(torch.complex(x, x),)],
        "unsqueeze.default": [(x, 0), (x, -1), (x, 2)],
        "squeeze.default": [(real(a, 1, b, 1),)],
        "squeeze.dim": [(real(a, 1, b), 1), (real(a, 1, b), 0)],
        "squeeze.dims": [(real(a, 1, b, 1), [1, 3]), (real(a, 1, b, 1), [0, -1])],
        "slice.Tensor": [
            (x, 1, 0, b // 2), (x, 2, 1, 9223372036854775807), (x, -1, 0, 2), (x, 1, -1), (x, 1, None, -1),
            (x, 0, -100, 100), (x, 1, 0, 9223372036854775807, 2), (x, -2, 1, 100, 3), (x,), (x, 2, b, b),
        ],
        "narrow.default": [(x, 0, 1, a - 1), (x, -1, 0, 1)],
        "split.Tensor": [(x, b // 2, 1), (x, 1), (x, 1, -1)],
        "split_with_sizes.default": [(x, [1, c - 1], 2), (x, [1, a - 1])],
        "split.sizes": [(x, [1, c - 1], 2)],
        "chunk.default": [(x, 2, -1), (x, 2)],
        "select.int": [(x, 1, 0), (x, -1, 1), (x, 0, -1)],
        "unbind.int": [(x, 1), (x,), (x, -1)],
        "cat.default": [([real(a, b), real(a, c)], 1), ([real(a, b), real(c, b)],), ([real(0), x, x], -1)],
        "stack.default": [([real(a, b), real(a, b)], 1), ([real(a), real(a), real(a)],), ([x, x], -1)],
        "constant_pad_nd.default": [(x, [1, 2], 0.0), (x, [1, 0, 0, 1]), (x, [-1, 2], 1.5), (x, [0, 1], 2)],
        "pad.default": [(x, [1, 2]), (x, [0, 0, 1, 0], "constant", 1.5), (real(a, b, 4), [1, 2], "reflect")],
        "copy.default": [(fixed(real(a, b, c)), index(9, b, c)), (fixed(real(a, b)), fixed(real(b)))],
        "slice_scatter.default": [
            (x, real(a, 1, c), 1, 0, 1), (x, real(a, b, c - 1), -1, 1), (real(4, b), real(2, b), 0, 0, 4, 2),
        ],
        "select_scatter.default": [(x, real(a, c), 1, 0), (x, real(a, b), -1, -1)],
        "repeat.default": [(real(a, b), [2, 1]), (real(a, b), [3, 1, 2])],
        "repeat_interleave.self_int": [(x, 3, 1), (x, 2), (x, 2, -1, {"output_size": 2 * c})],
        "flip.default": [(x, [0, 2]), (x, [-1])],
        "roll.default": [(x, [1], [1]), (x, [1, -1], [0, -1]), (x, [2])],
        "sum.default": [(x,), (x, {"dtype": torch.float32}), (index(9, a),)],
        "sum.dim_IntList": [
            (x, [1]), (x, [-1], True), (x, [0, 2]), (x, None), (x, [1], {"dtype": torch.float32}), (x, []),
        ],
        "mean.default": [(x,), (index(9, a), {"dtype": torch.float64})],
        "mean.dim": [
            (x, [-1], True), (x, [0, 1]), (x, None, True), (x, [1], {"keepdim": True, "dtype": torch.float32}),
        ],
        "prod.default": [(real(a, b),)],
        "prod.dim_int": [(real(a, b), 1, True)],
        **{f"{name}.default": [(real(a, b),)] for name in ("max", "min")},
        **{f"{name}.default": [(real(a, b),), (x, 1), (x, -1, True)] for name in ("argmin", "argmax")},
        "amax.default": [(x, [1]), (x,), (x, [0, -1], True)],
        "amin.default": [(x, [-1], True)],
        "any.default": [(flags(a, b),), (x,)],
        "all.default": [(flags(a, b),)],
        "any.dim": [(flags(a, b), 1), (flags(a, b), -1, True)],
        "all.dim": [(flags(a, b), 0)],
        "max.dim": [(x, 1)],
        "min.dim": [(x, -1, True)],
        "var.correction": [
            (x, [1]), (x, [-1], {"keepdim": True}), (x, None, {"correction": 0}), (x, {"correction": 2}),
        ],
        "std.correction": [(x, [1]), (x, [0], {"correction": 0.5})],
        "var.dim": [(x, [1]), (x, [1], False, True)],
        "std.dim": [(x, [2])],
        "var.default": [(x, False)],
        "std.default": [(x,)],
        "norm.ScalarOpt_dim": [(x, 2, [1], True), (x, None, [-1]), (x, 1, [0])],
        "linalg_vector_norm.default": [(x, 2, [-1], True), (x,), (x, 1, [1], {"dtype": torch.float64})],
        "logsumexp.default": [(x, [1]), (x, [0, -1], True)],
        "conv1d.default": [
            (real(a, b, c), real(d, b, 2), real(d)), (real(a, b, c), real(b, 1, 2), None, [1], [1], [1], b),
            (real(a, b, c), real(b, 1, 1), real(b), {"groups": b, "stride": [2]}), (real(b, c), real(d, b, 1), real(d)),
            (real(a, 2 * b, c), real(4, b, 2), real(4), [1], [2], [1], 2), (real(a, b, 6), real(2, b, 2), None, [2]),
        ],
        "conv1d.padding": [(real(a, b, c), real(d, b, 1), None, [1], "same")],
        "conv2d.default": [(real(a, b, c, 4), real(d, b, 2, 2), real(d), [1, 2], [1, 0])],
        **{f"{kind}_pool1d.default": [(real(a, b, 6), [2]), (real(b, 8), [3], [2], [1])] for kind in ("max", "avg")},
        **{
            f"{kind}_pool2d.default": [(real(a, b, 6, 4), [2, 2]), (real(b, 6, 4), [3, 2], [1, 2], [1, 0])]
            for kind in ("max", "avg")
        },
        **{f"{kind}_pool3d.default": [(real(a, b, 4, 4, 2), [2, 2, 1])] for kind in ("max", "avg")},
        "adaptive_avg_pool2d.default": [(real(a, b, 6, 4), size) for size in ([3, 2], [3, 1], [1, 1])],
        "upsample_nearest1d.vec": [(real(a, b, 6), None, [2.0])],
        "upsample_nearest2d.vec": [(real(a, b, 6, 4), None, [2.0, 1.5]), (real(a, b, 6, 4), [3, 8], None)],
        "upsample_nearest3d.vec": [(real(a, b, 2, 2, 4), [4, 4, 2], None)],
        "upsample_bilinear2d.vec": [
            (real(a, b, 6, 4), None, False, [2.0, 1.5]), (real(a, b, 6, 4), [3, 8], True, None),
        ],
        "pixel_shuffle.default": [(real(a, 4 * b, c, d), 2), (real(4 * b, c, d), 2)],
        "conv2d.padding": [(real(a, b, c, 4), real(d, b, 1, 2), real(d), [1, 1], "valid")],
        "softmax.int": [(x, -1), (x, 1, torch.float64), (x.float(), 0, torch.float64)],
        "log_softmax.int": [(x, 2), (x.float(), -1, torch.float64)],
        "_softmax.default": [(x, 1, False)],
        "_log_softmax.default": [(x, -1, False)],
        "cumsum.default": [(x, 1), (index(9, a, b), -1, {"dtype": torch.float64}), (flags(a, b), 1)],
        "sort.default": [(x, 1), (x, -1, True)],
        "sort.stable": [(x, {"stable": True, "dim": 1, "descending": True})],
        "argsort.default": [(x, 1), (x, -1, True)],
        "argsort.stable": [(x, {"stable": True, "dim": 0})],
        "topk.default": [(x, 2), (x, 1, 0, False), (x, 2, 1, True, True)],
        "diff.default": [(x,), (x, 2, 2), (x, 1, -1, real(a, b, 1)), (x, 1, 0, real(2, b, c), real(a, b, c))],
        "layer_norm.default": [
            (x, [c], real(c), real(c)), (x, [b, c]), (x, [c], None, real(c)), (x, [c], real(c), real(c), 0.5, False),
            (x, [c], real(c), None, 1e-5, True),
        ],
        "rms_norm.default": [(x, [c], positive(c)), (x, [b, c], None, 0.5), (x, [c], positive(c), 1e-3)],
        "group_norm.default": [(real(a, 2 * b, c), 2, real(2 * b), real(2 * b), 0.5, False), (real(a, 2 * b), 2)],
        "cross_entropy_loss.default": [
            (real(a, b), index(b, a)), (real(a, b), index(b, a), None, 2), (real(a, b), index(b, a), None, 0),
            (real(a, b, c), index(b, a, c), None, 0), (real(a, b), index(b, a), None, 2, 1),
            (real(a, b), index(b, a), fixed(positive(b)), 1, 0, 0.25), (real(a, b), index(b, a), fixed(positive(b)), 2),
            (real(a, b), positive(a, b), None, 2, -100, 0.5), (real(b), index(b)), (real(a, b), positive(a, b)),
        ],
        "embedding.default": [
            (real(d, c), index(d, a, b)), (real(d, c), index(d, a)), (real(d, c), index(d, a, b), 1),
            (real(d, c), index(d, a, b), -1, True),
        ],
        "one_hot.default": [(index(4, a, b), 4)],
        "gather.default": [(x, 2, index(c, a, b, d)), (x, 1, index(b, a, b, c)), (x, -2, index(b, 1, b, c))],
        "index_select.default": [(x, 1, index(b, d)), (x, -1, index(c, d))],
        "index.Tensor": [
            (x, [index(a, d)]), (x, [None, index(b, d, 2)]), (x, [index(a, d, 1), index(b, 2)]),
            (x, [index(a, d), None, index(c, d)]), (real(a), [index(a, b, c)]), (x, [None, index(b, d), index(c, 1)]),
            (real(a, b, c, d), [None, index(b, 2), None, index(d, 2)]),
        ],
        "index_put.default": [
            (x, [None, index(b, d)], real(a, d, c), True), (x, [index(a, d)], real(b, c), True),
            (x, [None, index(b, d)], real(a, d, 1), True), (x, [index(a, d)], real(1, c), True),
            (x, [torch.arange(2), torch.arange(2)], real(2, c)), (x, [None, None, torch.arange(2)], real(2)),
            (x, [torch.arange(2), None, torch.arange(2)], real(2, b), False), (x, [torch.arange(a)], real()),
            (real(a, b, c, d), [None, torch.arange(2), None, torch.arange(2)], real(2, a, c)),
        ],
        "scatter.src": [(x, 1, permuted(b, a, c), real(a, b, c)), (x, -1, index(c, a, b, 1), real(a, b, 1))],
        "scatter.value": [(x, 1, index(b, a, 1, c), 2.0), (x, 0, index(a, a, b, c), -1)],
        "scatter_add.default": [(x, 1, index(b, a, b, c), real(a, b, c)), (x, 0, index(a, d, b, 1), real(d, b, 1))],
        "tril.default": [(x,), (real(a, b), -1)],
        "triu.default": [(x, 1), (x, {"diagonal": -1})],
        "arange.default": [(a,), (4.5,), (a, {"dtype": torch.float32, "device": "cpu", "pin_memory": False})],
        "arange.start": [(1, a), (0.5, 3), (1, 5, {"dtype": torch.int32})],
        "arange.start_step": [(1, a, 2), (4, 0, -1), (0, 1, 0.25)],
        "zeros.default": [
            ([a, b],), ([a], {"dtype": torch.int64}), ([], {"dtype": torch.bool, "layout": torch.strided}),
        ],
        "ones.default": [([a, b],), ([a, b], {"dtype": torch.bool})],
        "full.default": [
            ([a, b], 2.0), ([a], 2), ([a], True), ([], float("-inf")), ([a], 1, {"dtype": torch.bfloat16}),
        ],
        "eye.default": [(a,), (a, {"dtype": torch.float64})],
        "eye.m": [(a, b)],
        "empty.memory_format": [],
        "empty_like.default": [],
        "scalar_tensor.default": [(2.0,), (3,), (2.0, {"dtype": torch.bfloat16}), (3, {"dtype": torch.int64})],
        "new_zeros.default": [(x, [a, b]), (x, [a], {"dtype": torch.int64})],
        "new_ones.default": [(x, [a, b])],
        "new_full.default": [(x, [a, b], 2), (x, [], 0.5, {"dtype": torch.float32, "device": "cpu"})],
        "new_empty.default": [],
        "lift_fresh_copy.default": [(real(a),)],
        "histc.default": [(real(a, b), 4, -1, 1), (real(a), 5), (index(c, a, b).double(), c, 0, c)],
        "scaled_dot_product_attention.default": [
            (*causal, None, 0.0, True), (*causal, {"scale": 0.3}), (*causal, {"is_causal": True, "scale": 0.3}),
            (real(a, b, c, d), real(a, b, 6, d), real(a, b, 6, d)),
            (*causal, real(a, 1, c, c)), (*causal, flags(c, c).logical_or(torch.eye(c, dtype=torch.bool))),
            (real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d), None, 0.0, True, {"enable_gqa": True}),
            (real(b, c, d), real(b, c, d), real(b, c, d)),
        ],
    }  # fmt: skip
    return {f"aten.{name}": [_arguments(call) for call in found] for name, found in calls.items()} | {
        "nnscaler.dropout.default": [
            ((x, 0.5, DRAWS, PLACE, numbers_of(x.shape)), {}),
            ((x, 0.25, DRAWS, PLACE, numbers_of(x.shape[:2])), {}),  # all of a channel together
            ((real(b), 1.0, DRAWS, PLACE, numbers_of((b,))), {}),
        ],
        "attention": [
            ((real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d)), {}),
            ((real(a, b, c, d), real(a, b, 6, d), real(a, b, 6, d)), {"scale": 0.3, "is_causal": False}),
            ((real(a, b, c, d), real(a, b, c, d), real(a, b, c, 6), real(b)), {"window": (1, None)}),
            (
                (real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d), None, real(2 * b)),
                {"window": (2, 1), "is_causal": False, "softcap": 0.7},
            ),
            (
                (real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d), real(2 * b)),
                {"documents": index(2, a, c).sort(1).values, "softcap": 2.0},
            ),
            (
                (real(a, 2 * b, c, d), real(a, b, c, d), real(a, b, c, d)),
                {"dropout": 0.5, "draws": DRAWS, "place": PLACE, **_numbers_of_weights(a, 2 * b, c, c)},
            ),
        ],
        "average_over_copies": [((fixed(real(a, b)),), {}), ((fixed(real()),), {})],
        "experts": [
            (_mixed(a, b, d, real(b, 2, c, d), real(b, d, c)), _GATED),
            (_mixed(a, b, d, real(b, d, 2, c), real(b, c, d)), {**_GATED, "transposed": True}),
            (_mixed(a, b, d, real(b, d, 2 * c), real(b, c, d), real(b, 2 * c)), {**_CLAMPED, "transposed": True}),
            (_mixed(a, b, d, real(b, c, d), real(b, d, c)), _ACTIVATED),
        ],
    }


_GATED = {"gate": "transformers.integrations.moe:_default_apply_gate", "constants": {"act_fn": "silu"}}
_CLAMPED = {
    "gate": "transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts._apply_gate",
    "constants": {"alpha": 1.5, "limit": 2.0},
}
_ACTIVATED = {"gate": "nnscaler.models.experts:activate", "constants": {"act_fn": "gelu"}}


def _mixed(tokens: int, number: int, width: int, *weights: Tensor) -> tuple:
    """The arguments of experts of which each token has chosen two different ones."""
    chosen = torch.rand(tokens, number).argsort(1)[:, :2]
    return real(tokens, width), chosen, positive(*chosen.shape), *weights


def permuted(high: int, *around: int) -> Tensor:
    """Each of 0 .. high - 1 once along dimension 1, so that no two sources go to one place."""
    first, last = around
    return torch.rand(first, high, last).argsort(1)


def _arguments(call: tuple) -> tuple[tuple, dict]:
    return (call[:-1], call[-1]) if call and isinstance(call[-1], dict) else (call, {})


def known() -> list[str]:
    """Operators of the tables, without those that a test registers."""
    own = ("attention", "average_over_copies", "experts", "nnscaler.dropout.default")
    return [name for name in registry.names() if name.startswith("aten.") or name in own]
