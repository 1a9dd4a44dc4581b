"""What a product in fp8 costs a device, see `nnscaler.kernels.fp8`.

    y = x W^T, with x [m, k], W [n, k]    products: 2 m n k operations each, at the device's rate in e4m3
    forward     one product; x is rounded, once for all products that take it, and W
    backward    one product for each of x and W that has a gradient; dy is rounded, and for dx also W again
                (where W has been gathered in fp8, it is rounded nowhere; for dx, that is transposed)
    kept        x in e4m3, m k bytes, and no x, where W has a gradient; where regions are compiled, that is made again
                from what else the region keeps, if there is such (see `nnscaler.recompute.keeping`), but for x that was
                brought from other devices

To round a tensor is to read it for its largest element, and once more to write it in one or two orders, a byte an
element each. W's largest element is known: it is found once a step, which is not counted.
(Where W is gathered in its own type, it is found for each call; that is not counted either.)

The rate is one for all products of a step: that of a whole layer, measured. By themselves, on H100, they reach 0.69 of
the peak in forward, 0.59 in backward, where sums are kept in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnscaler.graph import Block, Node, TensorMeta
from nnscaler.hardware import Hardware
from nnscaler.kernels.fp8 import ALIGNED, E4M3

EFFICIENCY = "fp8"  # its name among the hardware's efficiencies


@dataclass(frozen=True)
class Fp8Product:
    """A product in fp8 of local x [m, k] and W [n, k].

    itemsize      bytes of an element of x, W and y
    takers        how many products take x
    trains_x, trains_w  whether x and W have gradients
    """

    m: int
    k: int
    n: int
    itemsize: int
    takers: int
    trains_x: bool
    trains_w: bool

    @property
    def held(self) -> int:
        """Most bytes of rounded tensors that are held inside forward or backward."""
        x, weight, y = self.m * self.k, self.n * self.k, self.m * self.n
        return max(2 * x + weight, 2 * y + weight)

    def forward(self, hardware: Hardware) -> float:
        """Seconds."""
        weight = self._rounding(hardware, self.n * self.k, orders=1, reads=1)
        return self._product(hardware, self.m, self.k, self.n) + self.of_x(hardware) / self.takers + weight

    def backward(self, hardware: Hardware) -> float:
        """Seconds; 0 where nothing has a gradient."""
        if not (self.trains_x or self.trains_w):
            return 0.0
        seconds = self._rounding(hardware, self.m * self.n, orders=2)
        if self.trains_x:
            seconds += self._rounding(hardware, self.n * self.k, orders=1, reads=1)
            seconds += self._product(hardware, self.m, self.n, self.k)
        return seconds + (self._product(hardware, self.n, self.m, self.k) if self.trains_w else 0.0)

    def of_x(self, hardware: Hardware) -> float:
        """Seconds in which x is rounded."""
        return self._rounding(hardware, self.m * self.k, orders=2)

    def of_weight(self, hardware: Hardware) -> tuple[float, float]:
        """Seconds of forward and of backward in which W is rounded, over those that it takes where it comes in fp8."""
        elements = self.n * self.k
        transposed = elements * (self.itemsize - E4M3.itemsize) / hardware.memory_bandwidth
        return self._rounding(hardware, elements, orders=1, reads=1), transposed if self.trains_x else 0.0

    def _rounding(self, hardware: Hardware, elements: int, orders: int, reads: int = 2) -> float:
        moved = elements * (reads * self.itemsize + orders)
        return reads * hardware.launch + moved / hardware.memory_bandwidth

    def _product(self, hardware: Hardware, m: int, k: int, n: int) -> float:
        arithmetic = 2.0 * m * k * n / hardware.flops_per_second(EFFICIENCY, E4M3)
        moved = m * k + n * k + m * n * self.itemsize
        return hardware.launch + max(arithmetic, moved / hardware.memory_bandwidth)


def fp8_product(node: Node, inputs: Sequence[TensorMeta], block: Block, hardware: Hardware) -> Fp8Product | None:
    """A node on these local inputs as a product in fp8; None where it may not be one, or the device has none.

    The device wants every size to be a multiple of ALIGNED.
    """
    if not node.may_be_fp8 or not hardware.multiplies(E4M3):
        return None
    x, weight = inputs[:2]
    n, k = weight.shape
    m = x.numel // k
    if any(size % ALIGNED for size in (m, k, n)):
        return None
    takers = sum(other.may_be_fp8 and other.inputs[0] == node.inputs[0] for other in block.nodes)
    return Fp8Product(m, k, n, x.dtype.itemsize, takers, x.requires_grad, weight.requires_grad)
