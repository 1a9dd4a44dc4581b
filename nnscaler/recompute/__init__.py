"""Recompute levels: how much of a block's call is kept for backward, and what backward computes again."""

from nnscaler.recompute.keeping import Keeping
from nnscaler.recompute.levels import (
    IN_GROUPS,
    KEEPS_ALL,
    KEEPS_PRODUCTS,
    LEVELS,
    ON_DEVICE,
    ON_HOST,
    RECOMPUTES_ALL,
    RECOMPUTES_ALL_BUT_ATTENTION,
    SAME_ON_HOST,
    Level,
    level_of,
    rank,
    recomputes,
)

__all__ = [
    "IN_GROUPS",
    "KEEPS_ALL",
    "KEEPS_PRODUCTS",
    "LEVELS",
    "ON_DEVICE",
    "ON_HOST",
    "RECOMPUTES_ALL",
    "RECOMPUTES_ALL_BUT_ATTENTION",
    "SAME_ON_HOST",
    "Keeping",
    "Level",
    "level_of",
    "rank",
    "recomputes",
]
