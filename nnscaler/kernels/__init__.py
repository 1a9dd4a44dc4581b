"""Operators and gradients on the device: the fastest way that it has, and a plain way that works anywhere."""

from nnscaler.kernels.attention import KERNELS, attend, attend_to_prefix
from nnscaler.kernels.gradient import add_gradient, add_product, rounded_in_place, scale_gradient
from nnscaler.kernels.loss import softmax_loss
from nnscaler.kernels.products import are_slow, widen_slow_products

__all__ = [
    "KERNELS", "add_gradient", "add_product", "are_slow", "attend", "attend_to_prefix", "rounded_in_place",
    "scale_gradient", "softmax_loss", "widen_slow_products",
]  # fmt: skip
