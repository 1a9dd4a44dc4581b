"""Loops over calls of a block in generated code: over single calls, and over groups of them.

The calls differ in the module whose parameters they use. Numbered modules, such as `layers.0` and `layers.1`, are
counted; others are listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nnscaler.graph import Call

VARIABLES = ("i", "first", "prefix", "prefixes")  # of the loops


class Groups(NamedTuple):
    """A loop over groups of calls, each of which a function runs in a loop of its own.

    head       the line `for ...:`; empty where there is one group
    given      the expression that tells the function which group it runs
    parameter  what that is called in the function
    inner      the line `for ...:` in the function
    prefix     the expression, in this loop, of the prefix of parameters' names
    """

    head: str
    given: str
    parameter: str
    inner: str
    prefix: str


def over_calls(calls: Sequence[Call], names: Mapping[str, str]) -> tuple[str, str]:
    """The line `for ...:` over calls, empty for one call; and the expression of the prefix of parameters' names.

    names  what each of VARIABLES is called
    """
    if len(calls) == 1:
        return "", _prefix(calls[0])
    numbered = _numbered(calls)
    if numbered is None:
        return f"for {names['prefix']} in {_prefixes(calls)}:", names["prefix"]
    stem, start = numbered
    bounds = f"{len(calls)}" if start == 0 else f"{start}, {start + len(calls)}"
    return f"for {names['i']} in range({bounds}):", f'f"{stem}.{{{names["i"]}}}."'


def over_groups(calls: Sequence[Call], size: int, names: Mapping[str, str]) -> Groups:
    """The loop over groups of `size` calls. `names`: as for `over_calls`"""
    several = len(calls) > size
    numbered = _numbered(calls)
    if numbered is None:
        variable = names["prefixes"]
        groups = [_prefixes(calls[start : start + size]) for start in range(0, len(calls), size)]
        head, given = f"for {variable} in ({', '.join(groups)}):", groups[0]
        inner, prefix = f"for {names['prefix']} in {variable}:", names["prefix"]
    else:
        variable, number, (stem, start) = names["first"], names["i"], numbered
        head, given = f"for {variable} in range({start}, {start + len(calls)}, {size}):", f"{start}"
        inner, prefix = f"for {number} in range({variable}, {variable} + {size}):", f'f"{stem}.{{{number}}}."'
    return Groups(head if several else "", variable if several else given, variable, inner, prefix)


def _prefix(call: Call) -> str:
    return f'"{call.module}."'


def _prefixes(calls: Sequence[Call]) -> str:
    return f"({', '.join(map(_prefix, calls))})"


def _numbered(calls: Sequence[Call]) -> tuple[str, int] | None:
    """(what the paths of the calls' modules begin with, the first number), if these are counted."""
    stem, _, first = calls[0].module.rpartition(".")
    start = int(first) if first.isdecimal() else 0
    counted = [f"{stem}.{start + index}" for index in range(len(calls))]
    return (stem, start) if [call.module for call in calls] == counted else None
