"""Finding out on a device which of some kernels is the fastest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnscaler.kernels.attention.asked import Asked
from nnscaler.kernels.attention.libraries import Run, sdpa
from nnscaler.kernels.attention.rows import attend_by_rows
from nnscaler.kernels.documents import Documents

logger = logging.getLogger(__name__)

TIMED = 8192  # tokens: long enough that the kernels' order is that of longer sequences
TIMED_HEADS = 32  # so that it is not the order of how fast they are launched; a call may be of a few heads at a time
COMPARED = 1024  # tokens whose results are compared with those in fp32


@dataclass(frozen=True)
class Kind:
    """Calls for which the same kernel is the fastest.

    length                    tokens of query and keys
    heads, shared             heads of the query; heads of keys and values
    size, value_size          of a head of query and keys; of a head of values
    sinks, slopes, documents  whether the call has these
    """

    device: torch.device
    dtype: torch.dtype
    length: int
    heads: int
    shared: int
    size: int
    value_size: int
    left: int | None
    right: int | None
    softcap: float | None
    sinks: bool
    slopes: bool
    documents: bool

    def tensors(self) -> list[Tensor]:
        """Random query, key, value [1, l, heads, size] and gradient of the result."""
        generator = torch.Generator(self.device).manual_seed(0)
        sizes = [(self.heads, self.size), (self.shared, self.size), (self.shared, self.value_size)]
        return [
            torch.randn((1, self.length, *size), dtype=self.dtype, device=self.device, generator=generator)
            for size in [*sizes, (self.heads, self.value_size)]
        ]

    def timed(self) -> Kind:
        """The same with at least TIMED_HEADS heads."""
        times = -(-TIMED_HEADS // self.heads)
        return replace(self, heads=times * self.heads, shared=times * self.shared)

    def asked(self) -> Asked:
        ramp = torch.linspace(0.1, 1, self.heads, device=self.device)
        thirds = torch.arange(self.length, device=self.device).unsqueeze(0) * 3 // self.length
        return Asked(
            self.size**-0.5, 0, self.left, self.right, self.softcap,
            ramp.to(self.dtype).requires_grad_() if self.sinks else None, ramp if self.slopes else None,
            Documents(thirds) if self.documents else None,
        )  # fmt: skip


def kind_of(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Kind:
    """The kind of a call: query [b, l, h, d], key [b, s, k, d], value [b, s, k, e]."""
    return Kind(
        query.device, query.dtype, min(key.shape[1], TIMED), query.shape[2], key.shape[2], query.shape[3],
        value.shape[3], asked.left, asked.right, asked.softcap, asked.sinks is not None, asked.slopes is not None,
        asked.documents is not None,
    )  # fmt: skip


def fastest(kind: Kind, kernels: Mapping[str, Callable[[], Run]]) -> str | None:
    """The kernel that takes least time for forward and backward of one sequence. None: none of them works.

    Only kernels count that work and are right: their results must be as near to those in fp32 as twice the distance of
    plain SDPA, in a call without options.
    """
    short = replace(
        kind, length=min(kind.length, COMPARED), left=_within(kind.left, COMPARED), right=_within(kind.right, COMPARED)
    )
    plain = replace(short, left=None, right=0, softcap=None, sinks=False, slopes=False, documents=False)
    allowed = 2 * _error(sdpa(), plain) + 1e-3
    seconds: dict[str, float] = {}
    for name, load in kernels.items():
        try:
            run = load()
            error = _error(run, short)
            if error > allowed:
                logger.warning("attention kernel %s is wrong by %.2g here: not used", name, error)
                continue
            seconds[name] = _time(run, kind.timed())
        except (ImportError, AttributeError, RuntimeError, AssertionError, TypeError) as error:
            logger.debug("attention kernel %s does not work here: %s", name, error)
    if not seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    logger.info(
        "attention by %s (forward and backward of %d tokens, %d heads: %s)", best, kind.length, kind.timed().heads,
        ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in sorted(seconds.items())),
    )  # fmt: skip
    return best


def _within(side: int | None, length: int) -> int | None:
    """A side of a window, if it hides some of so many tokens; else None."""
    return side if not side else min(side, length // 4)


def _results(run: Run, asked: Asked, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    wanted = inputs if asked.sinks is None else [*inputs, asked.sinks]
    with torch.enable_grad():
        out = run(inputs[0], inputs[1], inputs[2], asked)
        return [out.detach(), *torch.autograd.grad(out, wanted, gradient.to(out.dtype))]


def _error(run: Run, kind: Kind) -> float:
    """The largest relative difference, of result and gradients, from those in fp32."""
    *inputs, gradient = kind.tensors()
    found = _results(run, kind.asked(), [x.requires_grad_() for x in inputs], gradient)
    asked = kind.asked()
    if asked.sinks is not None:
        asked = replace(asked, sinks=asked.sinks.detach().float().requires_grad_())
    exact = _results(attend_by_rows, asked, [x.detach().float().requires_grad_() for x in inputs], gradient)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact))


def _time(run: Run, kind: Kind, runs: int = 3) -> float:
    *inputs, gradient = kind.tensors()
    inputs, asked = [x.requires_grad_() for x in inputs], kind.asked()
    _results(run, asked, inputs, gradient)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(runs):
        _results(run, asked, inputs, gradient)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / runs
