"""Gradients of weights that wait until backward has got all gradients that another stage of a pipeline needs.

A zero-bubble schedule runs backward of a micro-batch in two parts. The first computes the gradient of the stage's
input, which the stage before it waits for. The second can come when the rank has nothing else to do: it computes the
gradients of the weights of products (see `nnscaler.kernels.later`). From one part to the other each product holds what
it multiplied, and the gradient of its result. All other gradients come in the first part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnscaler.kernels.later import Weight, weight_gradient

Take = Callable[[Tensor, Tensor], None]  # take(parameter, its gradient)


class Later:
    """The gradients of one stage's weights that are still to be computed.

    waits  whether a backward that runs now leaves them for later
    """

    def __init__(self, take: Take) -> None:
        self.waits = False
        self._take = take
        self._left: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    def weight(self, parameter: Tensor, x: Sequence[int], y: Sequence[int]) -> Weight:
        """A weight for `nnscaler.kernels.later.linear`, for one product. `x`, `y`: the shapes of what it multiplies,
        and of its result"""
        return Weight(parameter.detach(), *_Places.apply(parameter, self, tuple(x), tuple(y)))

    def leave(self, parameter: Tensor, x: Tensor, dy: Tensor) -> None:
        """Leaves the gradient of a weight for later."""
        self._left.append((parameter, x, dy))

    def rest(self) -> Callable[[], None]:
        """What the backward left that has just run: a function that computes it."""
        left, self._left = self._left, deque()

        @torch.no_grad()
        def run() -> None:
            while left:
                parameter, x, dy = left.popleft()
                self._take(parameter, weight_gradient(x, dy))

        return run


class _Places(torch.autograd.Function):
    """The places of a `Weight`. Their gradients are what the weight's is computed from."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, later: Later, x: tuple[int, ...], y: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.parameter, ctx.later = parameter, later
        ctx.set_materialize_grads(False)
        nothing = parameter.new_zeros(())
        return nothing.expand(x), nothing.expand(y)

    @staticmethod
    def backward(ctx: Any, x: Tensor | None, dy: Tensor | None) -> tuple[Any, ...]:
        if x is None or dy is None:  # nothing that is trained depends on the product
            return None, None, None, None
        if not ctx.later.waits:
            return weight_gradient(x, dy), None, None, None
        ctx.later.leave(ctx.parameter, x, dy)
        return None, None, None, None
