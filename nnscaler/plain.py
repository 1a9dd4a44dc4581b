"""A plain module of PyTorch that drops what the compiled one drops, so that the two can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from nnscaler.kernels.random import caller_of, draws_of, dropout, numbers_of, place_of
from nnscaler.kernels.written_out import written_out


@contextmanager
def same_dropout(module: nn.Module, seed: int, step: int, micro_batch: int = 0) -> Iterator[None]:
    """Inside, one forward of a module drops the elements that the compiled module drops.

    A plain loop on one device is then the same as a parallel run, to rounding:

        for step in range(steps):
            for number, batch in enumerate(batches(step)):
                with nnscaler.same_dropout(model, seed, step, number):
                    loss = model(**batch)
                loss.backward()

    module       what was compiled; a part of it may be called
    seed         that of the run
    step         counted from 0
    micro_batch  number of the micro-batch in the step: micro-batch m of copy r is m * copies + r

    It is for `dropout` of `torch.nn.functional` and what calls it, such as `nn.Dropout`; for `dropout1d`, `dropout2d`
    and `dropout3d` of batches; and for `scaled_dot_product_attention`. They must be looked up there when they are
    called. Other random numbers stay as they are. Backward must not run forward again (`torch.utils.checkpoint`).
    """
    counted = _Counted(module, seed, step, micro_batch)
    hooks = register_module_forward_pre_hook(counted.begin), register_module_forward_hook(counted.end, always_call=True)
    functions = counted.functions()
    own = {name: getattr(F, name) for name in functions}
    vars(F).update(functions)
    try:
        yield
    finally:
        vars(F).update(own)
        for hook in hooks:
            hook.remove()


class _Counted:
    """Stands in for the functions of `torch.nn.functional` that drop. `open` has the modules that run, the innermost
    last."""

    def __init__(self, module: nn.Module, seed: int, step: int, micro_batch: int) -> None:
        self.draws = draws_of(seed, step, micro_batch)
        self.names = {id(part): name for name, part in module.named_modules()}
        self.open = [module]
        self.ordinals: Counter[str] = Counter()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.open.append(module)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        self.open.pop()

    def functions(self) -> dict[str, Callable[..., Tensor]]:
        by_feature = dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), partial(self._drop, apart=2))
        attention = partial(self._attend, F.scaled_dot_product_attention)
        return {"dropout": self._drop, **by_feature, "scaled_dot_product_attention": attention}

    def _drop(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, apart: int | None = None
    ) -> Tensor:
        """apart: along how many of the first dimensions elements are dropped apart; None: all"""
        if not (training and p):
            return input
        caller = caller_of(self.names.get(id(self.open[-1]), ""), type(self.open[-1]).__name__)
        place = place_of(caller, self.ordinals[caller])
        self.ordinals[caller] += 1
        numbers = numbers_of(input.shape[:apart], input.device)
        return dropout(input, p, self.draws.to(input.device), place.to(input.device), numbers)

    def _attend(
        self, own: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not dropout_p:
            return own(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        drop = partial(self._drop, p=dropout_p)
        return written_out(query, key, value, attn_mask, is_causal, scale, enable_gqa, drop)
