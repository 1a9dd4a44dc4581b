"""From a model to its Graph."""

from nnscaler.trace.meta import build_on_meta
from nnscaler.trace.strategies import STRATEGIES, find_strategy
from nnscaler.trace.tracer import trace

__all__ = ["STRATEGIES", "build_on_meta", "find_strategy", "trace"]
