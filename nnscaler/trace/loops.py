"""Forwards that loop, over tokens say, are refused before each round is traced, planned and written as operators of its
own, which never ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from nnscaler.errors import UserError

MOST = 2000  # calls of torch in one call of a module, beside those of the modules inside it


class Loops:
    """Counts the calls of torch that each call of a module makes, by lines."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._running: list[tuple[nn.Module, Counter[str]]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, calls of modules are known."""

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append((module, Counter()))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self._running.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, line: str) -> None:
        """Counts a call at this line of the model's code. Raises UserError where there are too many."""
        if not self._running:
            return
        module, lines = self._running[-1]
        lines[line] += 1
        if lines.total() > MOST:
            where, times = lines.most_common(1)[0]
            raise UserError(
                f"forward of {type(module).__name__} '{self._paths.get(id(module), '')}' calls torch more than {MOST} "
                f"times, {times} of them at {where}: a loop, over tokens say, is too long to be planned round by "
                "round; put it into a function, and register it with nnscaler.register_op"
            )
