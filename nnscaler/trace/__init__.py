"""From a model to its Graph."""

from nnscaler.trace.meta import build_on_meta
from nnscaler.trace.tracer import STRATEGIES, trace

__all__ = ["STRATEGIES", "build_on_meta", "trace"]
