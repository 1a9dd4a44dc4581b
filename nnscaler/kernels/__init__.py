"""Operators and gradients on the device: the fastest way that it has, and a plain way that works anywhere."""

from nnscaler.kernels.attention import KERNELS, Asked, Dropped, attend, check_kernel
from nnscaler.kernels.documents import Documents, note_copy
from nnscaler.kernels.experts import counting, gate_named, kept_bytes, mix, note_choice, sum_of_rows
from nnscaler.kernels.gradient import add_gradient, add_product, rounded_in_place, scale_gradient
from nnscaler.kernels.loss import softmax_loss
from nnscaler.kernels.products import are_slow, widen_slow_products

__all__ = [
    "KERNELS",
    "Asked",
    "Documents",
    "Dropped",
    "add_gradient",
    "add_product",
    "are_slow",
    "attend",
    "check_kernel",
    "counting",
    "gate_named",
    "kept_bytes",
    "mix",
    "note_choice",
    "note_copy",
    "rounded_in_place",
    "scale_gradient",
    "softmax_loss",
    "sum_of_rows",
    "widen_slow_products",
]  # fmt: skip
