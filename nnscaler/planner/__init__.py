"""The planner: from a graph to the fastest plan that fits into memory."""

from nnscaler.planner.refusal import NothingFits
from nnscaler.planner.search import SEARCH_SECONDS, find_plan

__all__ = ["SEARCH_SECONDS", "NothingFits", "find_plan"]
