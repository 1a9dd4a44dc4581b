"""Regions of generated code: computation without communication, compiled on accelerators, recomputed as planned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Gradients that come with the strides of the outputs that they belong to are taken as they are. As torch 2.13 has it by
# default; 2.11 copies those of attention's inputs, which are transposed.
torch._functorch.config.guess_tangent_strides_as_outputs = True

# What level `cheap` keeps: the results of products.
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, keeping only `args` for backward, which runs `function` again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def region(function: Callable[..., Any]) -> Callable[..., Any]:
    """A region as `call(keep, *args)`, where `keep` is the recompute level: none, cheap or compute.

    On an accelerator it is compiled, once for each level.
    """
    plain: dict[str, Callable[..., Any]] = {
        "none": function,
        "cheap": functools.partial(_keeping_products, function),
        "compute": functools.partial(recompute, function),
    }
    compiled: dict[str, Callable[..., Any]] = {}

    @functools.wraps(function)
    def call(keep: str, *args: Any) -> Any:
        if not _on_accelerator(args):
            return plain[keep](*args)
        if keep not in compiled:
            compiled[keep] = torch.compile(plain[keep], dynamic=False, fullgraph=True)
        return compiled[keep](*args)

    return call


def _on_accelerator(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)


def _keeping_products(function: Callable[..., Any], *args: Any) -> Any:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
