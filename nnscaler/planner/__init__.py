"""The planner: from a graph to the fastest plan that fits into memory."""

from nnscaler.planner.refusal import NotFaster, NothingFits
from nnscaler.planner.search import SEARCH_SECONDS, find_plan, least_step

__all__ = ["SEARCH_SECONDS", "NotFaster", "NothingFits", "find_plan", "least_step"]
