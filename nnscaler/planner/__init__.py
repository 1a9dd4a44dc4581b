"""From a graph to the best plan that fits."""

from nnscaler.planner.search import find_plan

__all__ = ["find_plan"]
