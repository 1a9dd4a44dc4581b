"""How an operator call is written in Python: `F.linear(x, w)` rather than `torch.ops.aten.linear.default(x, w)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnscaler.graph import Ref, format_argument, format_arguments

_INFIX = {"add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/"}
_WHOLE = 2**63 - 1  # the end of a slice that runs to the end


def spell(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The call of an ATen overload. Tensor arguments are `Ref`s that already carry the names to write."""
    name = op.removeprefix("aten.")
    if name in _INFIX and len(args) == 2 and not kwargs:
        return f"{format_argument(args[0])} {_INFIX[name]} {format_argument(args[1])}"
    if name in _SPECIAL:
        return _SPECIAL[name](*args, **kwargs)
    plain = name.split(".")[0]
    if args and hasattr(torch.Tensor, plain) and not isinstance(args[0], (list, tuple)):
        return f"{format_argument(args[0])}.{plain}({_arguments(args[1:], kwargs)})"
    if hasattr(torch, plain):
        return f"torch.{plain}({_arguments(args, kwargs)})"
    return f"torch.ops.{op}({_arguments(args, kwargs)})"


def _arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    return format_arguments(args, {**kwargs, "device": Ref("device")} if "device" in kwargs else kwargs)


def _functional(name: str, order: Sequence[int] | None = None) -> Callable[..., str]:
    def write(*args: Any, **kwargs: Any) -> str:
        ordered = args if order is None else [*(args[i] for i in order), *args[len(order) :]]
        return f"F.{name}({_arguments(ordered, kwargs)})"

    return write


def _reshape(x: Any, shape: Sequence[int]) -> str:
    return f"{x}.reshape({', '.join(map(str, shape))})"


def _expand(x: Any, shape: Sequence[int]) -> str:
    return f"{x}.expand({', '.join(map(str, shape))})"


def _permute(x: Any, dims: Sequence[int]) -> str:
    return f"{x}.permute({', '.join(map(str, dims))})"


def _slice(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> str:
    begin = "" if not start else str(start)
    stop = "" if end is None or end == _WHOLE else str(end)
    stride = "" if step == 1 else f":{step}"
    lead = ":, " * dim if dim >= 0 else "..., "
    trail = ", :" * (-dim - 1) if dim < 0 else ""
    return f"{x}[{lead}{begin}:{stop}{stride}{trail}]"


def _to(x: Any, *args: Any, **kwargs: Any) -> str:
    dtype = next((item for item in (*args, kwargs.get("dtype")) if isinstance(item, torch.dtype)), None)
    return f"{x}.to({dtype})" if dtype is not None else f"{x}"


def _split(x: Any, size: Any, dim: int = 0) -> str:
    return f"{x}.split({format_argument(size)}, dim={dim})"


def _factory(name: str) -> Callable[..., str]:
    def write(*args: Any, **kwargs: Any) -> str:
        dropped = ("pin_memory", "layout", "device")
        kept = {key: value for key, value in kwargs.items() if value is not None and key not in dropped}
        return f"torch.{name}({_arguments(args, {**kept, 'device': None})})"

    return write


_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


def _cross_entropy(
    x: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0
) -> str:
    extra = f", weight={weight}" if weight is not None else ""
    extra += f", label_smoothing={label_smoothing}" if label_smoothing else ""
    return f'F.cross_entropy({x}, {target}, ignore_index={ignore_index}, reduction="{_REDUCTIONS[reduction]}"{extra})'


_SPECIAL: dict[str, Callable[..., str]] = {
    "linear.default": _functional("linear"),
    "embedding.default": lambda weight, tokens, *rest: f"F.embedding({tokens}, {weight})",
    "silu.default": _functional("silu"),
    "gelu.default": _functional("gelu"),
    "mish.default": _functional("mish"),
    "hardswish.default": _functional("hardswish"),
    "leaky_relu.default": _functional("leaky_relu"),
    "elu.default": _functional("elu"),
    "softplus.default": _functional("softplus"),
    "layer_norm.default": _functional("layer_norm"),
    "rms_norm.default": _functional("rms_norm"),
    "scaled_dot_product_attention.default": _functional("scaled_dot_product_attention"),
    "cross_entropy_loss.default": _cross_entropy,
    "view.default": _reshape,
    "reshape.default": _reshape,
    "_unsafe_view.default": _reshape,
    "flatten.using_ints": _reshape,
    "unflatten.int": _reshape,
    "squeeze.default": _reshape,
    "squeeze.dim": _reshape,
    "squeeze.dims": _reshape,
    "expand.default": _expand,
    "permute.default": _permute,
    "slice.Tensor": _slice,
    "split.Tensor": _split,
    "split.sizes": _split,
    "split_with_sizes.default": _split,
    "to.dtype": _to,
    "to.device": _to,
    "to.dtype_layout": _to,
    "_to_copy.default": _to,
    **{f"arange.{overload}": _factory("arange") for overload in ("default", "start", "start_step")},
    "zeros.default": _factory("zeros"),
    "ones.default": _factory("ones"),
    "full.default": _factory("full"),
    "empty.memory_format": _factory("empty"),
    "scalar_tensor.default": _factory("scalar_tensor"),
}
