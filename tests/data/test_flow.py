"""How pieces flow from a corpus to rows: grouped, in order, within bounded memory, and into rows by best fit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnscaler.data import flow, readers
from nnscaler.data.fit import best_fit
from nnscaler.data.flow import groups, in_order, one_thread_a_call
from nnscaler.data.sources import Corpus


def test_neighbours_are_grouped_until_they_weigh_enough() -> None:
    assert list(groups([3, 1, 4, 5, 1, 1], lambda item: item, 4)) == [[3, 1], [4], [5], [1, 1]]
    assert list(groups([4, 3, 1], lambda item: item, 4)) == [[4], [3, 1]], "each is weighed anew"
    assert list(groups([], lambda item: item, 4)) == []


def test_results_come_in_order_and_few_items_are_under_way() -> None:
    taken: list[int] = []
    last = threading.Event()

    def items() -> Iterator[int]:
        for item in range(12):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        if item == 0:
            assert last.wait(60), "the first is done when others are"
        if item == 2:
            last.set()
        return 10 * item

    results = in_order(work, items(), threads=2)
    assert next(results) == 0
    assert taken == [0, 1, 2, 3], "two are worked on, and two wait"
    assert [0, *results] == [10 * item for item in range(12)]


@pytest.mark.parametrize("before", [None, "true"])
def test_the_tokenizer_s_own_threads_are_as_before(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TOKENIZERS_PARALLELISM"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    with one_thread_a_call():
        assert os.environ[name] == "false"
    assert os.environ.get(name) == before


def test_progress_is_in_bytes_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a.txt", 10), ("b.txt", 30), ("c.txt", 5)):
        (tmp_path / name).write_text("x" * size)
    monkeypatch.setattr(readers, "BLOCK", 20)
    corpus = Corpus(sorted(tmp_path.iterdir()))
    shown = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            self.total, self.n = total, 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, more: int) -> None:
            self.n += more
            shown.append((self.n, self.total))

    monkeypatch.setattr(flow, "tqdm", Bar)
    for _ in range(2):
        assert corpus.position == (45 if shown else 0)
        texts = ("".join(document) for document in corpus.documents())
        assert list(map(len, flow.with_progress(texts, corpus))) == [10, 30, 5]
    assert shown == [(10, 45), (40, 45), (45, 45)] * 2


def test_the_longest_of_a_window_go_first_and_each_where_it_leaves_least_room() -> None:
    rows = [sorted(map(len, row)) for row in best_fit([size * "x" for size in (3, 4, 6, 7)], 10)]
    assert rows == [[3, 7], [4, 6]]


def test_rows_that_are_full_or_too_many_do_not_wait() -> None:
    """A window holds at least eight rows, and as many may wait."""
    taken: list[int] = []

    def items(sizes: list[int]) -> Iterator[str]:
        for size in sizes:
            taken.append(size)
            yield size * "x"

    found = best_fit(items([3, 4, 6, 7] * 4 + [10]), 10, window=1)
    assert [sorted(map(len, next(found))) for _ in range(8)] == [[3, 7]] * 4 + [[4, 6]] * 4
    assert len(taken) == 16, "what comes next has not been asked for"
    assert [list(map(len, row)) for row in found] == [[10]]
    taken.clear()
    found = best_fit(items([9] * 9 + [8] * 9 + [1]), 10, window=1)
    assert list(map(len, next(found))) == [9], "nine rows wait, of which the fullest gives way"
    assert len(taken) == 9
    assert sorted(sum(map(len, row)) for row in found) == [8] * 9 + [9] * 7 + [10]
