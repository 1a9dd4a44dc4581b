"""Sending many small pieces through a few threads, in order and within bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from nnscaler.data.sources import Corpus

Item = TypeVar("Item")
Result = TypeVar("Result")


def groups(items: Iterable[Item], weight: Callable[[Item], int], least: int) -> Iterator[list[Item]]:
    """Groups neighbours until a group weighs `least` or more. The last group may weigh less."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += weight(item)
        if total >= least:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextmanager
def one_thread_a_call() -> Iterator[None]:
    """Inside, each call of the tokenizer uses only the thread that makes it, so that as many work as were asked for."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Maps items on threads, in order.

    Few items are under way at a time, so that memory is bounded. (The tokenizer releases Python's lock.)
    """
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > threads + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def with_progress(parts: Iterable[Item], corpus: Corpus) -> Iterator[Item]:
    """The parts; a bar shows how much of the corpus has been read."""
    with tqdm(total=corpus.size, desc="tokenising", unit="B", unit_scale=True, delay=2, mininterval=0.5) as bar:
        for part in parts:
            yield part
            bar.update(corpus.position - bar.n)
