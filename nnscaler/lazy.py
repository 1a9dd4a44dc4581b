"""Imports that cost little.

A package's names are imported when they are first asked for, so that what needs no torch does not wait for it. Large
libraries are imported without the garbage collector.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package. `modules`: public name -> the module that has it"""

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(modules[name]), name)

    return find


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, the garbage collector does not run; and what is made inside is never looked at by it.

    torch and transformers make a million objects when they are imported, and all stay. Looking for garbage among them
    takes a quarter of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Inside, the garbage collector runs after 50,000 new objects, not 700.

    A compile makes millions of objects, of which few are garbage that only the collector finds.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
