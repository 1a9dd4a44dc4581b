"""Imports that cost little: of a package's names, when they are first asked for, so that what needs no torch waits for
none; and of large libraries, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names come from these modules: name -> module."""

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(modules[name]), name)

    return find


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, what is made stays for the process's life, such as modules: the garbage collector looks for none there,
    now or later. torch and transformers make a million objects, among which it spends a quarter of their import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
