"""What runs inside registered operators: the fastest way that the device has, and a plain way that works anywhere."""

from nnscaler.kernels.attention import KERNELS, attend, attend_to_prefix
from nnscaler.kernels.loss import softmax_loss

__all__ = ["KERNELS", "attend", "attend_to_prefix", "softmax_loss"]
