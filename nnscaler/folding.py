"""Folds texts that differ only by numbers that count up into a loop, for people to read.

a_1 = f(a_0)
a_2 = f(a_1)                        for i in 1..3:
a_3 = f(a_2)           becomes          a_{i} = f(a_{i-1})
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import indent

FEWEST = 3  # rounds that make a loop
LONGEST = 8  # texts in one round

Template = list[str | tuple[int, int]]  # pieces of text that stay, and numbers: (first value, step from round to round)


def folded(texts: Sequence[str]) -> Iterator[str]:
    """The texts, in order, where those that repeat with evenly rising numbers become one loop.

    A round of the loop may consist of several texts, such as layers of two kinds that take turns.
    """
    at = 0
    while at < len(texts):
        rounds, period = max((_rounds(texts, at, period), -period) for period in range(1, LONGEST + 1))
        if rounds < FEWEST:
            yield texts[at]
            at += 1
        else:
            period = -period
            yield _loop([_template(texts[at + i], texts[at + i + period]) for i in range(period)], rounds)
            at += rounds * period


def _rounds(texts: Sequence[str], at: int, period: int) -> int:
    """How many rounds of `period` texts begin at index `at`."""
    first = texts[at : at + period]
    second = texts[at + period : at + 2 * period]
    if len(second) < period:
        return 1
    templates = [_template(one, other) for one, other in zip(first, second)]
    count = 1
    while True:
        begin = at + count * period
        wanted = [_filled(template, count) for template in templates]
        if list(texts[begin : begin + period]) != wanted or not any(_numbers(template) for template in templates):
            return count
        count += 1


def _template(first: str, second: str) -> Template:
    """The first text, with the numbers marked that differ in the second; empty where more than numbers differs."""
    pieces, others = re.split(r"(\d+)", first), re.split(r"(\d+)", second)
    if pieces[::2] != others[::2]:
        return []
    return [
        (int(piece), int(other) - int(piece)) if index % 2 and piece != other else piece
        for index, (piece, other) in enumerate(zip(pieces, others))
    ]


def _filled(template: Template, count: int) -> str:
    return "".join(part if isinstance(part, str) else str(part[0] + count * part[1]) for part in template)


def _numbers(template: Template) -> list[tuple[int, int]]:
    return [part for part in template if not isinstance(part, str)]


def _loop(templates: list[Template], rounds: int) -> str:
    numbers = [number for template in templates for number in _numbers(template)]
    start = numbers[0][0] if {step for _, step in numbers} == {1} else 0  # so that the first number is i itself
    body = "\n".join(
        "".join(part if isinstance(part, str) else _counted(part[0] - start * part[1], part[1]) for part in template)
        for template in templates
    )
    return f"for i in {start}..{start + rounds - 1}:\n{indent(body, '    ')}"


def _counted(at_zero: int, step: int) -> str:
    """A number of the loop as text: `{i}`, `{i-1}` or `{2i+1}`."""
    counter = "i" if step == 1 else f"{step}i"
    return f"{{{counter}{at_zero:+d}}}" if at_zero else f"{{{counter}}}"
