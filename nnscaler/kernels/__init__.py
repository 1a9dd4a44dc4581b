"""What runs inside registered operators: the fastest way that the device has, and a plain way that works anywhere."""

from nnscaler.kernels.attention import KERNELS, attend, attend_to_prefix
from nnscaler.kernels.gradient import add_gradient
from nnscaler.kernels.loss import scale_gradient, softmax_loss

__all__ = ["KERNELS", "add_gradient", "attend", "attend_to_prefix", "scale_gradient", "softmax_loss"]
