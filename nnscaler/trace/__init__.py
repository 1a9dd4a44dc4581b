"""Tracing: from a model and example inputs to a `Graph`, by `torch.export` on fake tensors (shapes without memory)."""

from typing import TYPE_CHECKING

from nnscaler.lazy import lazily

if TYPE_CHECKING:
    from nnscaler.trace.fp8 import allow_fp8
    from nnscaler.trace.meta import build_on_meta
    from nnscaler.trace.strategies import STRATEGIES, find_strategy
    from nnscaler.trace.tracer import observed, trace

__all__ = ["STRATEGIES", "allow_fp8", "build_on_meta", "find_strategy", "observed", "trace"]

__getattr__ = lazily(
    __name__,
    {
        "STRATEGIES": "nnscaler.trace.strategies",
        "allow_fp8": "nnscaler.trace.fp8",
        "build_on_meta": "nnscaler.trace.meta",
        "find_strategy": "nnscaler.trace.strategies",
        "observed": "nnscaler.trace.tracer",
        "trace": "nnscaler.trace.tracer",
    },
)
