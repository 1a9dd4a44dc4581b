"""Recomputation in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, keeping only `args` for backward, which runs `function` again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
