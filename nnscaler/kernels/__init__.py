"""Operators and gradients on the device: the fastest way that it has, and a plain way that works anywhere."""

from nnscaler.kernels.attention import KERNELS, attend, attend_to_prefix
from nnscaler.kernels.gradient import add_gradient, scale_gradient
from nnscaler.kernels.loss import softmax_loss

__all__ = ["KERNELS", "add_gradient", "attend", "attend_to_prefix", "scale_gradient", "softmax_loss"]
