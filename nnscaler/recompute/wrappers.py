"""Running a function so that backward computes some of it again, rather than keep it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
}

# Where it compiles, torch 2.11 keeps what an autograd.Function computes, unless it is told by a policy.
_COMPILES_AS_TOLD = TorchVersion(torch.__version__) >= "2.13"


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which only `args` are kept. Backward runs `function` again."""
    if torch.compiler.is_compiling() and not _COMPILES_AS_TOLD:
        return _keeping(_nothing, function, *args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _nothing(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def keeping_products(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which `args` and the results of matrix products (mm, addmm, bmm, those in fp8) are kept.

    Backward runs the rest again.
    """

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return _keeping(policy, function, *args)


def _keeping(policy: Callable[..., CheckpointPolicy], function: Callable[..., Any], *args: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
