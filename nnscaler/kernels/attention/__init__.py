"""Attention: what a call may ask for, the kernels of several libraries, and which of them computes it on a device."""

from nnscaler.kernels.attention.asked import Asked, Dropped
from nnscaler.kernels.attention.choice import KERNELS, attend, check_kernel

__all__ = ["KERNELS", "Asked", "Dropped", "attend", "check_kernel"]
