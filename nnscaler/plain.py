"""A plain module of PyTorch that drops what the compiled one drops, so that the two can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from nnscaler.kernels.random import caller_of, draws_of, dropout, numbers_of, place_of

_BY_FEATURE = (F.dropout1d, F.dropout2d, F.dropout3d)


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

    It is for `F.dropout` and what calls it, such as `nn.Dropout`; and for `F.dropout1d`, `F.dropout2d`, `F.dropout3d`
    of batches. Other random numbers stay as they are. Backward must not run forward again (`torch.utils.checkpoint`).
    """
    mode = _Counted(module, seed, step, micro_batch)
    hooks = register_module_forward_pre_hook(mode.begin), register_module_forward_hook(mode.end, always_call=True)
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Counted(TorchFunctionMode):
    """Takes the calls of dropout. `open` has the modules that run, the innermost last."""

    def __init__(self, module: nn.Module, seed: int, step: int, micro_batch: int) -> None:
        super().__init__()
        self.draws = draws_of(seed, step, micro_batch)
        self.names = {id(part): name for name, part in module.named_modules()}
        self.open = [module]
        self.ordinals: Counter[str] = Counter()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.open.append(module)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        self.open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout or func in _BY_FEATURE:
            return self._drop(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _drop(self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not (training and p):
            return input
        caller = caller_of(self.names.get(id(self.open[-1]), ""), type(self.open[-1]).__name__)
        place = place_of(caller, self.ordinals[caller])
        self.ordinals[caller] += 1
        numbers = numbers_of(input.shape[:2] if func in _BY_FEATURE else input.shape, input.device)
        return dropout(input, p, self.draws.to(input.device), place.to(input.device), numbers)
